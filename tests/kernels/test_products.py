"""The parts of a value are checked as they are; their products by a stand-in for tensor cores."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import products

T, O, H = 300, 7, 11
ADDMM = torch.addmm


def values(seed: int, columns: int) -> torch.Tensor:
    """Over 40 binades, which all sizes of a first part's rest come from."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-20, 20, (T, columns), generator=generator)
    return torch.randn(T, columns, generator=generator) * 2.0**sizes


@pytest.fixture
def tensor_cores(monkeypatch):
    """Lets the CPU take their path; counts the products."""
    calls: list[None] = []

    def addmm(total, left, right, *, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16
        calls.append(None)
        return ADDMM(total, left.to(out_dtype), right.to(out_dtype), out=out)

    monkeypatch.setattr(products, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(torch, "addmm", addmm)
    return calls


@pytest.mark.parametrize(("count", "bound"), [(1, 2**-8), (2, 2**-17), (3, 0)])
def test_parts_leave_no_more_than_is_said(count, bound):
    x = values(0, 64)
    parts = products.bf16_parts(x, count)
    assert len(parts) == count
    left = x.double() - sum(part.double() for part in parts)
    assert bool((left.abs() <= bound * x.double().abs()).all())


def test_a_half_is_exactly_two_parts():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    parts = products.bf16_parts(finite, 2)
    assert torch.equal(sum(part.double() for part in parts), finite.double())


def test_a_bf16_is_its_own_part():
    x = values(0, 64).bfloat16()
    (part,) = products.bf16_parts(x, 2)
    assert part is x


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_sum_of_its_parts(bad):
    parts = products.bf16_parts(torch.tensor([1.0, bad]), 2)
    assert sum(part.float() for part in parts).isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.bfloat16, 2), (torch.float16, 4), (torch.float32, 0)],
    ids=["bf16", "fp16", "fp32"],
)
def test_products_are_added_to_what_their_parts_leave(tensor_cores, dtype, count):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4).to(dtype)
    total = torch.ones(O, H)
    products.add_products(total, left, right)
    assert len(tensor_cores) == count
    exact = 1 + left.double().T @ right.double()
    size = 1 + left.double().abs().T @ right.double().abs()
    # 2^-17 of every product, and a sum of 300 in fp32, four times.
    bound = (2**-17 + 1200 * 2**-24) * size
    assert bool(((total.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_tensor_cores_products_are_those_of_fp32(dtype):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4).to(dtype)
    total, expected = torch.ones(O, H), torch.ones(O, H)
    products.add_products(total, left, right)
    expected.addmm_(left.T, right.float())
    assert torch.equal(total, expected)
