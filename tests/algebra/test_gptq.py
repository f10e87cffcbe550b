"""GPTQ against brute force in fp64, and what rounding with a Gram is worth."""

import pytest
import torch

from grail.algebra.gptq import inverse_factor, quantize, round_with
from grail.algebra.grids import BLOCK, FORMATS, round_to_nearest
from grail.errors import InputError, SolveError


def correlated(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Tokens [T, C] whose channels are mixtures of few sources, of sizes from 0.1 to 10."""
    draw = torch.Generator().manual_seed(seed)
    sources = torch.randn(tokens, columns // 4, generator=draw)
    mixed = sources @ torch.randn(columns // 4, columns, generator=draw)
    mixed += 0.3 * torch.randn(tokens, columns, generator=draw)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=draw)]


def weights(outputs: int, columns: int) -> torch.Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(5))


def brute_force(weight, gram, kind, damping):
    """Rounds column by column; each time solves anew for the columns that are left, in fp64."""
    system = (
        gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram)).double()
    )
    left, rounded = weight.double().clone(), torch.zeros_like(weight)
    grid = None
    for column in range(weight.shape[1]):
        if column % BLOCK == 0:
            block = slice(column, column + BLOCK)
            # The cost of an error in a column, once those after it are solved for.
            costs = [1 / torch.linalg.inv(system[j:, j:])[0, 0] for j in range(column, block.stop)]
            grid = kind.search(left[:, block].T.float(), torch.stack(costs).float())
        code = kind.codes(left[:, column].float(), grid)
        rounded[:, column] = kind.values(code, grid)
        error = left[:, column] - rounded[:, column].double()
        # Minimises tr(D H Dᵀ) over the columns after this one, D = (…, −error, correction).
        after = slice(column + 1, None)
        if column + 1 < weight.shape[1]:
            known = error[:, None] * system[column, after][None]
            left[:, after] += torch.linalg.solve(system[after, after], known.T).T
    return rounded


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [32, 96, 160, 288])
def test_it_is_the_greedy_solution(name, columns):
    x, weight = correlated(columns, 400), weights(12, columns)
    gram = x.T @ x
    grid, codes = round_with(weight, inverse_factor(gram, 0.01), FORMATS[name])
    found, expected = grid.values(codes), brute_force(weight, gram, FORMATS[name], 0.01)
    # A weight half-way between two points falls to either side by rounding, and moves the rest.
    assert float((found == expected).float().mean()) > 0.97
    error, best = (torch.linalg.norm((weight - w) @ x.T) for w in (found, expected))
    assert float(error) == pytest.approx(float(best), rel=0.02)


def test_without_correlations_it_is_rounding_to_nearest():
    weight, gram = weights(7, 64), torch.diag(torch.logspace(-2, 2, 64))
    for kind in FORMATS.values():
        grid, codes = round_with(weight, inverse_factor(gram), kind)
        assert torch.equal(codes, grid.nearest(weight))
        nearest, expected = round_to_nearest(weight, kind)
        own, other = (
            (values - weight) @ gram.sqrt()
            for values in (grid.values(codes), nearest.values(expected))
        )
        assert float(own.norm()) <= float(other.norm())


def test_the_factor_is_that_of_the_inverse():
    x = correlated(96, 500)
    gram = x.T @ x
    factor = inverse_factor(gram, 0.01)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(96).double()
    product = factor.double().T @ factor.double() @ damped
    assert torch.allclose(product, torch.eye(96).double(), atol=2e-4)
    assert not factor.tril(-1).any()


@pytest.mark.parametrize(("name", "least"), [("q4_1", 1.8), ("q8_0", 1.8)])
def test_errors_are_those_of_the_output_and_below_those_of_rounding(name, least):
    x, weight = correlated(160, 1000), weights(20, 160)
    gram = x.T @ x
    (rounded,) = quantize([weight], gram, inverse_factor(gram), FORMATS[name])
    whole = torch.linalg.norm(weight.double() @ x.double().T)
    nearest, codes = round_to_nearest(weight, FORMATS[name])
    for values, error in (
        (rounded.values, rounded.error),
        (nearest.values(codes), rounded.nearest_error),
    ):
        apart = torch.linalg.norm((weight - values).double() @ x.double().T)
        assert error == pytest.approx(float(apart / whole), rel=1e-2)
    assert rounded.nearest_error > least * rounded.error


def test_matrices_of_one_input_are_rounded_as_each_alone():
    x, one, other = correlated(96, 300), weights(5, 96), weights(3, 96) * 7
    gram = x.T @ x
    factor = inverse_factor(gram)
    together = quantize([one, other], gram, factor, FORMATS["q4_1"])
    for weight, rounded in zip((one, other), together, strict=True):
        (alone,) = quantize([weight], gram, factor, FORMATS["q4_1"])
        assert rounded.values.shape == weight.shape
        assert float((rounded.values == alone.values).float().mean()) > 0.97
        assert rounded.error == pytest.approx(alone.error, rel=0.05)


def test_silent_channels_are_rounded_and_disturb_nothing():
    x, weight = correlated(96, 300), weights(6, 96)
    x[:, [0, 40, 95]] = 0
    gram = x.T @ x
    (rounded,) = quantize([weight], gram, inverse_factor(gram), FORMATS["q8_0"])
    assert float((rounded.values - weight)[:, [0, 40, 95]].abs().max()) < 0.03
    assert rounded.error < rounded.nearest_error


def test_fewer_tokens_than_channels_are_enough():
    x, weight = correlated(96, 20), weights(6, 96)
    gram = x.T @ x
    (rounded,) = quantize([weight], gram, inverse_factor(gram), FORMATS["q4_1"])
    assert rounded.error < 0.5 * rounded.nearest_error


def test_a_gram_of_zeros_rounds_to_nearest():
    weight = weights(3, 32)
    (rounded,) = quantize(
        [weight], torch.zeros(32, 32), inverse_factor(torch.zeros(32, 32)), FORMATS["q4_1"]
    )
    assert rounded.error == rounded.nearest_error == 0
    assert torch.equal(rounded.codes, rounded.grid.nearest(weight))


def test_no_gram_is_refused():
    with pytest.raises(SolveError, match="a Gram of 32 channels stayed indefinite after 12"):
        inverse_factor(torch.eye(32) - 1e15 * torch.ones(32, 32).fill_diagonal_(0))
    with pytest.raises(InputError, match=r"gram and factor \[C, C\]; got \(4, 64\)"):
        quantize([weights(4, 64)], torch.eye(32), torch.eye(32), FORMATS["q4_1"])
