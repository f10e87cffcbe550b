"""Host time of a Gram call, by phase, with a driver that launches nothing.

    python -m bench.kernels.launching

CPU time of one thread: the least of many rounds. The first call of a form compiles for an H100.
How to read the table: docs/benches.md.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import grail_kernels as gk
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from bench.tools.tables import aligned
from grail_kernels import gram_blocks, gram_serve, gram_tma, operators, tuning
from grail_kernels.gram_call import GramCall

ROUNDS, CALLS = 30, 50


class Launched(NamedTuple):
    """A launch as a driver gets it."""

    kernel: str
    grid: tuple[int, ...]
    stream: int
    arguments: tuple[Any, ...]


class SilentDriver:
    """A driver of an H100 for Triton that compiles kernels, notes launches and makes none."""

    # Of the class: Triton keeps the launcher of the driver that a kernel was compiled with.
    launched: ClassVar[list[Launched]] = []

    def __init__(self) -> None:
        self.launched.clear()
        self.utils = self

    def launcher_cls(self, source: object, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            *grid, stream = arguments[:4]
            self.launched.append(Launched(metadata.name, tuple(grid), stream, arguments[9:]))

        return launch

    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 1, 1, 100, 0, 1024  # handles, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def silent_h100() -> Iterator[SilentDriver]:
    """A context in which calls on CPU tensors take the way of an H100, but for the launch."""
    from triton.runtime import driver

    silent, before = SilentDriver(), driver._active
    driver.set_active(silent)
    patches = (
        (gram_serve, "resolve_backend", "triton"),
        (tuning, "architecture_of", "sm_90"),
        (gram_blocks, "processors_of", 132),
        (gram_tma, "runs_on", True),
    )
    gram_serve.forget_forms()
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, return_value=value))
        try:
            yield silent
        finally:
            driver._active = before
            gram_serve.forget_forms()


def call(channels: int, dtype: torch.dtype = torch.bfloat16, collects: bool = False) -> GramCall:
    """A call on 2048 tokens, of which the scratch is small enough for a CPU to allocate at once."""
    x = torch.zeros(2048, channels, dtype=dtype)
    out = torch.zeros(gk.packed_numel(channels))
    if not collects:
        return GramCall(out, x, None, None, None, None)
    mask, sums = torch.ones(2048, dtype=torch.bool), torch.zeros(channels)
    return GramCall(out, x, mask, None, sums, torch.zeros(channels, dtype=torch.int64))


CASES = {
    "bf16, 4096 channels": lambda: call(4096),
    "bf16, 1024 channels, tokens split": lambda: call(1024),
    "bf16, 4096 channels, mask, sums, counts": lambda: call(4096, collects=True),
    "fp32, 1024 channels": lambda: call(1024, torch.float32),
}


def microseconds(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU time of one call on this thread, the least of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            function()
        best = min(best, (time.thread_time_ns() - start) / CALLS)
    return best / 1e3


def phases(case: GramCall) -> dict[str, float]:
    """Microseconds of one call: the whole of it, and its parts."""
    written = case.out, case.sums, case.nonfinite

    def whole() -> Tensor:
        return gk.gram_(*case[:6])

    whole()
    served = microseconds(lambda: gram_serve.serve(case))
    (form,) = (f for f in gram_serve._FORMS.values())
    addresses: Sequence[int] = [0 if t is None else t.data_ptr() for t in case.tensors]
    launching = microseconds(lambda: form.add(case, addresses))
    return {
        "whole": microseconds(whole),
        "kind of call": microseconds(lambda: operators.needs_operator(case.tensors, written)),
        "look-up and overlaps": served - launching,
        "launches": launching,
        "through the operator": microseconds(lambda: torch.ops.grail.gram_(*case[:6])),
    }


def measure() -> list[Row]:
    """A row for each case and phase."""
    rows: list[Row] = []
    for name, make in CASES.items():
        with silent_h100():
            found = phases(make())
        rows += [
            {"kernel": "launching", "case": name, "phase": phase, "unit": "us", "p50": f"{us:.3g}"}
            for phase, us in found.items()
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = CommandLine(__doc__, takes="20 seconds", results="launching")
    options: argparse.Namespace = parser.read(arguments)
    torch.set_num_threads(1)
    rows = measure()
    table = [[str(row[key]) for key in ("case", "phase", "p50")] for row in rows]
    print(aligned(["case", "phase", "us"], table, words=2))
    save(options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
