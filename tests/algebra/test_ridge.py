import numpy as np
import pytest
import torch

from bench.tools.allocations import peak_bytes
from grail.algebra import ridge
from grail.errors import InputError, NonFiniteError, SolveError

EPS = {"fp64": torch.finfo(torch.float64).eps, "refined": torch.finfo(torch.float32).eps}
PRECISIONS = list(EPS)


def problem(k: int = 12, o: int = 5, tokens: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    return x.T @ x, torch.randn(o, k, generator=generator, dtype=torch.float64)


def conditioned(condition: float, k: int = 64, energies: float = 1.0) -> torch.Tensor:
    """A matrix [k, k] of that condition, whose channels then get energies spread over a ratio."""
    q, _ = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))
    a = q @ torch.diag(torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)) @ q.T
    loudness = torch.logspace(0, -np.log10(energies) / 2, k, dtype=torch.float64)
    return (a + a.T) / 2 * loudness * loudness[:, None]


def backward_ratio(x: torch.Tensor, a: torch.Tensor, c: torch.Tensor, eps: float) -> float:
    """LAPACK's xPOT02 on the system scaled to a unit diagonal: ‖C − X A‖ / (‖A‖ ‖X‖ K eps).

    Unscaled it would not see what happens to the quiet channels.
    """
    scale = a.diagonal().rsqrt()
    a, c, x = a * scale * scale[:, None], c * scale, x / scale
    norm = torch.linalg.matrix_norm
    return (norm(c - x @ a, 1) / (norm(a, 1) * norm(x, 1) * len(a) * eps)).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_equals_numpy_solving_each_problem(precision):
    normals, rights = zip(*(problem(seed=s) for s in range(3)), strict=True)
    damping = torch.tensor([0.0, 0.5, 20.0], dtype=torch.float64)
    solution = ridge.solve(torch.stack(normals), torch.stack(rights), damping, precision=precision)
    for x, a, c, lam in zip(solution.x, normals, rights, damping.tolist(), strict=True):
        expected = np.linalg.solve(a.numpy() + lam * np.eye(12), c.numpy().T).T
        rtol = 1e-9 if precision == "fp64" else 4 * EPS["refined"]
        np.testing.assert_allclose(x.numpy(), expected, rtol=rtol, atol=rtol / 10)
    assert torch.equal(solution.damping, damping)
    assert solution.retries.tolist() == [0, 0, 0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("energies", [1e0, 1e8])
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6, 1e12])
def test_the_backward_error_meets_lapacks_ratio(condition, energies, precision):
    a, c = conditioned(condition, energies=energies), torch.randn(8, 64, dtype=torch.float64)
    x = ridge.solve(a, c, 0.0, precision=precision).x
    assert backward_ratio(x, a, c, EPS[precision]) < 30


