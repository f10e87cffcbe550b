import torch

from grail.algebra.rounding import is_close


def test_tensors_are_compared_relative_to_the_norm_of_the_expected_one():
    expected = torch.tensor([3.0, 4.0])
    assert is_close(expected + torch.tensor([0.0, 0.049]), expected, 1e-2)
    assert not is_close(expected + torch.tensor([0.0, 0.051]), expected, 1e-2)
    assert not is_close(torch.tensor([1e-6, 0.0]), torch.zeros(2), 1e-2)
    assert is_close(torch.zeros(2), torch.zeros(2), 0.0)


def test_other_shapes_are_never_close():
    assert not is_close(torch.ones(1, 2), torch.ones(2), 1.0)


def test_values_that_are_not_finite_count_as_zero():
    nan, inf = torch.nan, torch.inf
    assert is_close(torch.tensor([1.0, nan]), torch.tensor([1.0, inf]), 0.0)
    assert not is_close(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]), 0.1)
