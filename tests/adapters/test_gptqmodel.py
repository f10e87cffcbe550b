"""GPTQModel's own GPTQ class with Grams, against itself without."""

import gc
import threading
import types
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("gptqmodel")

from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from transformers.pytorch_utils import Conv1D

import grail
from bench.tools.allocations import peak_bytes
from grail.adapters import _library, gptqmodel
from grail.adapters._library import Library
from grail.errors import AdapterError
from grail_kernels import cpu_blas

CPU = torch.device("cpu")
UNEVEN = [(2, 40), (1, 7), (3, 65), (1, 1)]  # samples and tokens of each


def config(**settings):
    return QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, **settings)


def task_of(layer, batches=(), **settings):
    task = GPTQ(layer, config(**settings))
    task.quantizer.configure(perchannel=True)
    for x in batches:
        task.add_batch(x, None)
    return task


def batches(width, shapes=UNEVEN, dtype=torch.float32):
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, width)
    return [(torch.randn(*shape, width) * scales + 0.3).to(dtype) for shape in shapes]


def hessian(layer, inputs):
    task = task_of(layer, inputs)
    return task.finalize_hessian(), task


def near(found, expected, tolerance=1e-6):
    return (found.double() - expected).norm() <= tolerance * expected.norm()


def state(task):
    """What GPTQModel keeps beside H, once it is there."""
    return (
        *(task._device_hessian_partials, task._device_hessian_partial_ready),
        *(task._device_sample_counts, task._hessian_dirty, task._final_hessian_device_hint),
        *(task._hessian_ready_event, task._deferred_hessian_sources),
    )


def both(layer, inputs):
    """The task with the adapter, its H, and the H of GPTQModel alone."""
    expected, stock = hessian(layer, inputs)
    with gptqmodel.installed():
        found, task = hessian(layer, inputs)
    assert (task.nsamples, task.fwd_counter) == (stock.nsamples, stock.fwd_counter)
    assert type(task.nsamples) is type(stock.nsamples) is int
    assert state(task) == state(stock)
    assert (found.dtype, found.shape, found.device) == (
        *(expected.dtype, expected.shape),
        expected.device,
    )
    return task, found, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [64, 320])
def test_h_is_that_of_gptqmodel_in_uneven_batches(width, dtype):
    inputs = batches(width, dtype=dtype)
    task, found, expected = both(nn.Linear(width, 16), inputs)
    x = torch.cat([x.reshape(-1, width) for x in inputs]).double()
    assert near(found, expected)
    assert near(found, 2 / len(x) * x.T @ x)  # by tokens: there are fewer samples
    assert task.nsamples == len(x) == 283


LAYERS = {
    "conv2d": (nn.Conv2d(8, 4, 3, padding=1, stride=2), (8, 11, 9)),
    "conv2d of groups": (nn.Conv2d(8, 4, (3, 1), groups=2, dilation=2), (8, 11, 9)),
    "conv1d": (nn.Conv1d(8, 4, 3, padding=2, dilation=2), (8, 33)),
    "conv1d of groups": (nn.Conv1d(8, 8, 4, groups=4, stride=2), (8, 33)),
    "transformers' Conv1D": (Conv1D(4, 24), (5, 24)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_other_layers(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(2, *shape), torch.randn(1, *shape)]
    _, found, expected = both(layer, inputs)
    assert near(found, expected)


def test_an_embedding_stays_gptqmodels():
    ids = [torch.randint(0, 12, (3, 40))]
    _, found, expected = both(nn.Embedding(12, 8), ids)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs", [[], [torch.randn(0, 32)], [torch.randn(1, 0, 32)]])
def test_an_expert_without_tokens_has_zeros(inputs):
    task, found, expected = both(nn.Linear(32, 8), inputs)
    assert torch.equal(found, expected)
    assert not found.any()
    assert task.nsamples == 0


def test_an_expert_with_some_empty_calls():
    inputs = [torch.randn(0, 32), torch.randn(5, 32), torch.randn(0, 32)]
    task, found, expected = both(nn.Linear(32, 8), inputs)
    assert near(found, expected)
    assert task.nsamples == 5


def test_nan_reaches_h_as_without_the_adapter():
    inputs = batches(32)
    inputs[1][0, 0, 3] = float("nan")
    _, found, expected = both(nn.Linear(32, 8), inputs)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"desc_act": True}, {"act_group_aware": False}])
def test_the_loss_and_the_output_error_of_quantize_are_those_of_gptqmodel(settings, dtype):
    torch.manual_seed(0)
    mixing = torch.randn(128, 128) / 128**0.5
    inputs = [(x @ mixing).to(dtype) for x in batches(128, [(4, 64), (1, 100), (2, 300)])]
    layer = nn.Linear(128, 64).to(dtype)
    x = torch.cat([x.reshape(-1, 128) for x in inputs]).double()
    settings = {"desc_act": False, "act_group_aware": True} | settings
    if settings["desc_act"]:
        settings["act_group_aware"] = False

    def quantised():
        task = task_of(layer, inputs, **settings)
        weight, *_, loss, _, count = task.quantize()
        task.free()
        error = (x @ (weight - layer.weight.detach()).double().T).square().sum()
        return float(loss), float(error), count

    loss, error, count = quantised()
    with gptqmodel.installed():
        own_loss, own_error, own_count = quantised()
    assert own_count == count == len(x)
    assert own_loss == pytest.approx(loss, rel=0.01)
    assert own_error == pytest.approx(error, rel=0.01)
    rounded = layer.weight.detach().double()
    assert own_error < 0.5 * float((x @ (rounded * 0.1).T).square().sum())  # it is no nonsense


