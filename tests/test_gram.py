import pytest
import torch

import grail
from grail.errors import EmptyCalibrationError, InputError, NonFiniteError

H = 20
EPS = torch.finfo(torch.float32).eps


def bound(x: torch.Tensor) -> torch.Tensor:
    """Reference BLAS's syrk test: |G − G64| ≤ 16 eps |X|ᵀ|X|, componentwise."""
    return 16 * EPS * x.double().abs().T @ x.double().abs()


def test_sums_and_counts_equal_fp64_over_any_chunking():
    x = torch.randn(300, H)
    gram = grail.Gram(H)
    for chunk in x.split([1, 99, 0, 200]):
        gram.update(chunk.view(1, -1, H))
    assert ((gram.matrix().double() - x.double().T @ x.double()).abs() <= bound(x)).all()
    torch.testing.assert_close(gram.sum, x.sum(0), atol=1e-4, rtol=1e-5)
    assert torch.equal(gram.energy, gram.matrix().diagonal())
    assert gram.tokens == 300
    assert torch.equal(gram.matrix(), gram.matrix().T)


def test_a_masked_token_is_a_token_that_was_never_there():
    x, mask = torch.randn(4, 7, H), torch.rand(4, 7) > 0.4
    x[~mask] = float("nan")
    masked, removed = grail.Gram(H), grail.Gram(H)
    masked.update(x, mask)
    removed.update(x[mask])
    assert torch.equal(masked.matrix(), removed.matrix())
    assert torch.equal(masked.sum, removed.sum)
    assert masked.tokens == removed.tokens == int(mask.sum())


def test_merge_adds_sums_and_counts():
    x, y = torch.randn(50, H), torch.randn(30, H)
    first, second, empty = grail.Gram(H), grail.Gram(H), grail.Gram(H)
    first.update(x)
    second.update(y)
    expected = first.matrix() + second.matrix()
    empty.merge(first)
    empty.merge(second)
    empty.merge(grail.Gram(H))
    assert torch.equal(empty.matrix(), expected)
    assert empty.tokens == 80
    assert first.tokens == 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_activation_is_refused_and_nothing_is_added(value):
    gram = grail.Gram(H, name="model.layers.3.mlp")
    gram.update(torch.randn(10, H))
    before, tokens = gram.matrix(), gram.tokens
    bad = torch.randn(10, H)
    bad[2, 5] = bad[3, 5] = bad[4, 9] = value
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3\.mlp") as caught:
        gram.update(bad)
    assert caught.value.channels == (5, 9)
    assert caught.value.count == 3
    assert torch.equal(gram.matrix(), before)
    assert gram.tokens == tokens


def test_large_finite_values_are_counted_until_their_squares_overflow():
    gram = grail.Gram(H)
    gram.update(torch.full((2, H), 3e38))  # the channel sum overflows, no value is infinite
    with pytest.raises(NonFiniteError, match="beyond fp32"):
        gram.matrix()


def test_no_token_is_an_error_when_read():
    gram = grail.Gram(H)
    assert gram.tokens == 0
    gram.update(torch.empty(0, H))
    with pytest.raises(EmptyCalibrationError):
        gram.matrix()
    with pytest.raises(EmptyCalibrationError):
        _ = gram.energy


@pytest.mark.parametrize(
    "call",
    [
        lambda g: g.update(torch.randn(3, H + 1)),
        lambda g: g.update(torch.tensor(1.0)),
        lambda g: g.update(torch.randn(3, H, dtype=torch.float64)),
        lambda g: g.update(torch.ones(3, H, dtype=torch.int64)),
        lambda g: g.update(torch.randn(3, H), torch.ones(3)),
        lambda g: g.update(torch.randn(3, H), torch.ones(2, dtype=torch.bool)),
        lambda g: g.merge(grail.Gram(H + 1)),
        lambda g: grail.Gram(0),
        lambda g: grail.Gram(2.5),
    ],
    ids=["channels", "scalar", "fp64", "int", "mask dtype", "mask shape", "merge", "zero", "float"],
)
def test_input_that_does_not_fit_changes_nothing(call):
    gram = grail.Gram(H)
    gram.update(torch.randn(10, H))
    before = gram.matrix()
    with pytest.raises(InputError):
        call(gram)
    assert torch.equal(gram.matrix(), before)
    assert gram.tokens == 10


def test_the_input_is_read_only():
    x = torch.randn(5, H)
    copy = x.clone()
    grail.Gram(H).update(x)
    assert torch.equal(x, copy)
