"""The correction product of a selection against fp64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import _absorb, reference
from tests.kernels.cases import LAYOUTS
from tests.kernels.conftest import Runner


def problem(channels: int, kept: int, outputs: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [O, H], a symmetric dense Gram [H, H] and an unsorted selection."""
    x = torch.randn(2 * channels, channels)
    gram = x.T @ x
    symmetric = gram.tril() + gram.tril(-1).T
    return torch.randn(outputs, channels), symmetric, torch.randperm(channels)[:kept]


def error(runner: Runner, weight: Tensor, gram: Tensor, keep: Tensor, packed: bool) -> float:
    """The error ratio of `gk.absorb`, for a weight of any dtype and strides and a dense Gram."""
    given = gk.pack(gram) if packed else gram
    on_device = [tensor.to(runner.device) for tensor in (weight, given, keep)]
    result = gk.absorb(*on_device, backend=runner.backend)
    assert result.dtype == gram.dtype
    exact = reference.absorb(weight, gram, keep)
    magnitude = reference.absorb(weight.abs(), gram.abs(), keep)
    return reference.error_ratio(result.cpu(), exact, magnitude)


both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@pytest.mark.parametrize(
    ("channels", "kept", "outputs"),
    [
        (1, 1, 1),
        (2, 1, 2),
        (17, 16, 15),
        (256, 100, 33),
        (257, 1, 129),
        (257, 256, 1),
        (600, 300, 33),
        (700, 129, 257),
    ],
)
@both_layouts
def test_all_sizes_match_fp64(
    runner: Runner, dtype: torch.dtype, packed: bool, channels: int, kept: int, outputs: int
) -> None:
    weight, gram, keep = problem(channels, kept, outputs)
    assert error(runner, weight.to(dtype), gram, keep, packed) < reference.ERROR_LIMIT


SELECTIONS = {
    "first": torch.arange(250),
    "last": torch.arange(350, 600),
    "middle": torch.arange(200, 450),
    "ends": torch.cat([torch.arange(120), torch.arange(480, 600)]),
    "every other, descending": torch.arange(599, 0, -2),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@both_layouts
def test_wherever_the_kept_channels_lie(runner: Runner, packed: bool, selection: str) -> None:
    weight, gram, _ = problem(600, 1)
    assert error(runner, weight, gram, SELECTIONS[selection], packed) < reference.ERROR_LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stride_of_the_weight(runner: Runner, layout: str) -> None:
    weight = LAYOUTS[layout](40, 300)
    weight = weight.reshape(-1, 300) if weight.dim() != 2 else weight
    _, gram, keep = problem(300, 120)
    assert error(runner, weight, gram, keep, packed=True) < reference.ERROR_LIMIT


def test_every_stride_of_the_gram(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(300, 120))
    expected = gk.absorb(weight, gram, keep, backend=runner.backend)
    whole = torch.full((602, 905), torch.nan, device=runner.device)
    whole[1::2, 4:904:3][:300] = gram
    for view in (whole[1::2, 4:904:3][:300], whole[1::2, 4:904:3][:300].T):
        # The twin sums the same blocks in the same order; so does the kernel its steps.
        assert torch.equal(gk.absorb(weight, view, keep, backend=runner.backend), expected)


def test_the_columns_follow_the_order_of_keep(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(300, 120))
    shuffle = torch.randperm(120)
    result = gk.absorb(weight, gk.pack(gram), keep, backend=runner.backend)
    shuffled = gk.absorb(weight, gk.pack(gram), keep[shuffle], backend=runner.backend)
    assert torch.equal(shuffled, result[:, shuffle])


@both_layouts
def test_every_element_is_written(runner: Runner, packed: bool) -> None:
    weight, gram, keep = problem(300, 129)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert error(runner, weight, gram, keep, packed) < reference.ERROR_LIMIT
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_call_gives_the_same_bits(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(600, 300))
    packed = gk.pack(gram)
    first, second = (gk.absorb(weight, packed, keep, backend=runner.backend) for _ in range(2))
    assert torch.equal(first, second)


@both_layouts
def test_keeping_everything_owes_nothing(runner: Runner, packed: bool) -> None:
    weight, gram, keep = problem(300, 300)
    assert error(runner, weight, gram, keep, packed) == 0.0


def test_a_consumer_without_rows_gives_none(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(300, 120, outputs=0))
    assert gk.absorb(weight, gk.pack(gram), keep, backend=runner.backend).shape == (0, 120)


def test_scratch_of_the_packed_gram_is_not_read(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(300, 120))
    packed = gk.pack(gram)
    expected = gk.absorb(weight, packed, keep, backend=runner.backend)
    for strip in gk.tiles.strips(300):
        block = strip.view(packed)[:, strip.low :]
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), torch.nan)
    assert torch.equal(gk.absorb(weight, packed, keep, backend=runner.backend), expected)


