"""Guard text in a fit: chosen on, never fitted, and never worse than plain pruning."""

import math

import pytest
import torch

import grail
from bench.tools.allocations import peak_bytes
from grail.algebra._fit import FitSite, fit_each
from grail.algebra._fit import peak_bytes as predicted_peak
from grail.algebra.heldout import ALPHAS, GUARDED
from grail.errors import InputError

H, O, K = 12, 5, 6
SELECTION = grail.Selection([1, 4, 5, 8, 9, 10], H)
FOLDING = grail.Folding([0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 5, 1])
REDUCTIONS = [pytest.param(SELECTION, id="selection"), pytest.param(FOLDING, id="folding")]
# Relative to the errors: fp32 Grams carry 1e-6, rounded weights less.
TOLERANCE = 1e-4


class Texts:
    """Tokens x and drifts of three sets, of which the guard's is of a share `other` another kind.

    `fitted`, `held_out`, `guard`: pairs of x [T, H] and drift [T, O].
    """

    def __init__(self, seed: int, other: float, form: str = "drift"):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        mixings, slopes = (draw(2, H, H), draw(2, H, O))
        self.weight, self._form = draw(O, H), form
        pairs = []
        for count, share in ((60, 0.0), (40, 0.0), (80, other)):
            x = draw(count, H) @ ((1 - share) * mixings[0] + share * mixings[1])
            drift = 0.3 * x @ ((1 - share) * slopes[0] + share * slopes[1]) + draw(count, O)
            pairs.append((x, drift + 0.5))
        self.fitted, self.held_out, self.guard = pairs

    def gram(self, *names: str) -> grail.Gram:
        gram = grail.Gram(H)
        for name in names:
            x, drift = getattr(self, name)
            if self._form == "none":
                gram.update(x)
            elif self._form == "target":
                gram.update(x, target=x @ self.weight.T + drift)
            else:
                gram.update(x, drift=drift)
        return gram

    def error(self, name: str, reduction: grail.Reduction, fit: grail.Fit | None = None) -> float:
        """The squared error on a set, from its tokens; of plain reduction without a fit."""
        x, drift = (tensor.double() for tensor in getattr(self, name))
        weight, shift = reduction.absorb(self.weight.double()), 0.0
        if fit is not None:
            weight = fit.weight.double()
            shift = 0.0 if fit.shifts is None else fit.shifts[0]
        target = x @ self.weight.double().T + (0 if self._form == "none" else drift)
        return (target - reduction.restrict(x) @ weight.T - shift).square().sum().item()


def fitted(texts: Texts, reduction: grail.Reduction, **settings) -> grail.Fit:
    grams = {"held_out": texts.gram("held_out"), "guard": texts.gram("guard"), **settings}
    return grail.fit(texts.gram("fitted"), reduction, texts.weight, **grams)


