import inspect
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import grail
from bench.tools.allocations import peak_bytes
from grail.algebra import ridge
from grail.algebra._fit import peak_bytes as predicted_peak
from grail.algebra.heldout import ALPHAS
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


@pytest.fixture
def drift() -> torch.Tensor:
    return torch.randn(TOKENS, O, generator=torch.Generator().manual_seed(3))


def drifting(x: torch.Tensor, drift: torch.Tensor) -> grail.Gram:
    gram = grail.Gram(H)
    gram.update(x, drift=drift)
    return gram


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("toward", ["zero", "baseline"])
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_a_consumer_aims_at_its_output_and_a_share_of_the_drift(
    x, weight, drift, reduction, toward, beta
):
    fit = grail.fit(
        drifting(x, drift), reduction, weight, alpha=0.05, toward=toward, drift_correction=beta
    )
    data, r, w = x.double(), torch.from_numpy(maps(reduction)), weight.double()
    narrow, plain = data @ r.T, reduction.absorb(w)
    shrunk = plain if toward == "baseline" else torch.zeros_like(plain)
    normal = narrow.T @ narrow
    damped = normal + 0.05 * normal.diagonal().mean() * torch.eye(len(r))
    target = data @ w.T + beta * drift.double()
    expected = shrunk + (target - narrow @ shrunk.T).T @ narrow @ torch.linalg.inv(damped)
    # fp32 sums (1e-6) through a system of condition < 100.
    torch.testing.assert_close(fit.weight.double(), expected, rtol=1e-4, atol=1e-4)
    # Both errors are those from the dense stream, whatever share was undone.
    full = data @ w.T + drift.double()
    for error, used in ((fit.error, fit.weight.double()), (fit.baseline_error, plain)):
        assert error == pytest.approx(
            ((full - narrow @ used.T).norm() / full.norm()).item(), rel=1e-4
        )


