"""The search of `greedy` for channels: its time over its floor, beside other load, and for experts.

    python -m bench.kernels.search                         three cases
    python -m bench.kernels.search --shape 1536,4096,2048  O, H and K of the first case; repeatable

    floor     seconds of one thread, or of a GPU, over those of its FLOPs at the rate of a product
    threads   wall seconds with two threads and with one, while as many processes as cores are busy
    batch     64 experts of 768 channels, 384 kept, in one call and in 64

Times are those of a site's whole choice, from its packed Gram on. On a CPU they are seconds of the
process in one thread, which others' work changes little, but for the case `threads`. How to read
the table: docs/benches.md.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bench.kernels import cases, ridge
from bench.tools.commandline import CommandLine, sizes
from bench.tools.measuring import PAUSE, Row, percentiles, seconds_of
from bench.tools.tables import aligned
from grail import select
from grail.algebra.width import ChannelWidth

SHAPES = ((1536, 4096, 2048), (576, 1536, 768))  # O, H and K; the second is SmolLM2's MLP
PRODUCT = 4096  # of the square product whose rate is the floor's
EXPERTS, EXPERT = 64, (2048, 768, 384)  # of Qwen3-30B-A3B, half of its experts

Sizes = tuple[int, ...]


def view(shape: Sizes, device: str) -> select.View:
    """A random site of O, H and K whose channels are correlated."""
    outputs, channels, kept = shape
    site = ridge.site(outputs, channels, kept / channels, device)
    width = ChannelWidth(channels, kept)
    return select.View((), site.weight, site.gram, width, torch.Generator())


def choices(views: Sequence[select.View]) -> list[Tensor]:
    """The channels that stay of each site, in one call."""
    found = select.answers(select.get("greedy"), views)
    return [reduction.index for reduction in found if hasattr(reduction, "index")]


def flops(shape: Sizes) -> float:
    """FLOPs of a search by count: W·G, and for each choice a row of S and an update of A."""
    outputs, channels, kept = shape
    return channels * kept**2 + 2 * kept * outputs * channels + 2 * outputs * channels**2


def turns(calls: dict[str, Callable[[], object]], device: str, repeats: int, wall: bool) -> dict:
    """Seconds of each call, in turns, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    like = torch.empty(0, device=device)
    for number in range(repeats + 1):
        for name, call in calls.items():
            time.sleep(0 if like.is_cuda else PAUSE)
            if like.is_cuda or wall:
                elapsed = seconds_of(lambda _, call=call: call(), like)
            else:
                start = time.process_time()
                call()
                elapsed = time.process_time() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy() -> Iterator[None]:
    """Keeps as many processes as there are cores busy."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rows(case: str, shape: Sizes, seconds: dict[str, list[float]], base: str) -> list[Row]:
    """The rows of a case; `ratio`: the median over that of the provider `base`."""
    named = zip(("outputs", "channels", "kept"), map(str, shape), strict=True)
    of = {"kernel": "search", "case": case, **dict(named), "provider": ""}
    timed = {name: percentiles(each) for name, each in seconds.items()}
    unit = float(timed[base]["p50"])
    return [
        of | {"provider": name, **row, "ratio": f"{float(row['p50']) / unit:.3g}"}
        for name, row in timed.items()
    ]


def over_floor(shape: Sizes, device: str, repeats: int) -> list[Row]:
    """The case `floor`.

    Raises:
        ArithmeticError: the chosen channels explain less than those of most energy.
    """
    site = view(shape, device)
    kept = choices([site])[0]
    errors = [lost(site, index) for index in (kept, select.get("gram")(site).index)]
    if not errors[0] < errors[1]:
        raise ArithmeticError(f"O, H, K = {shape}: greedy leaves {errors[0]}, energy {errors[1]}")
    square = torch.randn(PRODUCT, PRODUCT, device=device)
    calls = {"greedy": partial(choices, [site]), "floor": partial(torch.mm, square, square)}
    with threads(1):
        seconds = turns(calls, device, repeats, wall=False)
    share = flops(shape) / (2 * PRODUCT**3)
    seconds["floor"] = [share * each for each in seconds["floor"]]
    return rows("floor", shape, seconds, "floor")


def lost(site: select.View, index: Tensor) -> float:
    """‖W·X − W'·R·X‖² of the best W' for channels that stay."""
    gram, weight = site.gram.matrix().double(), site.consumer.double()
    kept = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    kept[index.to(gram.device)] = True
    own, cross = gram[kept][:, kept], gram[kept][:, ~kept]
    schur = gram[~kept][:, ~kept] - cross.mT @ torch.linalg.solve(own, cross)
    left = weight[:, ~kept]
    return float((left @ schur * left).sum())


def beside_load(shape: Sizes, device: str, repeats: int) -> list[Row]:
    """The case `threads`.

    Raises:
        ArithmeticError: the choice depends on the number of threads.
    """
    site = view(shape, device)
    found = []

    def chosen(count: int) -> None:
        with threads(count):
            found.append(choices([site])[0])

    calls = {"two threads": partial(chosen, 2), "one thread": partial(chosen, 1)}
    with busy():
        seconds = turns(calls, device, repeats, wall=True)
    if not all(torch.equal(each, found[0]) for each in found):
        raise ArithmeticError(f"O, H, K = {shape}: the choice depends on the number of threads")
    return rows("threads", shape, seconds, "one thread")


def of_experts(shape: Sizes, count: int, device: str, repeats: int) -> list[Row]:
    """The case `batch`.

    Raises:
        ArithmeticError: experts are chosen for otherwise together than alone.
    """
    views = [view(shape, device) for _ in range(count)]

    def alone() -> list[Tensor]:
        return [choices([each])[0] for each in views]

    if not all(map(torch.equal, choices(views), alone())):
        raise ArithmeticError(f"{count} experts are chosen for otherwise together than alone")
    calls = {"together": partial(choices, views), "one by one": alone}
    with threads(1):
        seconds = turns(calls, device, repeats, wall=False)
    return [row | {"sites": str(count)} for row in rows("batch", shape, seconds, "one by one")]


def show(found: list[Row]) -> str:
    """The rows of one case as text."""
    first = found[0]
    shape = f"{first['outputs']} outputs x {first['channels']} channels, {first['kept']} kept"
    lines = [
        (
            row["provider"],
            *(f"{1e3 * float(row[name]):.1f}" for name in ("p20", "p50", "p80")),
            row["ratio"],
        )
        for row in found
    ]
    names = ("provider", "p20", "p50", "p80", "ratio")
    return f"\n{first['case']}: {shape}; ms\n{aligned(names, lines)}"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    parser = CommandLine(
        __doc__,
        *("device", "repeats", "seconds"),
        takes="three minutes on two cores",
        results="search{device}",
        repeats={"default": 5},
    )
    parser.add_argument("--shape", action="append", type=sizes("O,H,K"), metavar="O,H,K")
    parser.add_argument("--experts", type=int, default=EXPERTS, help="default %(default)s")
    options = parser.read(arguments)
    cases.announce(options.device)
    of = (options.device, options.repeats)
    shapes = options.shape or SHAPES
    todo = [(f"floor {shape}", partial(over_floor, shape, *of)) for shape in shapes]
    if options.device == "cpu":
        todo.append(("threads", partial(beside_load, shapes[-1], *of)))
    expert = shapes[-1] if options.shape else EXPERT
    todo.append(("batch", partial(of_experts, expert, options.experts, *of)))
    return cases.run(options, todo, show)


if __name__ == "__main__":
    raise SystemExit(main())
