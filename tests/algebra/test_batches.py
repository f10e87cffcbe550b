"""Fits of several sites at once, such as a layer's experts, and what they ask of the device."""

import math

import pytest
import torch

import grail
from grail.algebra import _fit, heldout
from grail.algebra._fit import FitSite, fit_each
from grail.algebra.gram import read_together
from grail.errors import NonFiniteError
from tests.reads import Reads

H, K, O = 24, 10, 70  # enough outputs for a sketch
SETTINGS = {
    "fit_bias": False,
    "alpha": "auto",
    "toward": "baseline",
    "drift_correction": "auto",
}


def gram_of(generator, tokens, form, weight, name="site"):
    gram = grail.Gram(H, name=name)
    if not tokens:
        return gram
    mixing = torch.randn(6, H, generator=torch.Generator().manual_seed(9))
    x = torch.randn(tokens, 6, generator=generator) @ mixing
    x += 0.3 * torch.randn(tokens, H, generator=generator)
    drift = 0.4 * x[:, :1] @ torch.ones(1, O) + 0.1 * torch.randn(tokens, O, generator=generator)
    given = {"none": {}, "drift": {"drift": drift}, "target": {"target": x @ weight.T + drift}}
    gram.update(x, **given[form])
    return gram


def site(seed, form="drift", held_out=True, folding=False, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(O, H, generator=generator)
    train = gram_of(generator, tokens + 10 * seed, form, weight, f"expert {seed}")
    other = gram_of(generator, 80, form, weight) if held_out else None
    order = torch.randperm(H, generator=generator)
    reduction = grail.Folding(order % K) if folding else grail.Selection(order[:K], H)
    return FitSite(train, reduction, (weight,), other)


def assert_same(found, expected):
    assert (found.alpha, found.retries) == (expected.alpha, expected.retries)
    assert found.drift_correction == pytest.approx(expected.drift_correction, abs=1e-9)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-6)
    for name in ("error", "baseline_error", "damping"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-7)
    if expected.shifts is not None:
        torch.testing.assert_close(found.shifts[0], expected.shifts[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fit_bias", [False, True], ids=["weights", "biases"])
@pytest.mark.parametrize("toward", ["zero", "baseline"])
@pytest.mark.parametrize("form", ["none", "drift", "target"])
@pytest.mark.parametrize("folding", [False, True], ids=["selection", "folding"])
def test_a_batch_of_sites_is_fitted_as_each_alone(folding, form, toward, fit_bias):
    sites = [site(seed, form, folding=folding) for seed in range(5)]
    settings = {**SETTINGS, "toward": toward, "fit_bias": fit_bias}
    for each, found in zip(sites, fit_each(sites, **settings), strict=True):
        (alone,) = fit_each([each], **settings)
        assert_same(found, alone)


def test_sites_of_other_forms_make_batches_of_their_own(monkeypatch):
    sites = [site(0), site(1, "none"), site(2), site(3, held_out=False), site(4)]
    sites.append(FitSite(sites[0].gram, grail.Selection(range(H), H), sites[0].given))
    sites.append(FitSite(sites[0].gram, sites[0].reduction, sites[0].given, None, False))
    sizes = []
    batch = _fit._Batch

    def counted(these, *rest):
        sizes.append(len(these))
        return batch(these, *rest)

    monkeypatch.setattr(_fit, "_Batch", counted)
    found = fit_each(sites, **SETTINGS)
    assert sorted(sizes) == [1, 1, 1, 1, 3]
    for each, fit in zip(sites, found, strict=True):
        assert_same(fit, fit_each([each], **SETTINGS)[0])
    assert found[6].alpha == math.inf


def test_a_batch_takes_no_more_memory_than_its_limit(monkeypatch):
    sites = [site(seed) for seed in range(5)]
    expected = fit_each(sites, **SETTINGS)
    one = _fit.batch_bytes(sites[:1], compensate=True, held_out=True, fit_bias=False)
    monkeypatch.setitem(_fit.BATCH_BYTES, "cpu", 2 * one)
    stated = _fit.batch_bytes(sites, compensate=True, held_out=True, fit_bias=False)
    assert stated == 2 * one + 3 * 4 * O * K  # and the weights of three others
    for fit, other in zip(fit_each(sites, **SETTINGS), expected, strict=True):
        assert_same(fit, other)


def test_one_site_that_cannot_be_solved_leaves_the_others_as_they_are():
    sites = [site(seed, held_out=False) for seed in range(3)]
    repeated = torch.randn(50, 1).expand(-1, H).contiguous()  # of rank 1, without any damping
    singular = grail.Gram(H, name="singular")
    singular.update(repeated, drift=torch.zeros(50, O))
    sites.insert(1, FitSite(singular, sites[0].reduction, sites[0].given))
    settings = {**SETTINGS, "alpha": 0.0, "drift_correction": 0.5}
    found = fit_each(sites, **settings)
    assert [fit.retries > 0 for fit in found] == [False, True, False, False]
    for each, fit in zip(sites, found, strict=True):
        assert_same(fit, fit_each([each], **settings)[0])


def test_a_weight_that_is_not_finite_is_named_among_many():
    sites = [site(seed) for seed in range(3)]
    sites[1].given[0][4, 7] = math.nan
    with pytest.raises(NonFiniteError, match="consumer weight of expert 1") as caught:
        fit_each(sites, **SETTINGS)
    assert caught.value.channels == (7,)


@pytest.mark.parametrize("form", ["none", "drift", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_device_is_read_four_times_however_many_sites_there_are(form, dtype):
    counts, operators = [], []
    for number in (1, 2, 8):
        # The same tokens, so that the search takes the same way.
        sites = [site(3, form) for _ in range(number)]
        sites = [FitSite(s.gram, s.reduction, (s.given[0].to(dtype),), s.held_out) for s in sites]
        with Reads() as reads:
            fit_each(sites, **SETTINGS)
        counts.append(reads.count)
        operators.append(sum(reads.operators.values()))
    # The state of the Grams, the errors of up to two rounds of strengths, and the result.
    assert counts[0] == counts[1] == counts[2] <= 4
    assert operators[1] == operators[2]


def test_what_is_read_together_is_not_read_again():
    sites = [site(seed) for seed in range(4)]
    grams = [gram for each in sites for gram in each.grams]
    with Reads() as reads:
        read_together(grams)
        assert reads.count == 1
        assert [gram.tokens for gram in grams] == [200, 80, 210, 80, 220, 80, 230, 80]
        for gram in grams:
            gram.matrix()
        assert reads.count == 1
        grams[0].update(torch.ones(1, H), drift=torch.zeros(1, O))
        before = reads.count
        grams[0].matrix()
    assert reads.count == before + 1
    assert grams[0].tokens == 201


def least_error(each, alphas=heldout.ALPHAS):
    """The least held-out error of all outputs over the grid, and that of an α and β."""
    batch = _fit._Batch([each], False, "baseline")
    sums = _fit.Sums([each.held_out])
    moments = _fit.Moments(batch._consumers, sums)
    both = (batch._moments, moments), (batch._sums, sums)
    before, _ = _fit.Problem(batch._consumers, moments, sums)._baseline_errors()

    def error(alpha, correction):
        choice = heldout.Choice(batch._consumers, *both, "baseline", correction)
        return before.item() + choice._price(alpha, [0], True)[0, 0].item()

    return min(error(alpha, None) for alpha in (math.inf, *alphas)), error


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_on_a_sketch_costs_next_to_nothing(seed, monkeypatch):
    each = site(seed)
    (found,) = fit_each([each], **SETTINGS)
    monkeypatch.setattr(heldout, "SKETCH", O)
    best, error = least_error(each)
    assert best <= error(found.alpha, found.drift_correction) <= 1.01 * best


def test_a_choice_on_all_outputs_is_the_best_of_the_grid(monkeypatch):
    monkeypatch.setattr(heldout, "SKETCH", O)
    for seed in range(5):
        each = site(seed)
        (found,) = fit_each([each], **SETTINGS)
        best, error = least_error(each)
        assert error(found.alpha, found.drift_correction) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("tokens", "noise", "edge"), [(60, 0.0, 1e-5), (12, 20.0, 1.0)])
def test_the_search_reaches_both_ends_of_the_grid(tokens, noise, edge):
    # Noise in what is predicted by few tokens asks for a strong ridge, exact sums for a weak one.
    generator = torch.Generator().manual_seed(0)
    grams, weight = [grail.Gram(H), grail.Gram(H)], torch.randn(O, H, generator=generator)
    mixing = torch.randn(K, H - K, generator=generator)
    for gram, count in zip(grams, (tokens, 400), strict=True):
        kept = torch.randn(count, K, generator=generator)
        drift = noise * torch.randn(count, O, generator=generator)
        gram.update(torch.cat([kept, kept @ mixing], 1), drift=drift)
    found = grail.fit(grams[0], range(K), weight, held_out=grams[1], drift_correction=1.0)
    assert found.alpha == edge


def test_the_signs_of_a_sketch_are_fixed():
    one, same = (heldout.mixing(100, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one, same)
    assert one.abs().eq(1).all()
    assert one.shape == (heldout.SKETCH, 100)
    assert heldout.mixing(2 * heldout.SKETCH, torch.device("cpu")) is None
