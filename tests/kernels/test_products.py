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
    [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 0)],
    ids=["bf16", "fp16", "fp32"],
)
def test_products_are_added_to_what_their_parts_leave(tensor_cores, dtype, count):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4).to(dtype)
    total = torch.ones(O, H)
    products.add_products(total, left, right)
    assert len(tensor_cores) == count
    exact = 1 + left.double().T @ right.double()
    size = 1 + left.double().abs().T @ right.double().abs()
    # 2^-8 of every product, and a sum of 300 in fp32, twice.
    bound = (2**-8 + 600 * 2**-24) * size
    assert bool(((total.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_tensor_cores_products_are_those_of_fp32(dtype):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4).to(dtype)
    total, wide = torch.ones(O, H), right.double()
    products.add_products(total, left, right)
    expected = 1 + left.double().T @ wide
    size = 1 + left.double().abs().T @ wide.abs()
    assert bool(((total - expected).abs() <= 16 * 2**-23 * size).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_wait_for_others_and_are_the_same(tensor_cores, dtype):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4).to(dtype)
    total, expected = torch.zeros(O, H), torch.zeros(O, H)
    buffered = products.Products(total, capacity=100)
    for first in range(0, T, 30):
        buffered.add(left[first : first + 30], right[first : first + 30])
    blocks = 4 - 1  # of 90 tokens; the last 30 wait
    parts = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 0}[dtype]
    assert len(tensor_cores) == blocks * parts
    buffered.flush()
    buffered.flush()
    assert len(tensor_cores) == (blocks + 1) * parts
    for block in range(0, T, 90 if parts else 30):
        tokens = slice(block, block + (90 if parts else 30))
        products.add_products(expected, left[tokens], right[tokens])
    assert torch.equal(total, expected)


def test_many_tokens_and_another_dtype_do_not_wait_with_others(tensor_cores):
    left, right = values(1, O), values(2, H).clamp(-1e4, 1e4)
    total, expected = torch.zeros(O, H), torch.zeros(O, H)
    buffered = products.Products(total, capacity=100)
    pieces = [(slice(0, 20), torch.bfloat16), (slice(20, 50), torch.float16)]
    pieces += [(slice(50, 300), torch.bfloat16), (slice(0, 10), torch.float32)]
    for tokens, dtype in pieces:
        buffered.add(left[tokens], right[tokens].to(dtype))
        products.add_products(expected, left[tokens], right[tokens].to(dtype))
    assert torch.equal(total, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs", [1, 7, 40])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "half"])
def test_a_product_in_fp32_is_that_of_fp64(threads, outputs, layout):
    generator = torch.Generator().manual_seed(outputs)
    left, right = (torch.randn(T, n, generator=generator) for n in (outputs, 35))
    if layout == "columns":
        left, right = left.mT.contiguous().mT, right.mT.contiguous().mT
    elif layout == "strided":  # BLAS cannot read it, torch can
        left, right = (x.repeat_interleave(2, 1)[:, ::2] for x in (left, right))
    elif layout == "half":
        right = right.bfloat16()
    total = torch.randn(outputs, 35, generator=generator)
    expected = total.double() + left.double().mT @ right.double()
    size = total.abs().double() + left.abs().double().mT @ right.abs().double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products.add_products(total, left, right)
    finally:
        torch.set_num_threads(before)
    assert ((total - expected).abs() <= 16 * 2**-23 * size).all()
