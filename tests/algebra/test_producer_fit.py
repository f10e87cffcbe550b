"""The fit of producers, against dense least squares in fp64."""

import pytest
import torch

from grail.algebra import producer_fit
from grail.algebra.drift import Drift
from grail.algebra.producer_fit import (
    Moments,
    TokenProduct,
    add_tokens,
    conjugate_gradients,
    error_of,
)

SHAPES = [(3, 5, 4), (4, 5, 3), (2, 6, 7)]  # outputs, channels, inputs; of the last 2·O < K
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape, tokens=60, sets=1, seed=0):
    """A consumer and, for each set, x, J and e."""
    outputs, channels, inputs = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float32)

    mixing = normal(inputs, inputs)
    parts = [
        (normal(tokens, inputs) @ mixing, normal(tokens, channels), normal(tokens, outputs))
        for _ in range(sets)
    ]
    return normal(outputs, channels), parts


def moments(consumer, part):
    found = Moments(consumer.shape[1], part[0].shape[1], consumer.device)
    add_tokens(found, consumer, *part)
    return found


def energies(consumer):
    return consumer.double().square().sum(0)


def solved(consumer, parts, steps, alpha, split=1):
    sets = [moments(consumer, part) for part in parts]

    def chunks():
        for number, (x, slope, _) in enumerate(parts):
            for rows in zip(x.chunk(split), slope.chunk(split), strict=True):
                yield number, *rows

    product = TokenProduct(consumer, len(sets), chunks)
    return conjugate_gradients(sets, product, energies(consumer), steps=steps, alpha=alpha)


def design(consumer, part):
    """The matrix [T·O, K·D] of W (J ∘ (X x)) for all tokens, in fp64."""
    x, slope, _ = (t.double() for t in part)
    return torch.einsum("ok,tk,td->tokd", consumer.double(), slope, x).flatten(2).flatten(0, 1)


def penalty(consumer, part, alpha):
    """λ·c of every entry of X [K·D]."""
    x, slope, _ = (t.double() for t in part)
    weights = consumer.double().square().sum(0) * slope.square().mean(0)
    weights = weights + producer_fit.LEAST_WEIGHT * weights.mean()
    strength = alpha * x.square().sum(0).mean()
    return (strength * weights)[:, None].expand(-1, x.shape[1]).flatten()


def squared_error(consumer, part, change):
    x, slope, missing = (t.double() for t in part)
    left = missing - (slope * (x @ change.double().mT)) @ consumer.double().mT
    return left.square().sum()


@every_shape
@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_many_steps_solve_the_dense_problem(shape, alpha):
    consumer, parts = drawn(shape)
    matrix, ridge = design(consumer, parts[0]), penalty(consumer, parts[0], alpha)
    right = matrix.mT @ parts[0][2].double().flatten()
    expected = torch.linalg.solve(matrix.mT @ matrix + ridge.diag(), right)
    found = solved(consumer, parts, steps=60, alpha=alpha)
    expected = expected.view(shape[1:])
    torch.testing.assert_close(found.change.double(), expected, rtol=1e-4, atol=1e-5)


@every_shape
def test_few_steps_are_those_of_textbook_conjugate_gradients(shape):
    consumer, parts = drawn(shape)
    matrix, ridge = design(consumer, parts[0]), penalty(consumer, parts[0], 0.1)
    system = matrix.mT @ matrix + ridge.diag()
    x = parts[0][0].double()
    gram = x.mT @ x
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = ridge.view(shape[1:])[:, 0] / (0.1 * x.square().sum(0).mean())
    condition = torch.linalg.inv(torch.kron(weights.diag(), gram))
    residual = matrix.mT @ parts[0][2].double().flatten()
    change, direction = torch.zeros_like(residual), condition @ residual
    for _ in range(3):
        size = residual @ condition @ residual
        length = size / (direction @ system @ direction)
        change, residual = change + length * direction, residual - length * system @ direction
        direction = condition @ residual + residual @ condition @ residual / size * direction
    found = solved(consumer, parts, steps=3, alpha=0.1)
    assert found.steps == 3
    change = change.view(shape[1:])
    torch.testing.assert_close(found.change.double(), change, rtol=1e-4, atol=1e-6)


@every_shape
def test_the_errors_of_all_sets_are_those_of_the_tokens(shape):
    consumer, parts = drawn(shape, sets=3)
    for steps in range(1, 5):
        # Judged by nothing but itself, so that the last step is taken.
        alone = solved(consumer, parts[:1], steps=steps, alpha=1e-2)
        assert alone.steps == steps == len(alone.errors)
        found = solved(consumer, parts, steps=steps, alpha=1e-2)
        for number, part in enumerate(parts):
            before = squared_error(consumer, part, torch.zeros_like(alone.change))
            expected = squared_error(consumer, part, alone.change) / before
            assert found.errors[-1][number] == pytest.approx(expected.item(), rel=1e-4)


