import copy

import pytest
import torch

import grail
from grail.algebra.drift import Drift
from grail.algebra.width import ChannelWidth
from grail.errors import InputError, NonFiniteError
from grail.select import View
from grail_kernels import products

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


def dense_weight() -> torch.Tensor:
    return torch.randn(O, H, generator=torch.Generator().manual_seed(2))


def with_target(x, weight, drift) -> grail.Gram:
    gram = grail.Gram(H, name="site")
    for row in range(len(x)):
        gram.update(x[row], target=x[row] @ weight.T + drift[row])
    return gram


@pytest.mark.parametrize("fit_bias", [False, True], ids=["weights", "biases"])
@pytest.mark.parametrize("reduction", [grail.Selection(range(9), H), grail.Folding([0, 1] * 10)])
def test_a_target_gives_the_fit_and_the_errors_of_its_drift(tokens, reduction, fit_bias):
    x, drift = tokens
    weight, by_drift = dense_weight(), grail.Gram(H)
    by_drift.update(x, drift=drift)
    settings = {"alpha": 1e-3, "drift_correction": 0.7, "fit_bias": fit_bias}
    expected = grail.fit(by_drift, reduction, weight, **settings)
    found = grail.fit(with_target(x, weight, drift), reduction, weight, **settings)
    # T and W G are of size 200 · 20, their difference of size 200.
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert found.error == pytest.approx(expected.error, rel=1e-5)
    assert found.baseline_error == pytest.approx(expected.baseline_error, rel=1e-5)
    if fit_bias:
        torch.testing.assert_close(found.shifts[0], expected.shifts[0], rtol=1e-4, atol=1e-5)


def test_a_drift_of_some_tokens_stands_for_all(tokens):
    x, drift = tokens
    weight, gram, alone = dense_weight(), grail.Gram(H), grail.Gram(H)
    repeated = torch.cat([x, x])
    gram.update(x, drift=drift)
    gram.update(x)
    alone.update(repeated, drift=torch.cat([drift, drift]))
    settings = {"alpha": 1e-3, "drift_correction": 0.7, "fit_bias": True}
    found, expected = (grail.fit(g, range(9), weight, **settings) for g in (gram, alone))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.shifts[0], expected.shifts[0], rtol=1e-5, atol=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    assert gram.drift_scale == 2


def test_a_selector_sees_the_same_correlation_by_target_and_by_drift(tokens):
    x, drift = tokens
    weight, by_drift, half = dense_weight(), grail.Gram(H), grail.Gram(H)
    by_drift.update(x, drift=drift)
    half.update(x[:2], drift=drift[:2])
    half.update(x[2:])
    width, share = ChannelWidth(H, 9), 0.3
    correlation = (weight @ by_drift.matrix() + share * by_drift.drift.cross).mT
    for gram in (by_drift, with_target(x, weight, drift)):
        view = View((), weight, gram, width, torch.Generator(), drift_correction=share)
        seen = view.add_drift(gram.matrix() @ weight.mT)
        torch.testing.assert_close(seen, correlation, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(view.drifted, by_drift.drift.cross, rtol=1e-4, atol=1e-2)
    view = View((), weight, half, width, torch.Generator(), drift_correction=share)
    torch.testing.assert_close(view.drifted, 2 * half.drift.cross)
    seen = view.add_drift(torch.zeros(H, O))
    torch.testing.assert_close(seen, 2 * share * half.drift.cross.mT)


def test_targets_are_saved_loaded_and_merged(tokens, tmp_path):
    x, drift = tokens
    weight = dense_weight()
    parts = [with_target(x[rows], weight, drift[rows]) for rows in (slice(0, 2), slice(2, 4))]
    parts[0].save(tmp_path / "gram.state")
    merged = grail.Gram.load(tmp_path / "gram.state")
    merged.merge(parts[1])
    assert merged.drift.of_target
    whole = with_target(x, weight, drift)
    torch.testing.assert_close(merged.drift.cross, whole.drift.cross, rtol=1e-5, atol=1e-3)
    assert (merged.drift_scale, int(merged.drift.tokens)) == (1, 200)


def test_a_target_is_needed_for_every_token(tokens):
    x, drift = tokens
    gram = with_target(x, dense_weight(), drift)
    gram.update(x[0])
    with pytest.raises(InputError, match="250 tokens and the target of 200"):
        gram.matrix()


def test_forms_do_not_mix(tokens):
    x, drift = tokens
    one, other = grail.Gram(H), grail.Gram(H)
    one.update(x, drift=drift)
    other.update(x, target=drift)
    with pytest.raises(InputError, match=r"a target came to a site .* sums of a drift"):
        one.update(x, target=drift)
    with pytest.raises(InputError, match=r"a drift came to a site .* sums of a target"):
        other.update(x, drift=drift)
    with pytest.raises(InputError, match="both a drift and a target"):
        grail.Gram(H).update(x, drift=drift, target=drift)
    with pytest.raises(InputError, match="cannot merge sums of a target and of a drift"):
        one.merge(other)
    assert one.tokens == other.tokens == 200


def test_tokens_that_wait_for_a_product_are_in_what_is_read(monkeypatch):
    """As on a GPU, where tokens wait for one product; here the product is the CPU's."""
    added = []

    def add(total, left, right):
        added.append(len(left))
        total.addmm_(left.float().mT, right.float())

    monkeypatch.setattr(products, "takes_parts", lambda *_: True)
    monkeypatch.setattr(products, "add_products", add)
    drift = Drift(3, 5, torch.device("cpu"))
    values, x = torch.randint(-8, 8, (2, 40, 3)).float(), torch.randn(2, 40, 5)
    for delta, tokens in zip(values, x, strict=True):
        drift.update(delta, tokens, None)
    assert not added
    assert torch.allclose(drift.cross, torch.einsum("bto,bth->oh", values, x), atol=1e-4)
    assert added == [80]
    assert torch.equal(drift.parts()["cross"], drift.cross)