@pytest.mark.parametrize("energies", [1e0, 1e8])
def test_refinement_brings_fp32_to_its_own_precision(energies):
    # An fp32 solve alone would be off by condition · eps ≈ 1e-3.
    a, c = conditioned(1e4, energies=energies), torch.randn(8, 64, dtype=torch.float64)
    exact = np.linalg.solve(a.numpy(), c.numpy().T).T / a.diagonal().rsqrt().numpy()
    x = ridge.solve(a, c, 0.0, precision="refined").x / a.diagonal().rsqrt()
    error = np.linalg.norm(x.numpy() - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() <= EPS["refined"]


def test_what_does_not_converge_in_fp32_is_solved_in_fp64():
    easy, hard = conditioned(1e2), conditioned(1e11)
    c = torch.randn(2, 8, 64, dtype=torch.float64)
    x = ridge.solve(torch.stack([easy, hard]), c, 0.0, precision="refined").x
    assert backward_ratio(x[0], easy, c[0], EPS["refined"]) < 30
    assert backward_ratio(x[1], hard, c[1], EPS["fp64"]) < 30


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_scaling_brings_any_magnitude_into_fp32s_range(size, monkeypatch):
    a, c = problem()
    expected = ridge.solve(a, c, 0.0).x
    monkeypatch.delattr(ridge, "_direct")  # nothing is left to fp64
    x = ridge.solve(a * size, c / size, 0.0, precision="refined").x * size * size
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_are_read_only(precision):
    a, c = problem()
    before = a.clone(), c.clone()
    ridge.solve(a, c, 1.0, precision=precision)
    assert torch.equal(a, before[0])
    assert torch.equal(c, before[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_function_is_solved_like_the_tensor_it_makes(precision):
    singular = torch.ones(12, 12, dtype=torch.float64)
    singular -= 1e-9 * torch.eye(12, dtype=torch.float64)  # so that λ has to grow
    right = torch.randn(5, 12, dtype=torch.float64)
    made = ridge.solve(singular.clone, right, 0.0, precision=precision)
    given = ridge.solve(singular, right, 0.0, precision=precision)
    assert torch.equal(made.x, given.x)
    assert made.retries == given.retries > 0


@pytest.mark.parametrize(
    ("precision", "formula"),
    [
        ("fp64", lambda k, o: 8 * (k * k + o * k)),
        ("refined", lambda k, o: 12 * k * k + 40 * o * k),
    ],
)
def test_the_memory_is_what_the_docstring_says(precision, formula):
    k, o = 600, 400
    a, c = torch.eye(k, dtype=torch.float64), torch.ones(o, k, dtype=torch.float64)
    used = peak_bytes(lambda: ridge.solve(a.clone, c, 1.0, precision=precision))
    assert used == pytest.approx(formula(k, o), rel=0.02)  # vectors of K are not in the formula


def test_devices_that_are_good_at_fp64_use_it(monkeypatch):
    auto, *others = (ridge.solve(*problem(), 0.0, precision=p).x for p in ("auto", *PRECISIONS))
    assert [torch.equal(auto, other) for other in others] == [p == "fp64" for p in PRECISIONS]
    monkeypatch.setattr(torch.version, "hip", None)
    cuda = torch.device("cuda")
    for capability, fast in {(8, 0): True, (8, 9): False, (9, 0): True, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ridge.precision_of(cuda) == ("fp64" if fast else "refined")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_problem_that_fails_is_damped_and_it_is_reported(precision):
    good, right = problem()
    singular = torch.ones(12, 12, dtype=torch.float64)
    singular -= 1e-9 * torch.eye(
        12, dtype=torch.float64
    )  # as rounding leaves it: slightly indefinite
    solution = ridge.solve(
        torch.stack([good, singular]), torch.stack([right, right]), 0.0, precision=precision
    )
    assert solution.retries[0] == 0
    assert solution.damping[0] == 0
    assert solution.retries[1] >= 1
    assert 1e-9 < solution.damping[1] <= 1e-7  # the first power of ten of the floor that suffices
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("energies", [1e0, 1e8])
def test_a_pivot_that_is_only_rounding_counts_as_a_failure(energies, precision):
    # The last of three channels differs from the first by 1e-6 of its energy.
    exact = torch.tensor([[1, 0.2, 1], [0.2, 1, 0.2], [1, 0.2, 1 + 1e-6]], dtype=torch.float64)
    loudness = torch.tensor([1, 1, energies], dtype=torch.float64).rsqrt()
    a, right = exact * loudness * loudness[:, None], torch.ones(2, 3, dtype=torch.float64)
    for share, retried in [(1e-7, False), (1e-5, True)]:
        rounding = share * a.diagonal()
        solution = ridge.solve(a, right, 0.0, rounding=rounding, precision=precision)
        assert bool(solution.retries) == bool(solution.damping) == retried


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_zero_matrix_explains_nothing(precision):
    solution = ridge.solve(torch.zeros(3, 3), torch.ones(2, 3), 0.0, precision=precision)
    assert torch.equal(solution.x, torch.zeros(2, 3, dtype=torch.float64))
    assert solution.damping == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_indefinite_matrix_is_refused_not_regularised_away(precision):
    a = torch.diag(torch.tensor([1e6, 1e6, -1e9], dtype=torch.float64)) + 1e9 / 3 * torch.eye(3)
    with pytest.raises(SolveError, match="stayed indefinite"):
        ridge.solve(a, torch.ones(1, 3), 0.0, precision=precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["normal", "right"])
def test_non_finite_input_is_named_with_its_channel(value, where):
    tensors = dict(zip(("normal", "right"), problem(), strict=True))
    tensors[where][0, 3] = value
    with pytest.raises(NonFiniteError) as caught:
        ridge.solve(tensors["normal"], tensors["right"], 1.0)
    assert caught.value.channels == (3,)
    assert caught.value.count == 1


@pytest.mark.parametrize(
    ("normal", "right", "damping"),
    [
        (torch.eye(3), torch.ones(2, 4), 0.0),
        (torch.ones(3, 4), torch.ones(2, 4), 0.0),
        (torch.eye(3), torch.ones(2, 3), -1.0),
    ],
    ids=["right", "square", "negative"],
)
def test_shapes_and_damping_that_do_not_fit_are_refused(normal, right, damping):
    with pytest.raises(InputError):
        ridge.solve(normal, right, damping)


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="auto, fp64, refined"):
        ridge.solve(*problem(), 0.0, precision="fp16")
