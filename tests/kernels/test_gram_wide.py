"""The kernel for wide matrices: its schedule, and its source run by `gluon_mock`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from bench.kernels import launching
from bench.tools import model
from grail_kernels import gram_serve, reference, tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from tests.kernels import gluon_mock
from tests.kernels.cases import positive

gram_wide = pytest.importorskip("grail_kernels.gram_wide")

CONFIG = tuning.GramConfig("wide", 64, 256, group=4, warps=4, stages=8)
FEW_ROWS = tuning.GramConfig("wide", 64, 256, group=1, warps=4, stages=6)


class Launches:
    """A jitted kernel that a `Machine` runs; every element that it writes is counted."""

    def __init__(self, machine: gluon_mock.Machine, module: Any, name: str):
        self._machine, self._name = machine, name
        self.arg_names = getattr(module, name).arg_names
        self.written: dict[str, Tensor] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda num_warps=0, maxnreg=0, **arguments: self._machine.launch(
            self._name, grid, **{name: self._passed(name, a) for name, a in arguments.items()}
        )

    def _passed(self, name: str, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            self.written[name] = torch.zeros(argument.numel(), dtype=torch.int64)
            return gluon_mock.Pointer(argument.view(-1).numpy(), self.written[name].numpy())
        return argument if isinstance(argument, int) else gluon_mock.Descriptor(argument)


def planned(add: Any, call: GramCall, config: tuning.GramConfig) -> None:
    """Runs the launches that `add` plans for a call whose tokens have one dimension."""
    plan = Plan(call)
    batch = call.as_batch()
    add(plan, [batch._replace(x=batch.x[:, None])], config)
    plan(call, [0 if tensor is None else tensor.data_ptr() for tensor in call.tensors])


def run(
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
    out: Tensor,
    processors: int,
    config: tuning.GramConfig = CONFIG,
    **machine: Any,
) -> tuple[Launches, Launches]:
    """Adds the Gram matrix of `x` to `out`; the kernels as launched."""
    found = gluon_mock.Machine(gram_wide, model.walk, **machine)
    names = ("_gram_wide_kernel", "_add_shares_kernel")
    kernels = [Launches(found, gram_wide, name) for name in names]
    for name, kernel in zip(names, kernels, strict=True):
        monkeypatch.setattr(gram_wide, name, kernel)
    monkeypatch.setattr(gram_wide, "processors_of", lambda device: processors)
    planned(gram_wide.add, GramCall(out, x, None, None, None, None), config)
    return kernels[0], kernels[1]


def whole_numbers(tokens: int, channels: int) -> Tensor:
    """Activations whose sums of products are exact in fp32."""
    return torch.randint(-3, 4, (tokens, channels)).bfloat16()


def lower(packed: Tensor, channels: int) -> Tensor:
    return torch.cat([row[: i + 1] for i, row in enumerate(gk.unpack(packed, channels))])


ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

simulated = pytest.mark.skipif(interpreting(), reason="the mock runs without the interpreter")


@simulated
@pytest.mark.parametrize("config", [CONFIG, FEW_ROWS], ids=["default", "few rows"])
@pytest.mark.parametrize(
    ("tokens", "channels", "processors"),
    [
        (1, 8, 3),  # less than a tile, a chain, a program
        (300, 256, 4),  # both tiles of a block, two chains
        (1000, 600, 5),  # 12 tiles: two for each program, two shared
        (2600, 264, 4),  # 6 tiles: one each, two shared by four programs
        (3900, 136, 4),  # two tiles, all of it shared
        (520, 1032, 7),  # a last strip of 8 rows
    ],
)
def test_every_element_is_added_once(
    tokens: int,
    channels: int,
    processors: int,
    config: tuning.GramConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = whole_numbers(tokens, channels)
    out = torch.randint(-5, 6, (gk.packed_numel(channels),)).float()
    expected = lower(out, channels) + lower(gk.pack(x.float().T @ x.float()), channels)
    kernel, shares = run(monkeypatch, x, out, processors, config)
    assert torch.equal(lower(out, channels), expected)
    added, workspace = kernel.written["out_ptr"], kernel.written["shares_ptr"]
    assert (lower(added, channels) == 1).all()
    # A share of the workspace is written once, as a whole.
    assert set(workspace.view(-1, 128 * 256).sum(1).tolist()) <= {0, 128 * 256}
    assert workspace.max() <= 1
    work = gram_wide.schedule(channels, tokens, processors)
    assert bool(shares.written) == work.is_split


@simulated
def test_what_is_not_written_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    x = whole_numbers(2600, 264)
    out = torch.full((gk.packed_numel(264) + 2,), torch.nan)
    inside = out[1:-1].zero_()
    empty = torch.empty
    ones = 255  # in every byte: NaN
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(ones))
    run(monkeypatch, x, inside, processors=4)
    assert torch.equal(gk.unpack(inside, 264), x.float().T @ x.float())
    assert out[[0, -1]].isnan().all()


SCHEDULES = {"first": gluon_mock.first, "last": gluon_mock.last} | {
    f"random {seed}": gluon_mock.at_random(seed) for seed in range(3)
}


@simulated
@pytest.mark.parametrize("choice", SCHEDULES)
def test_the_bits_do_not_depend_on_time(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = positive(1800, 264).bfloat16()
    results = []
    for chosen in (gluon_mock.first, SCHEDULES[choice]):
        with monkeypatch.context() as patch:
            out = torch.zeros(gk.packed_numel(264))
            run(patch, x, out, processors=4, choice=chosen)
            results.append(gk.unpack(out, 264))
    assert torch.equal(*results)
    ratio = reference.error_ratio(results[0], reference.gram(x), reference.gram(x.abs()))
    assert ratio < reference.ERROR_LIMIT


# Text of the kernel, and the mistake that stands there instead.
MISTAKES = {
    "rows are not waited for": (
        "mbarrier.wait(full, (row_step + step) // ROW_SLOTS & 1)",
        "pass",
    ),
    "columns are not waited for": (
        "mbarrier.wait(columns_full.index(column_slot), column_step // COLUMN_SLOTS & 1)",
        "pass",
    ),
    "free rows are not waited for": (
        "mbarrier.wait(rows_free.index(slot), (row_step // ROW_SLOTS & 1) ^ 1)",
        "pass",
    ),
    "free columns are not waited for": (
        "mbarrier.wait(columns_free.index(slot), (column_step // COLUMN_SLOTS & 1) ^ 1)",
        "pass",
    ),
    "a slot is freed while its products run": (
        "chain = warpgroup_mma_wait(1, deps=(chain,))",
        "chain = warpgroup_mma_wait(2, deps=(chain,))",
    ),
    "a chain is read while its products run": (
        "chain = warpgroup_mma_wait(0, deps=(chain,))",
        "chain = warpgroup_mma_wait(1, deps=(chain,))",
    ),
    "rows are freed after the left half": ("if half == 1:", "if half == 0:"),
    "the last rows of a chain are not freed": (
        "mbarrier.arrive(rows_free.index((row_step + STEPS - 1) % ROW_SLOTS))",
        "pass",
    ),
    "too few bytes are expected": (
        "mbarrier.expect(full, 2 * rows_desc.block_type.nbytes)",
        "mbarrier.expect(full, rows_desc.block_type.nbytes)",
    ),
    "one group frees for both": ("free.index(slot), count=2", "free.index(slot), count=1"),
    "the second group multiplies the rows of the first": (
        "row_slot * 2 + OWN",
        "row_slot * 2",
    ),
    "a share is put where its tile begins": ("if is_first:", "if True:"),
    "the second tile of a share is left out": ("range(whole + 2)", "range(whole + 1)"),
}


@simulated
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MISTAKES[mistake]
    x = whole_numbers(2600, 264)
    found = []
    for choice in (gluon_mock.first, gluon_mock.last, gluon_mock.at_random(0)):
        with monkeypatch.context() as patch:
            out = torch.zeros(gk.packed_numel(264))
            try:  # of few rows, so that more than the columns' slots hold the copies back
                kernel, _ = run(patch, x, out, 4, FEW_ROWS, choice=choice, replaced={old: new})
            except (gluon_mock.DeadlockError, AssertionError, TypeError):
                found.append(True)
                continue
            once = (lower(kernel.written["out_ptr"], 264) == 1).all()
            found.append(not once or not torch.equal(gk.unpack(out, 264), x.float().T @ x.float()))
    assert any(found)


@pytest.mark.parametrize("processors", [7, 132])
@pytest.mark.parametrize("tokens", [1, 2000, 16_384])
@pytest.mark.parametrize("channels", [8, 2048, 4096, 11_008])
def test_every_chain_of_every_tile_has_one_program(
    channels: int, tokens: int, processors: int
) -> None:
    work = gram_wide.schedule(channels, tokens, processors)
    tiles = gram_wide.tiles_of(channels)
    assert work.programs <= processors
    assert work.whole * work.programs + work.shared == tiles
    assert work.programs * work.share >= work.shared * work.chains
    assert 0 < work.share <= work.chains  # a share touches two tiles at most
    assert work.chains == -(-tokens // tuning.CHAIN_TOKENS)


def test_the_last_wave_is_full_where_that_is_worth_it() -> None:
    # 272 tiles on 132 processors: two waves and 8 tiles, which 86 programs share, 3 chains each.
    work = gram_wide.schedule(4096, 8192, 132)
    assert (work.whole, work.shared, work.share, work.length) == (2, 8, 3, 2 * 32 + 3)
    # 72 tiles in place of the 132 that would fill the processors.
    assert gram_wide.schedule(2048, 8192, 132).length == 18
    # 1056 tiles are 8 full waves.
    assert gram_wide.schedule(8192, 8192, 132).length == 8 * 32
    # 130 tiles of 132: a share is no shorter than a tile, and nothing is split.
    nearly = gram_wide.Schedule(132, 32, 0, 130, 32)
    assert not nearly.is_split
    assert nearly.length == 32
    assert not gram_wide.schedule(2688, 8192, 132).is_split


needs_interpreter = pytest.mark.skipif(not interpreting(), reason="test_interpreter.py runs it")


@needs_interpreter
def test_shares_are_added_by_the_triton_kernel() -> None:
    """Against the mock's own run of that kernel."""
    channels, tokens, processors = 264, 2600, 4
    work = gram_wide.schedule(channels, tokens, processors)
    shares = torch.randn(work.programs, 128, 256)
    machine = gluon_mock.Machine(gram_wide, model.walk)
    results = []
    for kernel in (
        gram_wide._add_shares_kernel,
        Launches(machine, gram_wide, "_add_shares_kernel"),
    ):
        out = torch.ones(gk.packed_numel(channels))
        kernel[(work.shared, 128 // gram_wide.SHARE_ROWS)](
            out_ptr=out,
            shares_ptr=shares,
            H=channels,
            chains=work.chains,
            whole_tiles=work.whole * work.programs,
            share=work.share,
            GROUP=4,
            ROWS=gram_wide.SHARE_ROWS,
        )
        results.append(out)
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones_like(results[0]))


