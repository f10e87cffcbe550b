"""Model Optimizer's running Hessians and its GPTQ with grail's kernels, against those alone."""

import copy
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("modelopt")

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.utils import calib_utils

from grail.adapters import modelopt
from grail.adapters._library import Library
from grail.errors import AdapterError, InputError

stock = calib_utils.update_hessian
UNEVEN = [(2, 40), (1, 7), (3, 65), (1, 1)]  # samples and tokens of each


def batches(width, shapes=UNEVEN, dtype=torch.float32):
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, width)
    return [(torch.randn(*shape, width) * scales + 0.3).to(dtype) for shape in shapes]


def running(update, inputs, width, dtype=torch.float32):
    """H and the count after all inputs, from the module that Model Optimizer calls."""
    H, n = torch.zeros(width, width, dtype=dtype), 0
    for x in inputs:
        returned, n = update(x, H, n)
        assert returned is H
    return H, n


def near(found, expected, tolerance=1e-6):
    return (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [64, 320])
def test_h_is_that_of_model_optimizer_after_every_call(width, dtype):
    inputs = batches(width, dtype=dtype)
    for calls in range(1, len(inputs) + 1):
        given = inputs[:calls]
        expected, count = running(stock, given, width)
        with modelopt.installed():
            found, own_count = running(calib_utils.update_hessian, given, width)
        x = torch.cat([x.reshape(-1, width) for x in given]).double()
        assert near(found, expected)
        assert near(found, 2 / len(x) * x.T @ x)  # by tokens: there are fewer samples
        assert torch.equal(found, found.T)
        assert own_count == count == len(x)


def test_a_matrix_that_the_caller_changes_between_calls_is_what_counts():
    def changed(update):
        H, n = torch.zeros(64, 64), 0
        for x in batches(64):
            H, n = update(x, H, n)
            H.mul_(0.5).diagonal().add_(1)
        return H

    expected = changed(stock)
    with modelopt.installed():
        assert near(changed(calib_utils.update_hessian), expected)


def test_an_expert_without_tokens_keeps_what_there_was():
    H = torch.eye(8)
    with modelopt.installed():
        for empty in (torch.randn(0, 8), torch.randn(2, 0, 8)):
            found, n = calib_utils.update_hessian(empty, H, 5)
            assert found is H
            assert (n, stock(empty, H, 5)[1]) == (5, 5)
    assert torch.equal(H, torch.eye(8))


def test_nan_reaches_h_as_without_the_adapter():
    inputs = batches(32)
    inputs[1][0, 0, 3] = float("nan")
    expected, _ = running(stock, inputs, 32)
    with modelopt.installed():
        found, _ = running(calib_utils.update_hessian, inputs, 32)
    assert torch.equal(found.isnan(), expected.isnan())


def test_the_temporary_memory_is_about_half_of_the_dense_product(monkeypatch):
    sizes, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: sizes.append(a[0]) or zeros(*a, **k))
    modelopt.update_hessian(torch.randn(4, 2048), torch.empty(2048, 2048), 0)
    assert sizes == [2048 * (2048 + 256) // 2]


class Experts(nn.Module):
    """A small network in whose second layer one of three experts receives no token."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.experts = nn.ModuleList(nn.Linear(128, 64) for _ in range(3))

    def forward(self, x):
        hidden = self.up(x).relu()
        flat, out = hidden.reshape(-1, 128), x.new_zeros(*x.shape[:-1], 64).reshape(-1, 64)
        for n in (0, 1):
            chosen = flat[:, 0].gt(0) == bool(n)
            out[chosen] = self.experts[n](flat[chosen])
        self.experts[2](flat[:0])
        return out.view(*x.shape[:-1], 64)


def test_its_gptq_loses_as_much_as_without_the_adapter(capsys):
    torch.manual_seed(0)
    model, mixing = Experts(), torch.randn(64, 64) / 8
    inputs = [x @ mixing for x in batches(64)]
    x = torch.cat([x.reshape(-1, 64) for x in inputs])
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG) | {"algorithm": {"method": "gptq"}}

    def run(network):
        for batch in inputs:
            network(batch)

    def error():
        quantised = mtq.quantize(copy.deepcopy(model), config, run)
        with torch.no_grad():
            return float((quantised(x) - model(x)).double().square().mean())

    expected = error()
    calls = []
    with modelopt.installed():
        own = calib_utils.update_hessian
        calib_utils.update_hessian = lambda *args: calls.append(args) or own(*args)
        found = error()
        calib_utils.update_hessian = own
    assert len(calls) == 4 * len(inputs)
    assert found == pytest.approx(expected, rel=0.01)
    with torch.no_grad():
        assert 0 < found < 0.05 * float(model(x).square().mean())
    assert "GPTQ time" in capsys.readouterr().out


def test_two_threads_do_not_mix_their_matrices():
    inputs = [batches(96, [(1, n % 29 + 1) for n in range(40)]) for _ in range(2)]
    inputs[1] = [2 * x for x in inputs[1]]
    expected = [running(stock, given, 96)[0] for given in inputs]
    found = {}
    with modelopt.installed():

        def work(n):
            found[n] = running(calib_utils.update_hessian, inputs[n], 96)[0]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(near(found[n], expected[n]) for n in range(2))


@pytest.mark.parametrize(
    ("x", "H", "n"),
    [
        (torch.ones(3, 8), torch.zeros(7, 7), 0),
        (torch.ones(3, 8), torch.zeros(8, 8, dtype=torch.bfloat16), 0),
        (torch.ones(3, 8), None, 0),
        (torch.ones(3, 8), torch.zeros(8, 8), -1),
        (torch.ones(3, 8), torch.zeros(8, 8), None),
        (torch.ones(()), torch.zeros(8, 8), 0),
        ([1.0], torch.zeros(8, 8), 0),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(x, H, n):
    with pytest.raises(InputError):
        modelopt.update_hessian(x, H, n)
    assert H is None or not H.any()


def test_it_is_taken_out_again_and_one_at_a_time():
    with pytest.raises(ZeroDivisionError), modelopt.installed():
        1 / 0  # noqa: B018
    assert calib_utils.update_hessian is stock
    uninstall = modelopt.install()
    with pytest.raises(AdapterError, match="replaced by an adapter already"):
        modelopt.install()
    assert calib_utils.update_hessian is not stock
    uninstall()
    uninstall()
    assert calib_utils.update_hessian is stock


def test_a_missing_function_is_one_sentence(monkeypatch):
    monkeypatch.delattr(calib_utils, "update_hessian")
    with pytest.raises(AdapterError, match=r"nvidia-modelopt 0\.47\.0 has no .*\.update_hessian"):
        modelopt.install()


def test_an_unknown_version_warns(monkeypatch):
    from grail.adapters import _library

    monkeypatch.setattr(_library, "version", lambda _: "0.99")
    with pytest.warns(UserWarning, match=r"tested with nvidia-modelopt 0\.47\.0, and 0\.99"):
        Library("nvidia-modelopt", modelopt.LIBRARY.tested)
