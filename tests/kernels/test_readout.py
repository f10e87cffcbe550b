"""The read-out of a packed accumulator into memory that is there, on both ways to copy."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
import torch

import grail_kernels as gk
from grail_kernels import cpu_blas, readout, tiles

CHANNELS = (1, 2, 17, 255, 256, 257, 700, 1100)


@pytest.fixture(params=["openblas", "torch"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that copies."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_blas, "openblas", lambda: None)
    elif cpu_blas.openblas() is None:
        pytest.skip("NumPy has no OpenBLAS that can be called")
    return request.param


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(readout, "_SHARED_ELEMENTS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def packed_of(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix, and the same packed with NaN in the scratch."""
    matrix = torch.randn(channels, channels)
    matrix = matrix + matrix.T
    packed = gk.pack(matrix)
    for strip in tiles.strips(channels):
        block = strip.view(packed)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)
    return matrix, packed


@pytest.mark.usefixtures("copies", "_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
def test_what_out_contained_is_replaced(channels: int, dtype: torch.dtype) -> None:
    matrix, packed = packed_of(channels)
    out = torch.full((channels, channels), torch.nan, dtype=dtype)
    assert gk.unpack(packed, channels, out=out) is out
    assert torch.equal(out, matrix.to(dtype))
    assert torch.equal(gk.unpack(packed, channels), matrix)


@pytest.mark.usefixtures("copies", "_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [3, 300, 700])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.0), (1.0, 1.0), (-2.0, 0.7), (0.0, 0.1)])
def test_out_is_scaled_and_added_to(
    channels: int, alpha: float, beta: float, dtype: torch.dtype
) -> None:
    matrix, packed = packed_of(channels)
    before = torch.randn(channels, channels, dtype=dtype)
    before = before + before.T
    out = before.clone()
    gk.unpack(packed, channels, out=out, alpha=alpha, beta=beta)
    expected = beta * before.double() + alpha * matrix.double()
    size = abs(beta) * before.double().abs() + abs(alpha) * matrix.double().abs()
    # Two products and a sum, each rounded, and factors that fp32 rounds.
    assert ((out.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * size).all()
    assert torch.equal(out, out.T)


@pytest.mark.usefixtures("copies")
def test_a_scaled_matrix_is_symmetric_even_where_out_was_not() -> None:
    _, packed = packed_of(600)
    out = gk.unpack(packed, 600, out=torch.randn(600, 600), alpha=1 / 3)
    assert torch.equal(out, out.T)


@pytest.mark.usefixtures("copies")
def test_rows_may_be_apart_and_what_is_between_them_stays() -> None:
    matrix, packed = packed_of(530)
    memory = torch.full((540, 600), 7.0)
    gk.unpack(packed, 530, out=memory[5:535, 40:570])
    assert torch.equal(memory[5:535, 40:570], matrix)
    memory[5:535, 40:570] = 7
    assert (memory == 7).all()


@pytest.mark.usefixtures("copies")
def test_a_batch_is_read_out_matrix_by_matrix() -> None:
    found = [packed_of(300) for _ in range(6)]
    matrices, packed = (
        torch.stack([pair[i] for pair in found]).unflatten(0, (2, 3)) for i in (0, 1)
    )
    out = torch.ones(2, 3, 300, 300)
    gk.unpack(packed, 300, out=out, beta=1)
    assert torch.equal(out, 1 + matrices)
    halves = torch.stack([packed, packed], dim=-1)[..., 0]  # its elements are not adjacent
    assert torch.equal(gk.unpack(halves, 300), matrices)


@pytest.mark.skipif(cpu_blas.openblas() is None, reason="NumPy has no OpenBLAS that can be called")
@pytest.mark.parametrize("beta", [0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_temporary_matrix_is_made(dtype: torch.dtype, beta: float) -> None:
    _, packed = packed_of(1024)
    out = torch.zeros(1024, 1024, dtype=dtype)
    tracemalloc.start()  # NumPy's memory, which makes all copies here
    gk.unpack(packed, 1024, out=out, alpha=0.5, beta=beta)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.usefixtures("copies")
def test_products_beyond_the_range_are_infinite_and_raise_no_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    packed = torch.full((gk.packed_numel(5),), 3e38)
    for out in (None, torch.ones(5, 5)):
        assert gk.unpack(packed, 5, out=out, alpha=10).isinf().all()
    assert not recwarn.list


def test_gradients_pass() -> None:
    _, packed = packed_of(20)
    packed = packed.nan_to_num().requires_grad_()
    gk.unpack(packed, 20, alpha=2).sum().backward()
    expected = gk.pack(torch.full((20, 20), 4.0).fill_diagonal_(2))
    assert torch.equal(packed.grad, expected)


def test_compiled_code_gives_the_same_bits() -> None:
    matrix, packed = packed_of(40)
    compiled = torch.compile(gk.unpack, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed, 40, alpha=0.5), 0.5 * matrix)


REFUSALS = {
    "another shape": ("shape", {"out": torch.zeros(63, 64)}),
    "a batch": ("shape", {"out": torch.zeros(1, 64, 64)}),
    "half": ("float32 or torch.float64", {"out": torch.zeros(64, 64).half()}),
    "columns": ("adjacent", {"out": torch.zeros(64, 65)[:, :64].T}),
    "every second element": ("adjacent", {"out": torch.zeros(64, 128)[:, ::2]}),
    "one row for all": ("adjacent", {"out": torch.zeros(64).expand(64, 64)}),
    "sparse": ("adjacent", {"out": torch.eye(64).to_sparse()}),
    "another device": ("one device", {"out": torch.zeros(64, 64, device="meta")}),
    "text": ("torch.Tensor", {"out": "text"}),
    "a beta alone": ("give it", {"beta": 0.5}),
    "an infinite factor": ("finite", {"alpha": float("inf")}),
    "a switch": ("a number", {"out": torch.zeros(64, 64), "beta": True}),
}


@pytest.mark.parametrize(("message", "arguments"), REFUSALS.values(), ids=REFUSALS.keys())
def test_bad_arguments_are_refused(message: str, arguments: dict) -> None:
    with pytest.raises(gk.InputError, match=message):
        gk.unpack(packed_of(64)[1], 64, **arguments)


def test_an_out_that_overlaps_the_accumulator_is_refused() -> None:
    memory = torch.ones(gk.packed_numel(64) + 64 * 64)
    for start, end in itertools.pairwise((0, 4096, 8192)):
        gk.unpack(memory[:4096], 64, out=memory[4096:].view(64, 64))
        with pytest.raises(gk.InputError, match="overlaps packed"):
            gk.unpack(memory[start:end], 64, out=memory[start:end].view(64, 64))
    assert (memory == 1).all()