def test_a_site_that_keeps_all_its_channels_can_undo_drift(x, weight, drift):
    everything = grail.Selection(range(H), H)
    fit = grail.fit(
        drifting(x, drift),
        everything,
        weight,
        alpha=0.0,
        toward="baseline",
        drift_correction=1.0,
    )
    expected = weight.T.double() + torch.linalg.lstsq(x.double(), drift.double()).solution
    torch.testing.assert_close(fit.weight.double(), expected.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("toward", ["zero", "baseline"])
def test_what_is_auto_has_the_least_error_on_the_held_out_tokens(
    x, weight, drift, reduction, toward
):
    signal = x @ torch.randn(H, O, generator=torch.Generator().manual_seed(4))
    drift = drift + 0.2 * signal
    train, held = slice(0, 30), slice(30, TOKENS)
    grams = drifting(x[train], drift[train]), drifting(x[held], drift[held])
    fit = grail.fit(
        grams[0],
        reduction,
        weight,
        alpha="auto",
        drift_correction="auto",
        toward=toward,
        held_out=grams[1],
    )
    r = torch.from_numpy(maps(reduction))
    seen, wanted = x[held].double() @ r.T, x[held].double() @ weight.T.double() + drift[held]

    def error(alpha: float, beta: float) -> float:
        only = grail.fit(
            grams[0], reduction, weight, alpha=alpha, drift_correction=beta, toward=toward
        )
        return (wanted - seen @ only.weight.double().T).square().sum().item()

    tried = {
        (a, b): error(a, b) for a in ALPHAS for b in torch.linspace(0, 1, 11, dtype=float).tolist()
    }
    # The grid's best is no better, but for the rounding of the weights to fp32.
    assert error(fit.alpha, fit.drift_correction) <= min(tried.values()) * (1 + 1e-5)
    assert 0 < fit.drift_correction <= 1
    # All tokens then join the fit.
    both = grail.fit(
        drifting(x, drift),
        reduction,
        weight,
        alpha=fit.alpha,
        drift_correction=fit.drift_correction,
        toward=toward,
    )
    torch.testing.assert_close(fit.weight, both.weight, rtol=1e-3, atol=1e-4)
    assert (fit.error, fit.baseline_error) == pytest.approx(
        (both.error, both.baseline_error), rel=1e-4
    )


@pytest.mark.parametrize(
    "given", [{"alpha": 0.1}, {"drift_correction": 0.7}, {"alpha": 0.1, "drift_correction": 0.7}]
)
def test_what_is_given_is_never_chosen_anew(x, weight, drift, given):
    train, held = drifting(x[:9], drift[:9]), drifting(-x[9:].flip(1), drift[9:])
    settings = {"alpha": "auto", "drift_correction": "auto", **given}
    fit = grail.fit(train, SELECTION, weight, toward="baseline", held_out=held, **settings)
    assert {name: getattr(fit, name) for name in given} == given


def test_a_weight_beyond_its_dtype_is_refused(x):
    x = x.clone()
    x[:, 1] *= 1e-4  # kept, and so quiet that its weight must be huge
    weight = 100 * torch.ones(O, H, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"rewritten weight of a site, in torch\.float16"):
        grail.fit(gram_of(x), SELECTION, weight, alpha=0.0)


def test_where_nothing_holds_on_other_tokens_plain_pruning_stays(weight):
    # Calibration says that channel 0 tells of channel 1; the held-out tokens say the opposite.
    train, held = torch.eye(H), torch.eye(H)
    train[1, 0], held[1, 0] = 1.0, -1.0
    selection = grail.Selection([c for c in range(H) if c != 1], H)
    fit = grail.fit(
        gram_of(train), selection, weight, alpha="auto", toward="baseline", held_out=gram_of(held)
    )
    assert torch.equal(fit.weight, selection.absorb(weight))
    assert fit.alpha == float("inf")


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
        ({"weight": torch.ones(O, H, dtype=torch.int8)}, "floating point; got torch.int8"),
        ({"weight": []}, "at least one consumer"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"toward": "nowhere"}, "zero, baseline"),
        ({"fit_bias": "yes"}, "fit_bias must be True or False; got str"),
        ({"drift_correction": 1.5}, r"share in \[0, 1\]"),
        ({"held_out": gram_of(torch.ones(3, H + 1))}, "12 channels, the Gram 12, 13"),
        (
            {"gram": drifting(torch.ones(3, H), torch.ones(3, O + 1))},
            "drift of 6 outputs, the consumers have 5",
        ),
    ],
    ids=[
        "reduction",
        "weight",
        "vector",
        "integers",
        "none",
        "negative",
        "nan",
        "toward",
        "fit_bias",
        "correction",
        "held out",
        "drift",
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, weight, change, message):
    arguments = {"gram": gram_of(x), "reduction": SELECTION, "weight": weight, **change}
    with pytest.raises(InputError, match=message):
        grail.fit(**arguments)


@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
def test_without_held_out_tokens_automatic_settings_are_those_of_a_run(x, weight, drift):
    gram = drifting(x, torch.ones(len(x), O)) if drift else gram_of(x)
    found = grail.fit(gram, SELECTION, weight)
    assert (found.alpha, found.drift_correction) == (1e-3, 0.0)
    given = grail.fit(gram, SELECTION, weight, alpha=1e-3, toward="baseline", drift_correction=0.0)
    assert torch.equal(found.weight, given.weight)


def test_a_fit_has_the_defaults_of_a_recipe():
    defaults = {name: p.default for name, p in inspect.signature(grail.fit).parameters.items()}
    recipe = vars(grail.Recipe())
    shared = defaults.keys() & recipe.keys()
    assert shared == {"compensate", "fit_bias", "alpha", "toward", "drift_correction"}
    assert {name: defaults[name] for name in shared} == {name: recipe[name] for name in shared}


def test_a_non_finite_weight_is_located(x, weight):
    weight[2, 7] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        grail.fit(gram_of(x), SELECTION, weight)
    assert caught.value.channels == (7,)


def test_only_the_dropped_rows_are_multiplied():
    channels, outputs = 64, 40
    gram, weight = gram_of(torch.randn(100, channels)), torch.randn(outputs, channels)
    reduction = grail.Selection(range(0, channels, 4), channels)
    k, d = reduction.kept, channels - reduction.kept

    def halved(size):  # by 4 panels
        return 2 * outputs * size * size * 5 // 8

    with FlopCounterMode(display=False) as counter:
        grail.fit(gram, reduction, weight, compensate=False)
    # Beside V G Rᵀ, an operator of the kernels, which this does not look into.
    products = halved(d) + halved(k)
    # The rest are sums over the elements of such products.
    assert products <= counter.get_total_flops() <= products + 20 * outputs * channels