def test_the_worst_judging_set_chooses_the_step():
    # Two sets are of the fitted map, one of noise only.
    shape = (4, 6, 8)
    consumer, parts = drawn(shape, tokens=40, sets=3)
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(shape[1:], generator=generator, dtype=torch.float32)
    explained = [
        (x, slope, noise + (slope * (x @ truth.mT)) @ consumer.mT)
        for x, slope, noise in (parts[0], parts[1])
    ]
    alone = solved(consumer, explained, steps=8, alpha=0)
    judged = [errors[1] for errors in alone.errors]
    assert alone.steps == 1 + min(range(8), key=judged.__getitem__)
    assert alone.steps > 1
    both = solved(consumer, [*explained, parts[2]], steps=8, alpha=0)
    worst = [max(errors[1:]) for errors in both.errors]
    best = min(range(8), key=worst.__getitem__)
    assert both.steps == (1 + best if worst[best] < 1 else 0)
    assert both.steps < alone.steps


def test_a_change_that_helps_no_judge_is_none():
    consumer, parts = drawn((3, 5, 4), tokens=8, sets=2)
    x, slope, missing = parts[0]
    found = solved(consumer, [(x, slope, missing), (x, slope, -missing)], steps=4, alpha=0.1)
    assert found.steps == 0
    assert len(found.errors) == 4
    assert not found.change.any()


def test_chunks_and_rows_do_not_matter(monkeypatch):
    consumer, parts = drawn((3, 5, 4), sets=2)
    whole = solved(consumer, parts, steps=3, alpha=0.1)
    monkeypatch.setattr(producer_fit, "ROWS", 16)
    found = solved(consumer, parts, steps=3, alpha=0.1, split=7)
    torch.testing.assert_close(found.change, whole.change, rtol=1e-5, atol=1e-6)


def test_the_sums_of_several_processes_add_up():
    consumer, parts = drawn((3, 5, 4), sets=2)
    whole = solved(consumer, parts, steps=3, alpha=0.1)
    sets = [moments(consumer, part) for part in parts]
    halves = [[tuple(t.chunk(2)[half] for t in part) for part in parts] for half in range(2)]
    chunks = [
        lambda half=half: ((number, *part[:2]) for number, part in enumerate(half))
        for half in halves
    ]
    other = TokenProduct(consumer, len(sets), chunks[1])

    def product(change):
        waiting = iter(other(change))
        own = TokenProduct(consumer, len(sets), chunks[0], total=lambda sums: sums + next(waiting))
        return own(change)

    found = conjugate_gradients(sets, product, energies(consumer), steps=3, alpha=0.1)
    torch.testing.assert_close(found.change, whole.change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2], ids=["x", "J", "e"])
def test_where_nothing_can_change_nothing_does(zero):
    consumer, parts = drawn((3, 5, 4))
    parts[0][zero].zero_()
    found = solved(consumer, parts, steps=3, alpha=0.0)
    assert found.steps == 0
    assert not found.change.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "J", "e"])
def test_what_is_not_finite_changes_nothing(place, value):
    consumer, parts = drawn((3, 5, 4), sets=2)
    parts[1][place][3, 1] = value
    found = solved(consumer, parts, steps=3, alpha=0.1)
    assert found.steps == 0
    assert not found.change.any()


def test_sixteen_bits_are_multiplied_in_full():
    consumer, parts = drawn((3, 5, 4))
    narrow = [(x.bfloat16(), slope.bfloat16(), missing) for x, slope, missing in parts]
    wide = [(x.float(), slope.float(), missing) for x, slope, missing in narrow]
    found, expected = (solved(consumer, each, steps=3, alpha=0.1) for each in (narrow, wide))
    torch.testing.assert_close(found.change, expected.change, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_reported_error_is_that_of_the_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, drift, before, after = (
        torch.randn(size, generator=generator, dtype=torch.float32)
        for size in ((50, 5), (50, 3), (3, 5), (3, 5))
    )
    landed = Drift(3, 5, hidden.device)
    for rows in zip(drift.split(20), hidden.split(20), strict=True):
        landed.update(*rows, None)
    target = hidden @ before.mT + drift
    expected = (target - hidden @ after.mT).norm() / target.norm()
    found = error_of(landed, hidden.mT @ hidden, before, after)
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_a_dead_consumer_has_no_error():
    landed = Drift(3, 5, torch.device("cpu"))
    dead = torch.zeros(3, 5, dtype=torch.float32)
    assert error_of(landed, torch.zeros(5, 5, dtype=torch.float32), dead, dead) == 0.0