@both_layouts
def test_only_the_dropped_side_is_read(runner: Runner, packed: bool) -> None:
    weight, gram, keep = problem(300, 120)
    given = [t.to(runner.device) for t in (weight, gk.pack(gram) if packed else gram, keep)]
    expected = gk.absorb(*given, backend=runner.backend)
    weight[:, keep] = torch.nan
    gram[keep[:, None], keep] = torch.nan
    given = [t.to(runner.device) for t in (weight, gk.pack(gram) if packed else gram, keep)]
    assert torch.equal(gk.absorb(*given, backend=runner.backend), expected)


def test_a_gram_in_fp64_is_worked_on_in_fp64(runner: Runner) -> None:
    weight, gram, keep = problem(300, 120)
    gram = gram.double()
    result = gk.absorb(*(tensor.to(runner.device) for tensor in (weight, gk.pack(gram), keep)))
    exact = reference.absorb(weight, gram, keep)
    # 180 products of fp64: below 180 eps of the sum of their magnitudes.
    bound = 180 * torch.finfo(torch.float64).eps * reference.absorb(weight.abs(), gram.abs(), keep)
    assert ((result.cpu() - exact).abs() <= bound).all()


@pytest.mark.parametrize("which", ["weight", "gram"])
def test_triton_refuses_fp64(which: str) -> None:
    given = dict(zip(("weight", "gram", "keep"), problem(20, 8), strict=True))
    given[which] = given[which].double()
    with pytest.raises(gk.BackendError, match="use backend='auto'"):
        gk.absorb(**given, backend="triton")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(gk.InputError, match="backend must be one of"):
        gk.absorb(*problem(20, 8), backend="cublas")


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"\[outputs, channels\]", {"weight": torch.ones(3, 20, 3, 3)}),
        ("floating point", {"weight": torch.ones(3, 20, dtype=torch.int64)}),
        ("gram must be float32", {"gram": torch.ones(20, 20).half()}),
        ("20 channels", {"gram": torch.ones(21, 21)}),
        ("20 channels has", {"gram": torch.ones(19)}),
        ("1-D int64", {"keep": torch.ones(20, dtype=torch.bool)}),
        ("1-D int64", {"keep": torch.tensor([], dtype=torch.int64)}),
        (r"\[0, 20\)", {"keep": torch.tensor([3, 20])}),
        (r"\[0, 20\)", {"keep": torch.tensor([-1, 3])}),
        ("more than once", {"keep": torch.tensor([3, 3])}),
    ],
)
def test_bad_arguments_are_refused(message: str, changes: dict[str, Tensor]) -> None:
    arguments = {
        "weight": torch.ones(3, 20),
        "gram": torch.ones(20, 20),
        "keep": torch.tensor([0, 1]),
    } | changes
    with pytest.raises(gk.InputError, match=message):
        gk.absorb(**arguments)


def test_the_result_carries_no_gradient_history(runner: Runner) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(20, 8))
    result = gk.absorb(weight.requires_grad_(), gram, keep, backend=runner.backend)
    assert not result.requires_grad


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference mode", "autocast"],
)
def test_the_callers_mode_changes_no_bit(
    context: Callable[[], AbstractContextManager[object]], runner: Runner
) -> None:
    weight, gram, keep = (t.to(runner.device) for t in problem(300, 120))
    expected = gk.absorb(weight, gram, keep, backend=runner.backend)
    with context():
        assert torch.equal(gk.absorb(weight, gram, keep, backend=runner.backend), expected)


def truncated_product(
    total: Tensor, left: Tensor, right: Tensor, *, out: Tensor, out_dtype: torch.dtype
) -> None:
    """As tensor cores add: 16 exact products at a time to a sum that is cut off at 24 bits."""
    assert left.dtype == right.dtype == torch.bfloat16
    sums = torch.zeros_like(total)
    for step in zip(left.split(16, -1), right.split(16, -2), strict=True):
        exact = sums.double() + step[0].double() @ step[1].double()
        sums = exact.float()
        is_larger = sums.double().abs() > exact.abs()
        sums = torch.where(is_larger, torch.nextafter(sums, torch.zeros_like(sums)), sums)
    torch.add(total, sums, out=out)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU take the path of tensor cores."""
    monkeypatch.setattr(_absorb, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(torch, "addmm", truncated_product)
    monkeypatch.setattr(torch, "baddbmm", truncated_product)


@both_layouts
def test_parts_on_tensor_cores_are_as_exact_as_fp32(
    tensor_cores: None, dtype: torch.dtype, packed: bool
) -> None:
    weight, gram, keep = problem(1500, 40, outputs=5)
    # Of one sign, so that what truncation takes away adds up.
    weight, gram = weight.abs().to(dtype), gram.abs()
    result = gk.absorb(weight, gk.pack(gram) if packed else gram, keep)
    exact = reference.absorb(weight, gram, keep)
    ratio = reference.error_ratio(result, exact, exact)
    assert 1 < ratio < reference.ERROR_LIMIT  # the stand-in does truncate


def test_parts_of_a_batch_are_those_of_its_matrices(tensor_cores: None) -> None:
    weight, gram, keep, drop = batch()
    packed = gk.pack(gram)
    result = gk.absorb(weight, packed, keep, drop=drop)
    for matrix, given in enumerate(zip(weight, packed, keep, drop, strict=True)):
        assert torch.equal(result[matrix], gk.absorb(*given[:3], drop=given[3]))


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three weights [O, D], symmetric matrices [H, H], kept and dropped channels."""
    gram = torch.randn(3, 300, 300)
    order = torch.rand(3, 300).argsort(-1)
    keep, drop = order[:, :120], order[:, 120:280]
    return torch.randn(3, 9, 160), gram + gram.mT, keep, drop