def test_whichever_order_costs_less_gives_the_same_weight(x, monkeypatch):
    weight, few = torch.randn(40, H), grail.Selection(list(range(1, H)), H)
    rows = []
    attempt = ridge.attempt
    monkeypatch.setattr(
        ridge,
        "attempt",
        lambda a, right, *rest, **named: (
            rows.append(right.shape[1]) or attempt(a, right, *rest, **named)
        ),
    )
    many = grail.Selection(list(range(5)), H)
    for reduction, right in ((few, H - few.kept), (many, len(weight))):
        g, r = x.double().T @ x.double(), torch.from_numpy(maps(reduction))
        a = r @ g @ r.T
        plain = reduction.absorb(weight.double())
        target = weight.double() @ g @ r.T - plain @ a
        lam = 0.1 * a.diagonal().mean()
        expected = plain + target @ torch.linalg.inv(a + lam * torch.eye(len(a)))
        fit = grail.fit(gram_of(x), reduction, weight, alpha=0.1, toward="baseline")
        torch.testing.assert_close(fit.weight, expected.float(), rtol=1e-4, atol=1e-4)
        assert rows.pop() == right


@pytest.mark.parametrize("outputs", [40, 600])
@pytest.mark.parametrize("kept", [100, 300, 350])
@pytest.mark.parametrize("folding", [False, True], ids=["selection", "folding"])
@pytest.mark.parametrize("drift", [False, True], ids=["", "drift"])
@pytest.mark.parametrize("held_out", [False, True], ids=["", "held out"])
@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
def test_the_predicted_memory_is_what_torch_allocates(
    affine, held_out, drift, folding, kept, outputs
):
    h = 400
    # A few directions of which there is much to predict, so that some ridge beats pruning.
    grams, mixing = [grail.Gram(h), grail.Gram(h)], torch.randn(60, h)
    for gram in grams:
        x = torch.randn(500, 60) @ mixing
        gram.update(x, drift=x[:, :1].expand(-1, outputs) if drift else None)
    index = [i % kept for i in range(h)]
    reduction = grail.Folding(index) if folding else grail.Selection(range(kept), h)
    weight = torch.randn(outputs, h)
    chosen = {"alpha": "auto", "held_out": grams[1]} if held_out else {}
    used = peak_bytes(
        lambda: grail.fit(
            grams[0],
            reduction,
            weight,
            toward="baseline",
            fit_bias=affine,
            drift_correction=("auto" if held_out else 0.5) if drift else 0.0,
            **chosen,
        )
    )
    predicted = predicted_peak(
        h, kept, outputs, folding=folding, drift=drift, held_out=held_out, affine=affine
    )
    # The rest are vectors of H.
    assert used == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("sizes", [(300, 900, 200), (512, 100, 500)], ids=str)
def test_the_predicted_memory_follows_the_dtype_of_the_weights(sizes, dtype):
    channels, outputs, kept = sizes
    gram = grail.Gram(channels)
    gram.update(torch.randn(700, channels))
    weight = torch.randn(outputs, channels).to(dtype)
    used = peak_bytes(lambda: grail.fit(gram, range(kept), weight, toward="baseline"))
    predicted = predicted_peak(channels, kept, outputs, weight_bytes=weight.element_size())
    assert used == pytest.approx(predicted, rel=0.1)