def test_fallback_without_tokens_runs():
    with gptqmodel.installed():
        task = task_of(nn.Linear(32, 8), [torch.randn(0, 32)])
        weight = task.quantize()[0]
    assert weight.shape == (8, 32)


def at_another_device(task, number):
    """Names the sums of the CPU after another device, as a worker of that device leaves them."""
    for state in (
        *(task._device_hessian_partials, task._device_sample_counts),
        task._device_hessian_partial_ready,
    ):
        state[torch.device("cpu", number)] = state.pop(CPU)


def test_the_sums_of_several_devices_are_merged():
    layer, inputs = nn.Linear(48, 8), batches(48)

    def merged():
        task = task_of(layer, inputs[:2])
        at_another_device(task, 1)
        task.add_batch(inputs[2], None)
        at_another_device(task, 0)
        task.add_batch(inputs[3], None)
        assert len(task._device_hessian_partials) == 3
        return task.finalize_hessian(CPU), task.nsamples

    expected, count = merged()
    with gptqmodel.installed():
        found, own_count = merged()
    assert near(found, expected)
    assert own_count == count == 283


def test_events_are_recorded_and_waited_for_in_gptqmodels_order_under_its_lock(monkeypatch):
    called = []

    def traced(name):
        method = getattr(GPTQ, name)

        def call(self, *args):
            devices = [arg for arg in args if isinstance(arg, torch.device)]
            called.append((name, *devices, self.lock._is_owned()))
            return method(self, *args)

        monkeypatch.setattr(GPTQ, name, call)

    for name in (
        *("_wait_partial_ready", "_record_partial_ready", "_wait_hessian_ready"),
        *("_record_hessian_ready", "_reap_deferred_hessian_sources", "_defer_hessian_sources"),
    ):
        traced(name)
    layer, inputs = nn.Linear(32, 8), batches(32)
    hessian(layer, inputs)
    expected = called.copy()
    called.clear()
    with gptqmodel.installed():
        hessian(layer, inputs)
    assert called == expected
    assert len(expected) == 11


def test_the_event_of_another_device_is_waited_for():
    waited = []
    with gptqmodel.installed():
        task = task_of(nn.Linear(32, 8), batches(32))
        event = types.SimpleNamespace(synchronize=lambda: waited.append(True))
        task._device_hessian_partial_ready[CPU] = event
        task.finalize_hessian(CPU)
    assert waited == [True]


def test_two_threads_on_one_task_lose_nothing():
    layer, inputs = nn.Linear(96, 8), batches(96, [(1, n % 37 + 1) for n in range(120)])
    expected, stock = hessian(layer, inputs)
    failed = []
    with gptqmodel.installed():
        task, start = task_of(layer), threading.Barrier(2)

        def work(part):
            try:
                start.wait()
                for x in part:
                    task.add_batch(x, None)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(inputs[n::2],)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = task.finalize_hessian()
    assert failed == []
    assert near(found, expected)
    assert (task.nsamples, task.fwd_counter) == (stock.nsamples, 120)


def test_a_second_round_replaces_h_in_its_memory_as_in_gptqmodel():
    layer, inputs = nn.Linear(32, 8), batches(32)

    def twice():
        task = task_of(layer, inputs[:2])
        first = task.finalize_hessian()
        task.materialize_global_hessian()
        assert task.H is first
        task.add_batch(inputs[2], None)
        return task.finalize_hessian(), first, task.nsamples

    expected, _, count = twice()
    with gptqmodel.installed():
        found, first, own_count = twice()
    assert found is first
    assert near(found, expected)
    assert own_count == count == 195


def test_layers_that_read_one_input_take_the_leaders_h():
    inputs = batches(32)
    with gptqmodel.installed():
        leader, follower = task_of(nn.Linear(32, 8), inputs), task_of(nn.Linear(32, 4))
        follower.adopt_hessian_from(leader)
    assert torch.equal(follower.H, leader.H)
    assert follower.nsamples == leader.nsamples == 283


def test_a_weight_that_is_padded_for_tensor_parallelism():
    layer = nn.Linear(30, 8)
    layer._tp_pad_info = {"pad_cols": 2}
    _, found, expected = both(layer, batches(30))
    assert found.shape == (32, 32)
    assert near(found, expected)
    assert not found[30:].any()
    with gptqmodel.installed():
        across = task_of(layer, batches(30))
    assert near(across.finalize_hessian(), expected)


