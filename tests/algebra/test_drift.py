import copy

import pytest
import torch

import grail
from grail.algebra.drift import Drift
from grail.errors import InputError, NonFiniteError

H, O = 20, 6


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, drift = (torch.randn(4, 50, n, generator=generator) for n in (H, O))
    return x, drift


def test_the_drift_is_summed_over_any_chunking(tokens):
    x, drift = tokens
    gram = grail.Gram(H)
    for row in range(4):
        gram.update(x[row], drift=drift[row])
    deltas, inputs = drift.double().flatten(0, 1), x.double().flatten(0, 1)
    # 200 products of size 1 in fp32.
    torch.testing.assert_close(gram.drift.cross.double(), deltas.T @ inputs, rtol=0, atol=1e-4)
    assert gram.drift.energy.item() == pytest.approx(deltas.square().sum().item(), rel=1e-6)
    # Of fp32 values, in fp64.
    torch.testing.assert_close(gram.drift.sum, deltas.sum(0), rtol=1e-12, atol=1e-12)


def test_masked_tokens_drift_nowhere(tokens):
    x, drift = tokens
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) > 0.4
    masked, removed = grail.Gram(H), grail.Gram(H)
    removed.update(x[mask], drift=drift[mask])
    x[~mask] = drift[~mask] = float("nan")
    masked.update(x, mask, drift)
    assert torch.equal(masked.drift.cross, removed.drift.cross)
    assert torch.equal(masked.drift.sum, removed.drift.sum)
    assert torch.equal(masked.drift.energy, removed.drift.energy)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["with first", "without first"])
def test_merging_adds_the_drift_and_counts_its_absence_as_none(tokens, order):
    x, drift = tokens
    parts = [grail.Gram(H), grail.Gram(H)]
    parts[0].update(x[:2], drift=drift[:2])
    parts[1].update(x[2:])
    merged, expected = grail.Gram(H), copy.deepcopy(parts[0].drift)
    for part in order:
        merged.merge(parts[part])
    assert torch.equal(merged.drift.cross, expected.cross)
    assert torch.equal(merged.drift.sum, expected.sum)
    assert merged.drift.energy == expected.energy
    assert merged.tokens == 200


@pytest.mark.parametrize("shape", [(4, 49, O), (200, O), (4, 50, O + 1)], ids=str)
def test_a_drift_of_another_shape_is_refused_before_anything_is_added(tokens, shape):
    x, drift = tokens
    gram = grail.Gram(H)
    gram.update(x, drift=drift)
    with pytest.raises(InputError, match=r"drift must be \[4, 50, 6\]"):
        gram.update(x, drift=torch.ones(shape))
    assert gram.tokens == 200


def test_one_token_may_come_without_a_dimension_of_its_own(tokens):
    x, drift = tokens
    alone, row = grail.Gram(H), grail.Gram(H)
    alone.update(x[0, 0], drift=drift[0, 0])
    row.update(x[:1, 0], drift=drift[:1, 0])
    assert torch.equal(alone.drift.cross, row.drift.cross)


def test_a_drift_on_another_device_is_refused_before_anything_is_added(tokens):
    x, drift = tokens
    gram = grail.Gram(H)
    with pytest.raises(InputError, match="drift is on the meta device"):
        gram.update(x, drift=drift.to("meta"))
    gram.update(x)
    assert gram.tokens == 200


@pytest.mark.parametrize("outputs", [1, O + 1])
def test_drifts_of_different_outputs_do_not_merge(tokens, outputs):
    x, drift = tokens
    one, other = grail.Gram(H), grail.Gram(H)
    one.update(x, drift=drift)
    other.update(x, drift=torch.ones(4, 50, outputs))
    with pytest.raises(InputError, match="cannot merge a drift"):
        one.merge(other)
    assert one.tokens == 200


def test_a_drift_that_is_not_finite_is_located(tokens):
    x, drift = tokens
    drift[1, 2, 3] = float("inf")
    gram = grail.Gram(H, name="site")
    gram.update(x[:1], drift=drift[:1])
    before = gram.matrix()
    with pytest.raises(NonFiniteError, match="drift at site") as caught:
        gram.update(x, drift=drift)
    assert caught.value.channels == (3,)
    assert torch.equal(gram.matrix(), before)


def test_a_drift_that_is_not_finite_is_found_in_its_sums_too(tokens):
    # As on a GPU, where values are not looked at on the way.
    x, drift = tokens
    drift[1, 2, 3] = float("nan")
    sums = Drift(O, H, torch.device("cpu"))
    sums.update(drift, x, None)
    with pytest.raises(NonFiniteError, match="drift at site") as caught:
        sums.require_finite("site")
    assert caught.value.channels == (3,)


def test_the_energy_of_a_drift_is_beyond_fp32_where_its_squares_are(tokens):
    x, drift = tokens
    gram = grail.Gram(H)
    gram.update(x, drift=1e25 * drift)
    expected = drift.double().square().sum().item() * 1e50
    # Scaling rounded each value once, by 2^-24.
    assert gram.drift.energy.item() == pytest.approx(expected, rel=1e-6)