class Mixing(grail.Reduction):
    """Any dense map [K, H]: none that the fit could know of."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, (self.kept, self.channels) = matrix, matrix.shape

    def narrow(self, weight):
        return self.matrix.to(weight) @ weight

    def restrict(self, columns):
        return columns @ self.matrix.to(columns).T

    def absorb(self, weight):
        return weight @ torch.linalg.pinv(self.matrix).to(weight)

    def lift(self, columns):
        return columns @ self.matrix.to(columns)

    def repeat(self, times):
        raise NotImplementedError


MIXING = Mixing(torch.randn(4, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
EVERY_REDUCTION = [*REDUCTIONS, pytest.param(MIXING, id="another kind")]


@pytest.fixture
def integers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens with means, their drift and a weight, of integers: fp32 sums of them are exact.

    What is left is fp64's rounding, amplified by a condition of < 1e4: the tolerance is 1e-9.
    """
    generator = torch.Generator().manual_seed(6)
    mixing = torch.randint(-1, 2, (H, H), generator=generator)
    means = torch.randint(-5, 6, (H,), generator=generator)
    x = torch.randint(-3, 4, (TOKENS, H), generator=generator) @ mixing + means
    noise = torch.randint(-20, 29, (TOKENS, O), generator=generator)
    weight = torch.randn(O, H, generator=generator, dtype=torch.float64)
    return x.float(), (x[:, :O] + noise).float(), weight


def affine_on_tokens(x, drift, weight, reduction, alpha, toward):
    """W' [O, K] and b [O] from centred tokens and the normal equations, in fp64."""
    narrow = x.double() @ torch.from_numpy(maps(reduction)).T
    plain = reduction.absorb(weight)
    target = x.double() @ weight.T + drift.double()
    still = narrow - narrow.mean(0)
    normal = still.T @ still
    identity = torch.eye(reduction.kept, dtype=torch.float64)
    ridge_matrix = alpha * normal.diagonal().mean() * identity
    shrunk = plain if toward == "baseline" else torch.zeros_like(plain)
    rest = target - narrow @ shrunk.T
    change = torch.linalg.solve(normal + ridge_matrix, still.T @ (rest - rest.mean(0))).T
    narrowed = shrunk + change
    return narrowed, (target - narrow @ narrowed.T).mean(0)


def relative_error(x, drift, weight, reduction, narrowed, shift):
    target = x.double() @ weight.T + drift.double()
    narrow = x.double() @ torch.from_numpy(maps(reduction)).T
    return ((target - narrow @ narrowed.T - shift).norm() / target.norm()).item()