@needs_interpreter
def test_a_whole_call_with_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices, a mask, sums and counts; what is laid out, shared and collected."""
    tokens, channels = 2600, 272
    machine = gluon_mock.Machine(gram_wide, model.walk)
    kernel = Launches(machine, gram_wide, "_gram_wide_kernel")
    monkeypatch.setattr(gram_wide, "_gram_wide_kernel", kernel)
    monkeypatch.setattr(gram_wide, "processors_of", lambda device: 4)
    monkeypatch.setattr(tuning, "BUFFER_TOKENS", 2560)
    x = whole_numbers(2 * tokens, channels).half().view(2, tokens, channels)
    mask = torch.rand(tokens) > 0.3
    masked = x * mask[:, None]
    x[:, ~mask] = torch.nan
    x[1, int(mask.nonzero()[7]), 100] = torch.inf
    out = torch.ones(2, gk.packed_numel(channels))
    sums = torch.ones(2, channels)
    counts = torch.ones(2, channels, dtype=torch.int64)
    call = GramCall(out, x, mask.view(torch.uint8), None, sums, counts)
    planned(gram_wide.add, call, CONFIG)
    exact = gk.pack(masked.float().mT @ masked.float())
    assert torch.equal(lower(out[0], channels), 1 + lower(exact[0], channels))
    finite = torch.ones(channels).bool().index_fill(0, torch.tensor([100]), False)
    assert torch.equal(gk.diagonal(out[1], channels).isfinite(), finite)
    assert torch.equal(counts[0], torch.ones_like(counts[0]))
    assert torch.equal(counts[1], 1 + (~finite).long())
    assert torch.equal(sums[0], 1 + masked[0].float().sum(0))
    assert torch.equal(sums[1, finite], 1 + masked[1].float().sum(0)[finite])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"x": torch.zeros(1, 1, 4, 32)}, False),
        ({"x": torch.zeros(1, 1, 4, 24).half()}, False),
        ({"weights": torch.ones(4)}, False),
        ({"gate": torch.zeros(1, 1, 4, 32).half()}, False),
        ({"offsets": torch.tensor([0, 4])}, False),
        ({"mask": torch.ones(4, dtype=torch.uint8)}, True),
    ],
)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_calls_that_the_kernel_takes(
    change: dict[str, Tensor],
    expected: bool,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "architecture_of", lambda device: architecture)
    x = torch.zeros(1, 1, 4, 32).half()
    call = GramCall(torch.zeros(1, 1), x, None, None, None, None)._replace(**change)
    assert gram_wide.takes(call) == (expected and architecture == "sm_90")


@pytest.mark.skipif(interpreting(), reason="interpreted kernels do not compile")
def test_calls_of_a_form_reach_the_driver_with_their_own_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table that lists the kernel, and a driver that launches nothing."""
    launches = tuning.gram_launches
    monkeypatch.setattr(tuning, "gram_launches", lambda *a, **k: (CONFIG, *launches(*a, **k)))
    monkeypatch.setattr(gram_wide, "processors_of", lambda device: 132)
    with launching.silent_h100() as driver:
        gk.gram_(*launching.call(4096)[:6])
        driver.launched.clear()
        call = launching.call(4096)
        gk.gram_(*call[:6])
    wide, shares = driver.launched
    assert (wide.kernel, wide.grid) == ("_gram_wide_kernel", (132, 1, 1))
    assert (shares.kernel, shares.grid) == ("_add_shares_kernel", (8, 8, 1))
    out, workspace, rows, columns, *numbers = wide.arguments
    assert (out, workspace) == (call.out.data_ptr(), shares.arguments[1])
    assert [d.base.data_ptr() for d in (rows, columns)] == [call.x.data_ptr()] * 2
    assert [d.block_shape for d in (rows, columns)] == [[64, 64], [64, 128]]
    assert numbers[:5] == [4096, 8, 2, 8, 3]  # H, chains, whole and shared tiles, share


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of sm_90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [(1, 16), (255, 256), (257, 272), (1000, 2064), (8192, 4096), (5000, 5136)],
)
def test_on_a_gpu_it_agrees_with_fp64_and_repeats(
    tokens: int, channels: int, dtype: torch.dtype
) -> None:
    x = positive(tokens, channels).to("cuda", dtype)
    results = []
    for _ in range(2):
        whole = torch.full((gk.packed_numel(channels) + 64,), torch.nan, device="cuda")
        out = whole[32:-32].zero_()
        planned(gram_wide.add, GramCall(out, x, None, None, None, None), CONFIG)
        assert whole[:32].isnan().all()
        assert whole[-32:].isnan().all()
        results.append(gk.unpack(out, channels))
    assert torch.equal(*results)
    ratio = reference.error_ratio(results[0], reference.gram(x), reference.gram(x.abs()))
    assert ratio < reference.ERROR_LIMIT


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of sm_90")
def test_on_a_gpu_a_listed_launch_serves_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_for: list[int] = []
    add = gram_wide.add

    def noted(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
        planned_for.extend(part.x.shape[-2] for part in parts)
        add(plan, parts, config)

    monkeypatch.setattr(gram_wide, "add", noted)
    gram_serve.forget_forms()
    monkeypatch.setattr(tuning, "gram_launches", lambda *_, **__: (CONFIG,))
    x = positive(20_000, 2064).bfloat16()
    mask = torch.rand(20_000) > 0.3
    sums = torch.zeros(2064, device="cuda")
    out = torch.zeros(gk.packed_numel(2064), device="cuda")
    gk.gram_(out, x.cuda(), mask=mask.cuda(), sums=sums)
    gram_serve.forget_forms()
    assert sum(planned_for) == 20_000
    exact, magnitude = reference.gram(x, mask), reference.gram(x.abs(), mask)
    ratio = reference.error_ratio(gk.unpack(out, 2064).cpu(), exact, magnitude)
    assert ratio < reference.ERROR_LIMIT
    assert torch.allclose(sums.cpu().double(), reference.channel_sums(x, mask), rtol=1e-4)


@simulated
def test_values_that_are_not_finite_show_on_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    x = whole_numbers(2600, 264)
    x[2500, 5], x[7, 100], x[0, 263] = torch.nan, torch.inf, -torch.inf
    out = torch.zeros(gk.packed_numel(264))
    run(monkeypatch, x, out, processors=4)
    assert torch.equal(gk.diagonal(out, 264).isfinite(), x.isfinite().all(0))
