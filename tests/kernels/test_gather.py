"""Submatrices of a packed accumulator against those of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import _gather, tiles
from tests.kernels.conftest import Runner

ANY_ORDER = [(channels, batch) for channels in (1, 2, 257, 300, 700) for batch in ((), (3,))]


def problem(channels: int, batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric matrices [.., H, H], and for each a third of the rows, half of the columns."""
    dense = torch.randn(*batch, channels, channels)
    rows = torch.rand(*batch, channels).argsort(-1)[..., : max(1, channels // 3)]
    columns = torch.rand(*batch, channels).argsort(-1)[..., : (channels + 1) // 2]
    return dense + dense.mT, rows, columns


def expected(dense: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    of_rows = dense.gather(-2, rows[..., None].expand(*rows.shape, dense.shape[-1]))
    return of_rows.gather(-1, columns[..., None, :].expand(*rows.shape, columns.shape[-1]))


def found(
    runner: Runner, packed: Tensor, channels: int, index: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """The elements by what `gk.gather` runs on a CPU, or by Triton's kernel."""
    packed, rows, columns = (tensor.to(runner.device) for tensor in (packed, *index))
    if runner.backend == "torch":
        return gk.gather(packed, channels, rows, columns, dtype)
    from grail_kernels.gather_triton import launch_gather

    shape = (*packed.shape[:-1], 1, rows.shape[-1], columns.shape[-1])
    out = torch.full(shape, torch.nan, dtype=dtype, device=runner.device)
    launch_gather(out, packed, channels, rows, columns)
    return out[..., 0, :, :].cpu()


@pytest.mark.parametrize(("channels", "batch"), ANY_ORDER)
@pytest.mark.parametrize("order", ["any", "ascending"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathers_what_the_dense_matrix_holds(runner: Runner, channels, batch, order, dtype):
    dense, *index = problem(channels, batch)
    if order == "ascending":
        index = [each.sort(-1).values for each in index]
    result = found(runner, gk.pack(dense), channels, index, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected(dense, *index).to(dtype))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (range(700), range(700)),
        (range(100, 300), [5]),
        ([699], range(700)),
        ([3, 3, 600, 600], [600, 3, 3, 600, 1]),
        (range(600, 640), range(20)),
        (range(20), range(600, 640)),
    ],
    ids=["all", "one column", "the last row", "repeated", "later rows", "earlier rows"],
)
def test_wherever_the_channels_lie(runner: Runner, rows, columns):
    dense, *_ = problem(700, ())
    index = torch.tensor(rows), torch.tensor(columns)
    result = found(runner, gk.pack(dense), 700, index, torch.float32)
    assert torch.equal(result, expected(dense, *index))


@pytest.mark.parametrize("sort", [False, True])
def test_the_same_index_twice_gives_a_symmetric_matrix(sort):
    dense, _, index = problem(700, ())
    index = index.sort().values if sort else index
    result = gk.gather(gk.pack(dense), 700, index, index)
    assert torch.equal(result, expected(dense, index, index))


def test_elements_of_fp64_are_not_rounded(runner: Runner):
    dense, *index = problem(300, ())
    dense = dense.double() / 3
    result = found(runner, gk.pack(dense), 300, index, torch.float64)
    assert torch.equal(result, expected(dense, *index))


def test_scratch_above_the_diagonal_is_not_read(runner: Runner):
    dense, *index = problem(300, ())
    packed = gk.pack(dense)
    for strip in tiles.strips(300):
        block = strip.view(packed)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)
    assert torch.equal(found(runner, packed, 300, index, torch.float32), expected(dense, *index))


@pytest.mark.parametrize(("channels", "batch"), ANY_ORDER)
def test_places_need_no_host(channels, batch, monkeypatch):
    monkeypatch.setattr(_gather, "_AT_ONCE", 1000)
    dense, *index = problem(channels, batch)
    exact = expected(dense, *index)
    result = torch.full_like(exact, torch.nan)
    _gather._fill_by_place(result, gk.pack(dense), channels, *index)
    assert torch.equal(result, exact)
    # A tensor without values refuses to be read.
    nowhere = (tensor.to("meta") for tensor in (gk.pack(dense), *index))
    packed, rows, columns = nowhere
    assert gk.gather(packed, channels, rows, columns).shape == exact.shape


def test_three_parts_add_up_to_an_element(runner: Runner):
    if runner.backend == "torch":
        pytest.skip("parts are written by Triton's kernel")
    from grail_kernels.gather_triton import launch_gather

    dense, rows, columns = (tensor.to(runner.device) for tensor in problem(300, (3,)))
    out = dense.new_full((3, 3, 100, 150), torch.nan, dtype=torch.bfloat16)
    launch_gather(out, gk.pack(dense), 300, rows, columns)
    exact = expected(dense, rows, columns)
    assert torch.equal(out.double().sum(-3), exact.double())
    assert bool(((out[:, 2] - exact).abs() <= 2**-7 * exact.abs()).all())


def test_a_channel_beyond_the_last_is_not_read_on_a_gpu(runner: Runner):
    dense, rows, columns = problem(300, ())
    rows[3], columns[5] = 300, -1
    if runner.backend == "torch":
        with pytest.raises(gk.InputError, match=r"\[0, 300\); got "):
            gk.gather(gk.pack(dense), 300, rows, columns)
        return
    result = found(runner, gk.pack(dense), 300, (rows, columns), torch.float32)
    wrong = torch.zeros_like(result).bool()
    wrong[3], wrong[:, 5] = True, True
    assert torch.equal(result.isnan(), wrong)


@pytest.mark.parametrize("empty", [0, 1])
def test_no_channel_gives_no_element(empty):
    dense, *index = problem(300, (2,))
    index[empty] = index[empty][:, :0]
    assert gk.gather(gk.pack(dense), 300, *index).shape == (2, *(i.shape[-1] for i in index))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("20 channels has 210|elements", {"packed": torch.ones(7)}),
        ("packed must be float32", {"packed": torch.ones(400).half()}),
        ("dtype must be float32", {"dtype": torch.bfloat16}),
        ("rows must be int64", {"rows": torch.tensor([1.0])}),
        ("columns must be int64", {"columns": torch.tensor([[1]])}),
        ("on one device", {"columns": torch.tensor([1], device="meta")}),
    ],
)
def test_bad_arguments_are_refused(message, changes):
    arguments = {
        "packed": torch.ones(gk.packed_numel(20)),
        "channels": 20,
        "rows": torch.tensor([1]),
        "columns": torch.tensor([1]),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.gather(**arguments)


@pytest.mark.parametrize("channels", [1, 2, 255, 256, 257, 511, 512, 513, 1000, 11008, 14336])
def test_an_accumulator_knows_its_channels(channels):
    elements = gk.packed_numel(channels)
    assert tiles.channels_of(torch.empty(3, elements, device="meta")) == channels
    if channels > 1:
        with pytest.raises(gk.InputError, match="is no such number"):
            tiles.channels_of(torch.empty(elements + 1, device="meta"))