@pytest.mark.parametrize("reduction", EVERY_REDUCTION)
def test_an_undamped_affine_fit_is_least_squares_with_an_intercept(integers, reduction):
    x, _, weight = integers
    narrow = x.double().numpy() @ maps(reduction).T
    columns = np.concatenate([narrow, np.ones((TOKENS, 1))], 1)
    expected, *_ = np.linalg.lstsq(columns, x.double().numpy() @ weight.numpy().T, rcond=None)
    for toward in ("zero", "baseline"):
        fit = grail.fit(gram_of(x), reduction, weight, alpha=0.0, toward=toward, fit_bias=True)
        np.testing.assert_allclose(fit.weight.numpy(), expected[:-1].T, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(fit.shifts[0].numpy(), expected[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", EVERY_REDUCTION)
@pytest.mark.parametrize("toward", ["zero", "baseline"])
@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_an_affine_fit_is_the_ridge_of_centred_tokens(integers, reduction, toward, beta):
    x, drift, weight = integers
    fit = grail.fit(
        drifting(x, drift),
        reduction,
        weight,
        alpha=0.05,
        toward=toward,
        fit_bias=True,
        drift_correction=beta,
    )
    expected = affine_on_tokens(x, beta * drift.double(), weight, reduction, 0.05, toward)
    torch.testing.assert_close(fit.weight, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.shifts[0], expected[1], rtol=1e-9, atol=1e-9)
    assert fit.retries == 0
    # Both errors are those from the dense stream; the baseline has no bias.
    for error, used in ((fit.error, expected), (fit.baseline_error, (reduction.absorb(weight), 0))):
        on_tokens = relative_error(x, drift, weight, reduction, *used)
        assert error == pytest.approx(on_tokens, rel=1e-9)


def test_the_order_for_few_lost_channels_centres_as_well(integers):
    x, _, _ = integers
    weight = torch.randn(40, H, dtype=torch.float64)
    few = grail.Selection(list(range(1, H)), H)
    nothing = torch.zeros(TOKENS, 40)
    fit = grail.fit(gram_of(x), few, weight, alpha=0.1, toward="baseline", fit_bias=True)
    expected = affine_on_tokens(x, nothing, weight, few, 0.1, "baseline")
    torch.testing.assert_close(fit.weight, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.shifts[0], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", EVERY_REDUCTION)
def test_a_bias_alone_makes_up_for_the_mean_of_what_is_lost(integers, reduction):
    x, _, weight = integers
    plain, r = reduction.absorb(weight), torch.from_numpy(maps(reduction))
    lost = x.double() @ (weight - plain @ r).T
    fit = grail.fit(gram_of(x), reduction, weight, compensate=False, fit_bias=True)
    torch.testing.assert_close(fit.weight, plain, rtol=0, atol=0)
    torch.testing.assert_close(fit.shifts[0], lost.mean(0), rtol=1e-9, atol=1e-9)
    nothing = torch.zeros(TOKENS, O)
    for error, shift in ((fit.error, fit.shifts[0]), (fit.baseline_error, 0)):
        on_tokens = relative_error(x, nothing, weight, reduction, plain, shift)
        assert error == pytest.approx(on_tokens, rel=1e-9)
    # An infinite ridge is the same; 1e15 leaves of the correction less than fp64's rounding.
    limit = grail.fit(gram_of(x), reduction, weight, alpha=1e15, toward="baseline", fit_bias=True)
    torch.testing.assert_close(limit.weight, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(limit.shifts[0], fit.shifts[0], rtol=1e-9, atol=1e-9)


def test_a_bias_alone_is_flaps(integers):
    x, _, weight = integers
    dropped = np.setdiff1d(np.arange(H), SELECTION.index.numpy())
    # Its released code: the mean input of the lost channels, through their weights.
    expected = (x.double().mean(0)[dropped] * weight[:, dropped]).sum(1)
    fit = grail.fit(gram_of(x), SELECTION, weight, compensate=False, fit_bias=True)
    torch.testing.assert_close(fit.shifts[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("toward", ["zero", "baseline"])
def test_what_is_auto_has_the_least_error_on_the_held_out_tokens_with_a_bias_too(
    integers, reduction, toward
):
    x, drift, weight = integers
    train, held = slice(0, 30), slice(30, TOKENS)
    settings = {"toward": toward, "fit_bias": True}
    chosen = {"alpha": "auto", "drift_correction": "auto"}
    fit = grail.fit(
        drifting(x[train], drift[train]),
        reduction,
        weight,
        held_out=drifting(x[held], drift[held]),
        **settings,
        **chosen,
    )

    def error(alpha: float, beta: float) -> float:
        narrowed = affine_on_tokens(
            x[train], beta * drift[train].double(), weight, reduction, alpha, toward
        )
        return relative_error(x[held], drift[held], weight, reduction, *narrowed)

    tried = [error(a, b) for a in ALPHAS for b in np.linspace(0, 1, 21).tolist()]
    # The grid's best is no better, but for fp64's rounding.
    assert error(fit.alpha, fit.drift_correction) <= min(tried) * (1 + 1e-9)
    assert 0 < fit.drift_correction < 1
    # All tokens then join the fit, centred by their common mean.
    beta = fit.drift_correction
    both = affine_on_tokens(x, beta * drift.double(), weight, reduction, fit.alpha, toward)
    torch.testing.assert_close(fit.weight, both[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.shifts[0], both[1], rtol=1e-8, atol=1e-8)
    assert fit.error == pytest.approx(relative_error(x, drift, weight, reduction, *both), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_where_no_weight_holds_on_other_tokens_a_bias_may(weight, beta):
    # Channel 1 goes with channel 0 here and against it there, about one and the same mean.
    train, held = torch.ones(H, H) + 2 * torch.eye(H), torch.ones(H, H) + 2 * torch.eye(H)
    train[1, 0], held[1, 0] = 3.0, -1.0
    selection = grail.Selection([c for c in range(H) if c != 1], H)
    fit = grail.fit(
        drifting(train, torch.ones(H, O)),
        selection,
        weight,
        alpha="auto",
        toward="baseline",
        fit_bias=True,
        drift_correction=beta,
        held_out=drifting(held, torch.ones(H, O)),
    )
    assert torch.equal(fit.weight, selection.absorb(weight))
    assert (fit.alpha, fit.drift_correction) == (float("inf"), beta)
    mean = torch.cat([train, held]).mean(0)[1]
    # Inputs are fp32.
    torch.testing.assert_close(fit.shifts[0].float(), weight[:, 1] * mean + beta)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_a_constant_channel_says_no_more_than_a_silent_one(integers, alpha):
    x, _, weight = integers
    settings = {"alpha": alpha, "toward": "baseline", "fit_bias": True}
    constant, silent = x / 7, x / 7  # not exact: centring leaves rounding of the constant
    constant[:, 4], silent[:, 4] = 1234.567, 0.0
    fits = [grail.fit(gram_of(t), SELECTION, weight, **settings) for t in (constant, silent)]
    # fp32 sums (1e-6) through a system of condition < 1e3.
    torch.testing.assert_close(fits[0].weight, fits[1].weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(fits[0].weight[:, 1], weight[:, 4])
    assert (alpha > 0) == (fits[0].retries == 0) == (fits[1].retries == 0)


@pytest.mark.parametrize("toward", ["zero", "baseline"])
def test_one_token_is_rebuilt_by_the_bias(x, weight, toward):
    fit = grail.fit(gram_of(x[:1]), SELECTION, weight, alpha=0.0, toward=toward, fit_bias=True)
    assert torch.equal(fit.weight, weight[:, SELECTION.index])
    # Squared errors carry the fp32 Gram's rounding of 1e-7.
    assert fit.error < 1e-3 < fit.baseline_error


def test_the_bias_takes_up_the_mean_error_of_rounding(integers):
    x, _, weight = integers
    fit = grail.fit(gram_of(x), SELECTION, weight.bfloat16(), alpha=0.1, fit_bias=True)
    narrow = x.double()[:, SELECTION.index]
    left = x.double() @ weight.bfloat16().double().T - narrow @ fit.weight.double().T
    torch.testing.assert_close(fit.shifts[0], left.mean(0), rtol=1e-9, atol=1e-9)


def test_each_consumer_has_its_own_shift(integers):
    x, _, weight = integers
    both = grail.fit(gram_of(x), SELECTION, [weight, weight[:2].float()], fit_bias=True)
    alone = grail.fit(gram_of(x), SELECTION, weight[:2].float(), fit_bias=True)
    assert [len(shift) for shift in both.shifts] == [O, 2]
    torch.testing.assert_close(both.shifts[1], alone.shifts[0], rtol=1e-9, atol=1e-9)


def test_a_site_that_keeps_all_its_channels_can_undo_drift_by_its_bias_too(integers):
    x, drift, weight = integers
    settings = {"alpha": 0.1, "toward": "baseline", "fit_bias": True}
    everything = grail.Selection(range(H), H)
    fit = grail.fit(drifting(x, drift), everything, weight, drift_correction=1.0, **settings)
    expected = affine_on_tokens(x, drift, weight, everything, 0.1, "baseline")
    torch.testing.assert_close(fit.weight, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.shifts[0], expected[1], rtol=1e-9, atol=1e-9)
    unchanged = grail.fit(gram_of(x), everything, weight, **settings)
    assert torch.equal(unchanged.shifts[0], torch.zeros(O, dtype=torch.float64))


def test_only_an_affine_fit_has_shifts(x, weight):
    assert grail.fit(gram_of(x), SELECTION, weight).shifts is None


def test_an_automatic_ridge_may_choose_plain_pruning_beside_a_given_correction():
    generator = torch.Generator().manual_seed(0)
    train, held_out = grail.Gram(6), grail.Gram(6)
    x, drift = (torch.randn(7, n, generator=generator) for n in (6, 3))
    train.update(x, drift=50 * drift)
    held_out.update(x, drift=-50 * drift)  # so that a correction makes everything worse
    weight = torch.randn(3, 6, generator=generator)
    everything = grail.Selection(range(6), 6)
    found = grail.fit(
        train, everything, weight, alpha="auto", drift_correction=1.0, held_out=held_out
    )
    assert (found.alpha, found.drift_correction) == (math.inf, 1.0)
    assert torch.equal(found.weight, weight)
