import numpy as np
import pytest
import torch

import grail
from grail.errors import InputError, NonFiniteError

H, O, TOKENS = 12, 5, 200
SELECTION = grail.Selection([1, 4, 5, 9, 10], H)
FOLDING = grail.Folding([0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 0, 1])
REDUCTIONS = [pytest.param(SELECTION, id="selection"), pytest.param(FOLDING, id="folding")]


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(H, H, generator=generator)
    return torch.randn(TOKENS, H, generator=generator) @ mixing


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(O, H, generator=torch.Generator().manual_seed(2))


def gram_of(*parts: torch.Tensor) -> grail.Gram:
    gram = grail.Gram(parts[0].shape[-1])
    for part in parts:
        gram.update(part)
    return gram


def maps(reduction: grail.Reduction) -> np.ndarray:
    return reduction.narrow(torch.eye(H, dtype=torch.float64)).numpy()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1.0])
def test_toward_zero_is_the_papers_closed_form(x, weight, reduction, alpha):
    g, w, r = x.double().numpy().T @ x.double().numpy(), weight.double().numpy(), maps(reduction)
    normal = r @ g @ r.T
    lam = alpha * np.diag(normal).mean()
    expected = w @ g @ r.T @ np.linalg.inv(normal + lam * np.eye(len(r)))
    fit = grail.fit(gram_of(x), reduction, weight, alpha=alpha, toward="zero")
    # The Gram is fp32: its relative error ~1e-7 is amplified by the condition of the damped system,
    # < 1e4 here.
    np.testing.assert_allclose(fit.weight.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert fit.damping == pytest.approx(lam, rel=1e-5)
    assert fit.retries == 0


def test_toward_baseline_of_a_selection_adds_a_correction_to_the_kept_columns(x, weight):
    g, w = x.double().numpy().T @ x.double().numpy(), weight.double().numpy()
    kept = SELECTION.index.numpy()
    dropped = np.setdiff1d(np.arange(H), kept)
    damped = g[np.ix_(kept, kept)] + 0.1 * np.diag(g)[kept].mean() * np.eye(len(kept))
    expected = w[:, kept] + w[:, dropped] @ g[np.ix_(dropped, kept)] @ np.linalg.inv(damped)
    fit = grail.fit(gram_of(x), SELECTION, weight, alpha=0.1, toward="baseline")
    np.testing.assert_allclose(fit.weight.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_damping_is_least_squares(x, weight, reduction):
    data = x.double().numpy()
    expected, *_ = np.linalg.lstsq(
        data @ maps(reduction).T, data @ weight.double().numpy().T, rcond=None
    )
    for toward in ("zero", "baseline"):
        fit = grail.fit(gram_of(x), reduction, weight, alpha=0.0, toward=toward)
        np.testing.assert_allclose(fit.weight.numpy(), expected.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_infinite_damping_is_plain_reduction_or_zero(x, weight, reduction):
    plain = reduction.absorb(weight)
    baseline = grail.fit(gram_of(x), reduction, weight, alpha=1e12, toward="baseline")
    torch.testing.assert_close(baseline.weight, plain)
    assert baseline.error == pytest.approx(baseline.baseline_error, rel=1e-6)
    zero = grail.fit(gram_of(x), reduction, weight, alpha=1e12, toward="zero")
    torch.testing.assert_close(zero.weight, torch.zeros_like(plain), atol=1e-9, rtol=0)
    plainly = grail.fit(gram_of(x), reduction, weight, compensate=False)
    assert torch.equal(plainly.weight, reduction.absorb(weight.double()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "reduction",
    [grail.Selection(list(range(H)), H), grail.Folding(list(range(H)))],
    ids=["selection", "folding"],
)
def test_keeping_everything_returns_the_weight_bit_for_bit(x, weight, reduction, dtype):
    fit = grail.fit(gram_of(x), reduction, weight.to(dtype), alpha=0.5, toward="zero")
    assert torch.equal(fit.weight, weight.to(dtype))
    assert fit.error == fit.baseline_error == 0


def test_uncorrelated_channels_cannot_help_each_other(weight):
    x = torch.diag(torch.arange(1.0, H + 1))  # G is diagonal
    fit = grail.fit(gram_of(x), SELECTION, weight, alpha=1e-3, toward="baseline")
    assert torch.equal(fit.weight, weight[:, SELECTION.index])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("toward", ["zero", "baseline"])
def test_both_errors_equal_the_errors_on_the_data(x, weight, reduction, toward):
    fit = grail.fit(gram_of(x), reduction, weight, alpha=0.05, toward=toward)
    data, r = x.double(), torch.from_numpy(maps(reduction))
    dense = data @ weight.double().T

    def error(narrow: torch.Tensor) -> float:
        return ((dense - data @ r.T @ narrow.double().T).norm() / dense.norm()).item()

    # Squared errors carry the fp32 Gram's relative error of ~1e-6.
    assert fit.error == pytest.approx(error(fit.weight), rel=1e-4)
    assert fit.baseline_error == pytest.approx(error(reduction.absorb(weight)), rel=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_nudge_improves_the_ridge_objective(x, weight, reduction):
    alpha = 0.01
    fit = grail.fit(gram_of(x), reduction, weight.double(), alpha=alpha, toward="baseline")
    data, r = x.double(), torch.from_numpy(maps(reduction))
    dense, narrow, plain = data @ weight.double().T, data @ r.T, reduction.absorb(weight.double())

    def objective(w: torch.Tensor) -> torch.Tensor:
        return (dense - narrow @ w.T).square().sum() + fit.damping * (w - plain).square().sum()

    best = objective(fit.weight)
    for seed in range(20):
        nudge = torch.randn(
            fit.weight.shape, generator=torch.Generator().manual_seed(seed)
        ).double()
        # A step this long costs far more than the fp32 Gram's rounding could hide.
        assert objective(fit.weight + 1e-2 * nudge) > best


def test_consumers_of_one_site_are_fitted_as_if_alone(x, weight):
    other = torch.randn(3, H)
    both = grail.fit(gram_of(x), SELECTION, [weight, other], alpha=1e-2)
    for together, alone in zip(both.weights, (weight, other), strict=True):
        torch.testing.assert_close(
            together, grail.fit(gram_of(x), SELECTION, alone, alpha=1e-2).weight
        )
    with pytest.raises(InputError, match="2 consumers"):
        _ = both.weight


def test_repeating_the_data_changes_nothing(x, weight):
    # λ is relative to the diagonal, so [X, X] at 2λ is the same problem.
    once = grail.fit(gram_of(x), SELECTION, weight, alpha=0.1)
    twice = grail.fit(gram_of(x, x), SELECTION, weight, alpha=0.1)
    torch.testing.assert_close(once.weight, twice.weight)


def test_a_16_bit_weight_is_rounded_once(x, weight):
    exact = grail.fit(gram_of(x), SELECTION, weight.bfloat16().double(), alpha=0.1)
    rounded = grail.fit(gram_of(x), SELECTION, weight.bfloat16(), alpha=0.1)
    assert rounded.weight.dtype == torch.bfloat16
    assert torch.equal(rounded.weight, exact.weight.bfloat16())


def test_dead_channels_leave_plain_pruning(weight):
    fit = grail.fit(gram_of(torch.zeros(9, H)), SELECTION, weight, alpha=0.0)
    assert torch.equal(fit.weight, weight[:, SELECTION.index])
    assert fit.error == fit.baseline_error == 0


def test_fewer_tokens_than_channels_and_duplicated_channels_stay_finite(weight):
    x = torch.randn(3, H)
    x[:, 4] = x[:, 1]
    fit = grail.fit(gram_of(x), SELECTION, weight, alpha=0.0)
    assert fit.weight.isfinite().all()
    assert fit.error <= fit.baseline_error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": grail.Selection([0], H + 1)}, "13 channels, the Gram 12"),
        ({"weight": torch.ones(O, H + 1)}, r"\[O, 12\]"),
        ({"weight": torch.ones(H)}, r"\[O, 12\]"),
        ({"weight": []}, "at least one consumer"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"toward": "nowhere"}, "zero, baseline"),
    ],
    ids=["reduction", "weight", "vector", "none", "negative", "nan", "toward"],
)
def test_arguments_that_do_not_fit_are_refused(x, weight, change, message):
    arguments = {"gram": gram_of(x), "reduction": SELECTION, "weight": weight, **change}
    with pytest.raises(InputError, match=message):
        grail.fit(**arguments)


def test_a_non_finite_weight_is_located(x, weight):
    weight[2, 7] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        grail.fit(gram_of(x), SELECTION, weight)
    assert caught.value.channels == (7,)
