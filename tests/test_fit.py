import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import grail
from bench.allocations import peak_bytes
from grail import ridge
from grail.errors import InputError, NonFiniteError
from grail.fit import peak_bytes as predicted_peak
from grail.heldout import ALPHAS

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
        ({"weight": []}, "at least one consumer"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"toward": "nowhere"}, "zero, baseline"),
        ({"drift_correction": 1.5}, r"share in \[0, 1\]"),
        ({"alpha": "auto"}, "needs held_out"),
        ({"drift_correction": "auto"}, "needs held_out"),
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
        "none",
        "negative",
        "nan",
        "toward",
        "correction",
        "no choice",
        "no choice of correction",
        "held out",
        "drift",
    ],
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


def test_only_the_dropped_rows_are_multiplied(x, weight):
    k, d = SELECTION.kept, H - SELECTION.kept
    gram = gram_of(x)
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **rest: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        grail.fit(gram, SELECTION, weight, compensate=False)
    assert counter.get_total_flops() == 2 * O * d * H + 4 * O * k * k


def test_whichever_order_costs_less_gives_the_same_weight(x, monkeypatch):
    weight, few = torch.randn(40, H), grail.Selection(list(range(1, H)), H)
    rows = []
    solve = ridge.solve
    monkeypatch.setattr(
        ridge, "solve", lambda a, right, *rest: rows.append(len(right)) or solve(a, right, *rest)
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
def test_the_predicted_memory_is_what_torch_allocates(held_out, drift, folding, kept, outputs):
    h = 400
    grams = [grail.Gram(h), grail.Gram(h)]
    for gram in grams:
        gram.update(torch.randn(500, h), drift=torch.randn(500, outputs) if drift else None)
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
            drift_correction=("auto" if held_out else 0.5) if drift else 0.0,
            **chosen,
        )
    )
    predicted = predicted_peak(h, kept, outputs, folding=folding, drift=drift, held_out=held_out)
    # The rest are vectors of H.
    assert used == pytest.approx(predicted, rel=0.01)


def test_a_reduction_of_another_kind_is_refused(x, weight):
    class Other(grail.Selection.__base__):
        channels, kept = H, 1

        def narrow(self, weight):
            return weight[:1]

        def restrict(self, columns):
            return columns[..., :1]

        def absorb(self, weight):
            return weight[..., :1]

    with pytest.raises(InputError, match="a Selection or a Folding; got Other"):
        grail.fit(gram_of(x), Other(), weight)
