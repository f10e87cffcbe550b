"""`add_batch` objects against the published running sums, written out in fp64.

A call of b samples, after n, moves the scripts' sums by these steps:

    SparseGPT   H ← n/(n+b)·H + 2/(n+b)·Σ x xᵀ
    Wanda       s ← n/(n+b)·s + 1/(n+b)·Σ x²
    FLAP        m ← n/(n+b)·m + 1/(n+b)·mean x
                f ← (n−1)/(n+b−1)·f + 1/(n+b)·Σ (x−m)², and 0 in the first call
"""

import weakref

import pytest
import torch
from torch import nn

import grail
from grail.adapters.loops import BiasGPT, SparseGPT, WrappedGPT
from grail.errors import InputError, ModelError, NonFiniteError

UNEVEN = [(1, 40), (3, 17), (2, 5), (1, 128)]  # samples and tokens of each


def calls(width, shapes=UNEVEN, dtype=torch.float32):
    torch.manual_seed(0)
    scales = torch.linspace(0.2, 3, width)
    return [(torch.randn(*shape, width) * scales + 0.5).to(dtype) for shape in shapes]


def tokens(x):
    return x.reshape(-1, x.shape[-1]).double()


def running(batches, step, of=tokens, samples=len):
    """The sum after the last call, by `step(sum, tokens, n, b)`."""
    total, n = 0.0, 0
    for x in batches:
        total = step(total, of(x), n, samples(x))
        n += samples(x)
    return total


def hessian(total, x, n, b):
    return n / (n + b) * total + 2 / (n + b) * x.T @ x


def energy(total, x, n, b):
    return n / (n + b) * total + x.square().sum(0) / (n + b)


def feed(loop, batches):
    for x in batches:
        loop.add_batch(x, None)
    return loop


def near(found, expected, tolerance=1e-6):
    return (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sums_of_uneven_batches_are_those_of_the_scripts(dtype):
    batches, layer = calls(24, dtype=dtype), nn.Linear(24, 8)
    expected = running(batches, hessian)
    loop = feed(SparseGPT(layer), batches)
    assert near(loop.H, expected)
    assert (loop.nsamples, loop.rows, loop.columns) == (7, 8, 24)
    assert near(feed(WrappedGPT(layer, 3, "up"), batches).scaler_row, running(batches, energy))
    assert near(feed(BiasGPT(layer, "WIFN"), batches).scaler_inp, running(batches, energy))


def test_an_input_of_two_axes_is_one_sample():
    batches = [torch.randn(30, 8), torch.randn(12, 8)]
    loop = feed(SparseGPT(nn.Linear(8, 2)), batches)
    assert loop.nsamples == 2
    assert near(loop.H, running(batches, hessian, samples=lambda x: 1))


def test_a_call_without_tokens_counts_as_in_the_scripts():
    batches = [torch.randn(0, 8), torch.randn(12, 8), torch.randn(0, 8)]
    layer = nn.Linear(8, 2)
    loop = feed(WrappedGPT(layer), batches)
    assert loop.nsamples == 3
    assert near(loop.scaler_row, running(batches, energy, samples=lambda x: 1))
    assert near(feed(SparseGPT(layer), batches).H, running(batches, hessian, samples=lambda x: 1))


@pytest.mark.parametrize("batches", [[], [torch.randn(0, 8)]])
def test_an_expert_without_tokens_has_zeros(batches):
    layer = nn.Linear(8, 2)
    assert torch.equal(feed(SparseGPT(layer), batches).H, torch.zeros(8, 8))
    assert torch.equal(feed(WrappedGPT(layer), batches).scaler_row, torch.zeros(8))
    flap = feed(BiasGPT(layer, "WIFV"), batches)
    for found in (flap.baseline_inp, flap.fluc_inp, flap.scaler_inp):
        assert torch.equal(found, torch.zeros(8))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, (3, 1), groups=2, dilation=2)],
    ids=["plain", "groups"],
)
def test_a_convolution_is_unfolded(layer):
    torch.manual_seed(0)
    batches = [torch.randn(2, 4, 9, 9), torch.randn(1, 4, 6, 7)]

    def windows(x):
        maps = x.double().unflatten(1, (layer.groups, -1)).flatten(0, 1)
        unfolded = nn.functional.unfold(
            maps, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        return unfolded.transpose(1, 2).flatten(0, 1)

    loop = feed(SparseGPT(layer), [*batches, torch.ones(4, 6, 6)])
    assert loop.nsamples == 4
    assert near(loop.H, running([*batches, torch.ones(1, 4, 6, 6)], hessian, windows))
    assert loop.columns == layer.weight[0].numel() == len(loop.H)
    assert near(feed(WrappedGPT(layer), batches).scaler_row, running(batches, energy, windows))


def test_the_layer_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    batches = calls(16)
    loop = feed(SparseGPT(conv1d(5, 16)), batches)
    assert (loop.rows, loop.columns) == (5, 16)
    assert near(loop.H, running(batches, hessian))


def test_the_mean_of_flap_is_the_scripts_for_one_sample_a_call_of_equal_length():
    def mean(total, x, n, b):
        return n / (n + b) * total + x.mean(0) / (n + b)

    layer = nn.Linear(24, 8)
    equal = calls(24, [(1, 32)] * 6)
    assert near(feed(BiasGPT(layer, "IFV"), equal).baseline_inp, running(equal, mean))
    uneven = calls(24)
    found = feed(BiasGPT(layer, "IFV"), uneven).baseline_inp
    assert near(found, torch.cat([tokens(x) for x in uneven]).mean(0))
    assert not near(found, running(uneven, mean), 0.1)


def test_the_fluctuation_of_flap_is_exact_and_the_scripts_is_the_sum_of_the_page():
    batches, layer = calls(24, [(1, 256)] * 16), nn.Linear(24, 8)
    mean, script, shares, n = torch.zeros(24).double(), torch.zeros(24).double(), [], 0
    for x in map(tokens, batches):
        mean = n / (n + 1) * mean + x.mean(0) / (n + 1)
        deviations = (x - mean).square().sum(0)
        script = (n - 1) / n * script + deviations / (n + 1) if n else 0 * mean
        shares.append(n / (n + 1) * deviations)
        n += 1
    assert near(script, sum(shares) / (n - 1), 1e-12)  # the closed form of the page
    everything = torch.cat([tokens(x) for x in batches])
    exact = (everything - everything.mean(0)).square().sum(0) / n
    found = feed(BiasGPT(layer, "WIFV"), batches).fluc_inp
    assert near(found, exact)
    # For tokens of one distribution: the script's is (n − Hₙ)/(n − 1) of it, Hₙ = 1 + 1/2 + … 1/n.
    factor = (n - sum(1 / k for k in range(1, n + 1))) / (n - 1)
    assert near(script, factor * found.double(), 0.05)
    assert not near(script, found.double(), 0.1)


def test_the_fluctuation_of_a_constant_is_zero_and_beside_a_large_mean_it_is_right():
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 3) + torch.tensor([0.0, 30.0, 0.0])
    x[..., 2] = 1234.5
    loop = feed(BiasGPT(nn.Linear(3, 2), "WIFV"), [x])
    found, gram = loop.fluc_inp, loop.gram
    of_sums = gram.energy.double() - gram.sum.double().square() / 4096
    assert near(found[:2], of_sums[:2], 1e-7)
    exact = (tokens(x) - tokens(x).mean(0)).square().sum(0)
    assert found[2] == 0
    assert near(found[:2], exact[:2], 1e-3)