def test_the_statistics_are_a_packed_gram_and_free_releases_them():
    with gptqmodel.installed():
        task = task_of(nn.Linear(1024, 8), batches(1024))
        (gram,) = task._device_hessian_partials.values()
        assert isinstance(gram, grail.Gram)
        assert task._hessian_dirty
        held = sum(part.nbytes for part in gram.parts().values())
        assert held <= 0.65 * 4 * 1024**2
        task.free()
        assert not task._device_hessian_partials
        # GPTQModel's workspaces are not used.
        assert task._borrow_workspace_totals["requests"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [576, 1536])
def test_calls_take_at_most_half_of_gptqmodels_memory(monkeypatch, width, dtype):
    layer, x = nn.Linear(width, 8), torch.randn(1, 2048, width).to(dtype)

    def peak():
        monkeypatch.setattr(cpu_blas, "_copies", {})  # an fp32 copy that is kept
        task = task_of(layer)
        return peak_bytes(lambda: [task.add_batch(x, None) for _ in range(2)])

    stock = peak()
    with gptqmodel.installed():
        assert peak() <= 0.5 * stock


def test_no_memory_on_a_device_falls_back_to_the_cpu(monkeypatch):
    made = grail.Gram.of.__func__
    failures = iter([True, False])

    def of(cls, module, **settings):
        if next(failures):
            raise torch.OutOfMemoryError("no memory")
        return made(cls, module, **settings)

    layer, inputs = nn.Linear(32, 8), batches(32)
    expected, _ = hessian(layer, inputs)
    monkeypatch.setattr(grail.Gram, "of", classmethod(of))
    with gptqmodel.installed():
        found, _ = hessian(layer, inputs)
    assert near(found, expected)


def test_what_was_begun_before_or_ends_after_the_adapter_loses_no_token():
    layer, inputs = nn.Linear(32, 8), batches(32)
    expected, _ = hessian(layer, inputs)
    before = task_of(layer, inputs[:2])
    with gptqmodel.installed():
        for x in inputs[2:]:
            before.add_batch(x, None)
        across = task_of(layer, inputs[:2])
        within = before.finalize_hessian()
    for x in inputs[2:]:
        across.add_batch(x, None)
    assert near(within, expected)
    assert near(across.finalize_hessian(), expected)
    assert (before.nsamples, across.nsamples) == (283, 283)


def test_it_is_taken_out_again_and_one_at_a_time():
    stock = GPTQ.add_batch, GPTQ.materialize_global_hessian
    with pytest.raises(ZeroDivisionError), gptqmodel.installed():
        1 / 0  # noqa: B018
    uninstall = gptqmodel.install()
    with pytest.raises(AdapterError, match="replaced by an adapter already"):
        gptqmodel.install()
    assert GPTQ.add_batch is not stock[0]
    assert GPTQ.materialize_global_hessian is not stock[1]
    uninstall()
    uninstall()
    assert (GPTQ.add_batch, GPTQ.materialize_global_hessian) == stock


def test_it_keeps_no_task_alive():
    with gptqmodel.installed():
        task = task_of(nn.Linear(32, 8), batches(32))
        gone = gptqmodel._tasks
        assert len(gone) == 1
        del task
        gc.collect()
        assert len(gone) == 0


def test_a_class_that_sums_up_in_another_way_is_refused():
    class Other(GPTQ):
        def process_batch(self, inp):
            return super().process_batch(inp * 2)

    task, patched = Other(nn.Linear(32, 8), config()), task_of(nn.Linear(32, 8))
    patched.compute_hessian_xtx = types.MethodType(lambda self, x: x.T @ x, patched)
    wrong = task_of(nn.Linear(32, 8))
    wrong.columns = 40
    with gptqmodel.installed():
        for each, message in (
            (task, "Other.process_batch is not GPTQ.process_batch"),
            (patched, "compute_hessian_xtx is not"),
            (wrong, "32 columns, and GPTQModel gives it 40"),
        ):
            with pytest.raises(AdapterError, match=message):
                each.add_batch(torch.randn(4, 32), None)
            assert each.nsamples == 0


@pytest.mark.parametrize("name", ["materialize_global_hessian", "_record_partial_ready"])
def test_a_missing_method_is_one_sentence(monkeypatch, name):
    monkeypatch.delattr(GPTQ, name)
    with pytest.raises(AdapterError, match=rf"gptqmodel 7\.6\.0 has no GPTQ\.{name}"):
        gptqmodel.install()
    monkeypatch.undo()
    gptqmodel.install()()  # nothing was left half-way


@pytest.mark.parametrize("name", ["fwd_counter", "_device_hessian_partials"])
def test_a_missing_attribute_of_a_task_is_one_sentence(name):
    task = task_of(nn.Linear(32, 8))
    delattr(task, name)
    with gptqmodel.installed(), pytest.raises(AdapterError, match=rf"has no .*{name}, which grail"):
        task.add_batch(torch.randn(4, 32), None)


def test_an_unknown_version_warns_and_the_tested_one_does_not(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Library("gptqmodel", gptqmodel.LIBRARY.tested)
    monkeypatch.setattr(_library, "version", lambda _: "99.0")
    with pytest.warns(UserWarning, match=r"tested with gptqmodel 7\.6\.0, and 99\.0 is installed"):
        Library("gptqmodel", gptqmodel.LIBRARY.tested)
