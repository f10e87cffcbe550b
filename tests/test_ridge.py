import numpy as np
import pytest
import torch

from grail import ridge
from grail.errors import InputError, NonFiniteError, SolveError

EPS = torch.finfo(torch.float64).eps


def problem(k: int = 12, o: int = 5, tokens: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    return x.T @ x, torch.randn(o, k, generator=generator, dtype=torch.float64)


def test_a_batch_equals_numpy_solving_each_problem():
    normals, rights = zip(*(problem(seed=s) for s in range(3)), strict=True)
    damping = torch.tensor([0.0, 0.5, 20.0], dtype=torch.float64)
    solution = ridge.solve(torch.stack(normals), torch.stack(rights), damping)
    for x, a, c, lam in zip(solution.x, normals, rights, damping.tolist(), strict=True):
        expected = np.linalg.solve(a.numpy() + lam * np.eye(12), c.numpy().T).T
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(solution.damping, damping)
    assert solution.retries.tolist() == [0, 0, 0]


@pytest.mark.parametrize("condition", [1e0, 1e6, 1e12])
def test_the_backward_error_meets_lapacks_ratio(condition):
    # LAPACK's xPOT02: ‖C − X A‖ / (‖A‖ ‖X‖ K eps) < 30.
    q, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    a = q @ torch.diag(torch.logspace(0, -np.log10(condition), 64, dtype=torch.float64)) @ q.T
    a = (a + a.T) / 2
    c = torch.randn(8, 64, dtype=torch.float64)
    x = ridge.solve(a, c, 0.0).x
    residual = torch.linalg.norm(c - x @ a, 1)
    assert residual / (torch.linalg.norm(a, 1) * torch.linalg.norm(x, 1) * 64 * EPS) < 30


def test_only_the_problem_that_fails_is_damped_and_it_is_reported():
    good, right = problem()
    singular = torch.ones(12, 12, dtype=torch.float64)
    singular -= 1e-9 * torch.eye(
        12, dtype=torch.float64
    )  # as rounding leaves it: slightly indefinite
    solution = ridge.solve(torch.stack([good, singular]), torch.stack([right, right]), 0.0)
    assert solution.retries[0] == 0
    assert solution.damping[0] == 0
    assert solution.retries[1] >= 1
    assert 1e-9 < solution.damping[1] <= 1e-7  # the first power of ten of the floor that suffices
    assert solution.x.isfinite().all()


def test_a_zero_matrix_explains_nothing():
    solution = ridge.solve(torch.zeros(3, 3), torch.ones(2, 3), 0.0)
    assert torch.equal(solution.x, torch.zeros(2, 3, dtype=torch.float64))
    assert solution.damping == 0


def test_an_indefinite_matrix_is_refused_not_regularised_away():
    a = torch.diag(torch.tensor([1e6, 1e6, -1e9], dtype=torch.float64)) + 1e9 / 3 * torch.eye(3)
    with pytest.raises(SolveError, match="stayed indefinite"):
        ridge.solve(a, torch.ones(1, 3), 0.0)


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