@both_layouts
@pytest.mark.parametrize("result_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("single", [False, True])
def test_named_channels_and_batches(
    runner: Runner, packed: bool, result_dtype: torch.dtype, single: bool
) -> None:
    weight, gram, keep, drop = (t[0] if single else t for t in batch())
    exact = torch.empty(*weight.shape[:-1], keep.shape[-1], dtype=torch.float64)
    magnitude = torch.empty_like(exact)
    for number in range(1 if single else 3):
        at = (...,) if single else (number,)
        coupling = gram[at].double()[drop[at]][:, keep[at]]
        exact[at] = weight[at].double() @ coupling
        magnitude[at] = weight[at].double().abs() @ coupling.abs()
    given = (t.to(runner.device) for t in (weight, gk.pack(gram) if packed else gram, keep, drop))
    weight, gram, keep, drop = given
    result = gk.absorb(weight, gram, keep, drop=drop, dtype=result_dtype).cpu()
    assert result.dtype == result_dtype
    if result_dtype == torch.float64:
        assert bool(
            ((result - exact).abs() <= 160 * torch.finfo(torch.float64).eps * magnitude).all()
        )
    else:
        assert reference.error_ratio(result, exact, magnitude) < reference.ERROR_LIMIT


def test_the_fused_kernel_takes_named_channels(runner: Runner) -> None:
    weight, gram, keep, drop = (t[0] for t in batch())
    keep = torch.cat([keep, drop[:7]])  # what V G Vᵀ needs: dropped channels among the columns
    given = (t.to(runner.device) for t in (weight, gk.pack(gram), keep, drop))
    weight_, packed, keep_, drop_ = given
    result = gk.absorb(weight_, packed, keep_, runner.backend, drop=drop_).cpu()
    coupling = gram.double()[drop][:, keep]
    exact, magnitude = weight.double() @ coupling, weight.double().abs() @ coupling.abs()
    assert reference.error_ratio(result, exact, magnitude) < reference.ERROR_LIMIT


def test_a_batch_finds_what_each_matrix_drops() -> None:
    _, gram, keep, _ = batch()
    weight = torch.randn(3, 9, 300)
    result = gk.absorb(weight, gk.pack(gram), keep)
    for each in zip(result, weight, gk.pack(gram), keep, strict=True):
        assert torch.equal(each[0], gk.absorb(*each[1:]))
    keep[1, 3] = keep[1, 4]
    with pytest.raises(gk.InputError, match="more than once"):
        gk.absorb(weight, gk.pack(gram), keep)


@pytest.mark.parametrize("cores", [False, True], ids=["fp32", "parts"])
def test_nothing_is_read_where_dropped_channels_are_named(
    cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_absorb, "has_tensor_cores", lambda device: cores)
    added: list[torch.dtype] = []
    monkeypatch.setattr(
        _absorb, "_add_product", lambda total, left, right: added.append(right.dtype)
    )
    weight, gram, keep, drop = batch()
    # A tensor without values refuses to be read.
    given = [tensor.to("meta") for tensor in (weight, gk.pack(gram), keep)]
    result = gk.OPERATOR_FUNCTIONS["grail::absorb"](*given, "auto", drop.to("meta"), None)
    assert result.shape == (3, 9, 120)
    assert set(added) == {torch.bfloat16 if cores else torch.float32}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("the columns of drop alone, 3", {"drop": torch.tensor([1, 2, 3])}),
        ("drop must be a 1-D int64", {"drop": torch.ones(20)}),
        ("keep must be a 1-D int64", {"keep": torch.tensor([[0, 1]])}),
        ("is no such number", {"drop": torch.arange(20), "packed": torch.ones(19)}),
        ("one for each weight", {"packed": torch.ones(2, 400)}),
        ("dtype must be float32", {"dtype": torch.float16}),
        ("drop must be a torch.Tensor", {"drop": [1, 2]}),
    ],
)
def test_bad_named_channels_are_refused(message: str, changes: dict[str, object]) -> None:
    arguments = {
        "weight": torch.ones(3, 20),
        "packed": torch.ones(gk.packed_numel(20)),
        "keep": torch.tensor([0, 1]),
    } | changes
    weight, packed, keep = (arguments.pop(name) for name in ("weight", "packed", "keep"))
    with pytest.raises(gk.InputError, match=message):
        gk.absorb(weight, packed, keep, **arguments)