@pytest.mark.parametrize("form", ["drift", "target", "none"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("seed", "other"), [(0, 0.1), (1, 0.3), (2, 0.5), (3, 1.0)])
def test_the_choice_is_the_best_of_the_grid_that_is_not_worse_than_plain_on_either(
    seed, other, reduction, form
):
    texts = Texts(seed, other, form)
    plain = [texts.error(name, reduction) for name in ("held_out", "guard")]
    shares = [0.0] if form == "none" else torch.linspace(0, 1, 21, dtype=torch.float64).tolist()
    tried = {(math.inf, 0.0): (1.0, 1.0)}
    for alpha in (*ALPHAS, *GUARDED):
        for share in shares:
            fit = grail.fit(
                texts.gram("fitted"), reduction, texts.weight, alpha=alpha, drift_correction=share
            )
            errors = [texts.error(name, reduction, fit) for name in ("held_out", "guard")]
            relative = tuple(own / least for own, least in zip(errors, plain, strict=True))
            if max(relative) <= 1:
                tried[alpha, share] = relative
    found = fitted(texts, reduction)
    if math.isinf(found.alpha):
        chosen = (1.0, 1.0)
    else:
        same = {"alpha": found.alpha, "drift_correction": found.drift_correction}
        alone = grail.fit(texts.gram("fitted"), reduction, texts.weight, **same)
        errors = [texts.error(name, reduction, alone) for name in ("held_out", "guard")]
        chosen = tuple(own / least for own, least in zip(errors, plain, strict=True))
    assert max(chosen) <= 1 + TOLERANCE
    assert sum(chosen) <= min(map(sum, tried.values())) + TOLERANCE


@pytest.mark.parametrize("fit_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("toward", ["baseline", "zero"])
def test_no_result_is_worse_than_plain_on_fitted_tokens_or_guard(
    toward, reduction, dtype, fit_bias
):
    worse, rounding = 0, 1e-2 if isinstance(reduction, grail.Folding) else 0.0
    for seed in range(12):
        texts = Texts(seed, other=seed / 12)
        texts.weight = texts.weight.to(dtype).float()
        weight, grams = texts.weight.to(dtype), (texts.gram("fitted"), texts.gram("held_out"))
        settings = {"fit_bias": fit_bias, "toward": toward, "held_out": grams[1]}
        found = grail.fit(grams[0], reduction, weight, guard=texts.gram("guard"), **settings)
        # A folding rounds the weights of plain reduction, too.
        rounded = reduction.absorb(weight.double()).to(dtype)
        before = max(
            texts.error("guard", reduction), texts.error("guard", reduction, plainly(rounded))
        )
        assert texts.error("guard", reduction, found) <= before * (1 + TOLERANCE)
        assert found.guard_error**2 <= found.guard_baseline_error**2 * (1 + rounding)
        assert found.error**2 <= found.baseline_error**2 * (1 + rounding)
        alone = grail.fit(grams[0], reduction, weight, **settings)
        worse += texts.error("guard", reduction, alone) > before * (1 + TOLERANCE)
    assert worse  # without the guard some are


def plainly(weight: torch.Tensor) -> grail.Fit:
    return grail.Fit((weight,), 0.0, 0.0, math.inf, 0.0, 0.0, 0)


@pytest.mark.parametrize("fit_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", ["drift", "target", "none"])
def test_errors_on_the_guard_are_those_of_its_tokens(form, fit_bias):
    texts = Texts(5, 0.2, form)
    found = fitted(texts, SELECTION, fit_bias=fit_bias)
    assert found.alpha < math.inf
    x, drift = (tensor.double() for tensor in texts.guard)
    total = x @ texts.weight.double().T + (0 if form == "none" else drift)
    norm = total.square().sum().item()
    for error, squared in (
        (found.guard_error, texts.error("guard", SELECTION, found)),
        (found.guard_baseline_error, texts.error("guard", SELECTION)),
    ):
        assert error == pytest.approx(math.sqrt(squared / norm), rel=TOLERANCE)


def test_the_guard_is_never_fitted():
    texts = Texts(4, 0.1)
    found = fitted(texts, SELECTION)
    assert found.guard_share == 1
    same = {"alpha": found.alpha, "drift_correction": found.drift_correction}
    alone = grail.fit(texts.gram("fitted", "held_out"), SELECTION, texts.weight, **same)
    torch.testing.assert_close(found.weight, alone.weight, rtol=1e-4, atol=1e-5)
    assert (found.error, found.baseline_error) == pytest.approx(
        (alone.error, alone.baseline_error), rel=TOLERANCE
    )


@pytest.mark.parametrize(("seed", "other"), [(24, 0.3), (25, 0.5)])
def test_a_share_of_the_change_stays_where_the_held_out_tokens_turn_the_fit_against_the_guard(
    seed, other
):
    # Once held-out tokens have joined the fit, its error on the guard is another.
    texts = Texts(seed, other, "none")
    found = fitted(texts, SELECTION)
    whole = grail.fit(texts.gram("fitted", "held_out"), SELECTION, texts.weight, alpha=found.alpha)
    plain = texts.error("guard", SELECTION)
    assert texts.error("guard", SELECTION, whole) > plain
    assert 0 < found.guard_share < 1
    pruned = SELECTION.absorb(texts.weight)
    part = pruned + found.guard_share * (whole.weight - pruned)
    torch.testing.assert_close(found.weight, part, rtol=1e-4, atol=1e-5)
    # So much stays that the guard is not worse, and not much less.
    assert 0.98 * plain < texts.error("guard", SELECTION, found) <= plain


def test_a_guard_chooses_alone_where_nothing_is_held_out():
    texts = Texts(0, 0.0)
    found = fitted(texts, SELECTION, held_out=None)
    swapped = grail.fit(texts.gram("fitted"), SELECTION, texts.weight, held_out=texts.gram("guard"))
    assert (found.alpha, found.drift_correction) == (swapped.alpha, swapped.drift_correction)
    assert found.guard_error <= found.guard_baseline_error


def test_sites_with_and_without_a_guard_are_fitted_together_as_alone():
    cases = [Texts(seed, 0.2) for seed in range(4)]
    sites = [
        FitSite(
            texts.gram("fitted"),
            SELECTION,
            (texts.weight,),
            texts.gram("held_out"),
            guard=texts.gram("guard") if number % 2 else None,
        )
        for number, texts in enumerate(cases)
    ]
    settings = {
        "fit_bias": False, "alpha": "auto", "toward": "baseline", "drift_correction": "auto",
    }  # fmt: skip
    together = fit_each(sites, **settings)
    for site, found in zip(sites, together, strict=True):
        (alone,) = fit_each([site], **settings)
        torch.testing.assert_close(found.weight, alone.weight, rtol=1e-5, atol=1e-6)
        assert (found.guard_error is None) == (site.guard is None)
        assert found.alpha == alone.alpha


@pytest.mark.parametrize("outputs", [40, 600])
@pytest.mark.parametrize("folding", [False, True], ids=["selection", "folding"])
@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize("held_out", [False, True], ids=["", "held out"])
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
def test_the_predicted_memory_is_what_torch_allocates(affine, held_out, drift, folding, outputs):
    h, kept = 400, 300
    generator = torch.Generator().manual_seed(0)
    grams, mixing = [grail.Gram(h) for _ in range(3)], torch.randn(60, h, generator=generator)
    for gram in grams:
        x = torch.randn(500, 60, generator=generator) @ mixing
        gram.update(x, drift=x[:, :1].expand(-1, outputs) if drift else None)
    reduction = grail.Selection(range(kept), h)
    if folding:
        reduction = grail.Folding([i % kept for i in range(h)])
    weight = torch.randn(outputs, h, generator=generator)
    others = {"guard": grams[2], "held_out": grams[1] if held_out else None}
    used = peak_bytes(lambda: grail.fit(grams[0], reduction, weight, fit_bias=affine, **others))
    predicted = predicted_peak(
        h, kept, outputs, folding=folding, drift=drift, held_out=held_out, affine=affine, guard=True
    )
    # The rest are vectors of H.
    assert used == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "given"),
    [({"alpha": 0.1}, "alpha=0.1"), ({"compensate": False}, "compensate=False")],
)
def test_a_guard_with_nothing_to_choose_is_refused(settings, given):
    with pytest.raises(InputError, match=f"which {given} gives already"):
        fitted(Texts(0, 0.0), SELECTION, **settings)


def test_a_guard_of_another_site_is_refused():
    texts = Texts(0, 0.0)
    other = grail.Gram(H + 1)
    other.update(torch.ones(3, H + 1))
    with pytest.raises(InputError, match="12 channels, the Gram 12, 12, 13"):
        fitted(texts, SELECTION, guard=other)
    with pytest.raises(InputError, match=r"guard must be a grail\.Gram"):
        fitted(texts, SELECTION, guard=torch.eye(H))