def test_what_a_script_changes_in_place_stays_until_more_tokens_come():
    loop = feed(SparseGPT(nn.Linear(8, 2)), calls(8))
    loop.H[0, 0] = 7
    assert loop.H[0, 0] == 7
    loop.add_batch(torch.ones(1, 2, 8), None)
    assert loop.H[0, 0] != 7


def test_one_gram_serves_the_fit_afterwards():
    batches, consumer = calls(8), nn.Linear(8, 4)
    loop = feed(WrappedGPT(consumer), batches)
    kept = loop.scaler_row.topk(4).indices.sort().values
    fit = grail.fit(loop.gram, kept, consumer)
    assert fit.weight.shape == (4, 4)


class Script:
    """A fork's class, of which only the pruning stays: magnitudes in the metric of H."""

    def __init__(self, layer):
        raise AssertionError("its dense sums are not made")

    def add_batch(self, inp, out):
        raise AssertionError("nor added to")

    def fasterprune(self, sparsity):
        H = self.H
        del self.H
        weight = self.layer.weight.data
        score = weight.square() * H.diagonal()
        least = score.flatten().kthvalue(round(sparsity * score.numel())).values
        weight[score <= least] = 0


def test_a_scripts_own_class_keeps_its_pruning():
    class Mine(SparseGPT, Script):
        pass

    layer, batches = nn.Linear(8, 4), calls(8)
    loop = feed(Mine(layer), batches)
    expected = layer.weight.detach().square() * running(batches, hessian).diagonal()
    loop.fasterprune(0.5)
    assert int((layer.weight == 0).sum()) == 16
    assert expected[layer.weight == 0].max() < expected[layer.weight != 0].min()
    assert loop.H is None
    with pytest.raises(InputError, match="H was set, deleted or freed"):
        loop.add_batch(batches[0], None)
    loop.free()


def test_h_is_gone_when_the_script_deletes_it():
    loop = feed(SparseGPT(nn.Linear(8, 4)), calls(8))
    H = loop.H
    kept = weakref.ref(H)
    del loop.H, H
    assert kept() is None


def test_free_releases_and_ends():
    loop = feed(BiasGPT(nn.Linear(8, 4), "WIFV"), calls(8))
    assert loop.fluc_inp is not None
    loop.free()
    assert (loop.gram, loop.fluc_inp, loop.baseline_inp, loop.scaler_inp) == (None,) * 4
    with pytest.raises(InputError, match="freed"):
        loop.add_batch(torch.ones(1, 2, 8), None)


def test_bad_input_is_refused():
    with pytest.raises(ModelError, match="Embedding"):
        WrappedGPT(nn.Embedding(8, 4))
    loop = SparseGPT(nn.Linear(8, 4))
    for shape in [(8,), (2, 3, 7)]:
        with pytest.raises(InputError):
            loop.add_batch(torch.ones(*shape), None)
    with pytest.raises(InputError, match="axes"):
        SparseGPT(nn.Conv2d(3, 4, 3)).add_batch(torch.ones(2, 1, 3, 5, 5), None)
    with pytest.raises(NonFiniteError):
        loop.add_batch(torch.full((1, 2, 8), float("nan")), None)
    assert (loop.nsamples, loop.gram.tokens) == (0, 0)
