"""Progress bars that name the block and the pass, and keep moving while a solve takes long."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """The bar of a run over blocks: `block 15/30, pass 2/3, solve`.

    Args:
        blocks: how many there are.
        tokens: of one pass.
        passes: how many there are in all; one over some of the tokens is a part of a pass.
        phase: returns what the run is doing.
        shown: whether there is a bar.
        label: of a block.
    """

    def __init__(
        self,
        blocks: int,
        tokens: int,
        passes: float,
        phase: Callable[[], str],
        shown: bool,
        label: str = "block",
    ):
        self._blocks, self._tokens, self._phase, self._label = blocks, tokens, phase, label
        self._block = self._passes = self._seen = 0
        self._bar = tqdm(
            total=round(tokens * passes), unit="tok", unit_scale=True, disable=not shown
        )

    def start(self, block: int, passes: float) -> None:
        """Begins a block, counted from 0, that takes so many passes."""
        self._block, self._passes, self._seen = block, math.ceil(passes), 0
        self.describe()

    def advance(self, tokens: int) -> None:
        """Counts tokens of the present pass."""
        self._seen += tokens
        self.describe()
        self._bar.update(tokens)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def describe(self) -> None:
        """Puts block, pass and phase before the bar."""
        parts = [f"{self._label} {self._block + 1}/{self._blocks}"]
        if self._passes > 1:
            done = self._seen // self._tokens if self._tokens else 0
            parts.append(f"pass {min(done + 1, self._passes)}/{self._passes}")
        self._bar.set_description(", ".join([*parts, self._phase()]), refresh=False)

    def __enter__(self) -> "Progress":
        self._ticking = ticking(self._bar, self.describe)
        self._ticking.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ticking.__exit__(*error)
        self._bar.close()


class Countdown:
    """Passes tokens on to a bar until so many are counted; work of unknown length ends in time.

    Args:
        tokens: how many are counted in all.
        advance: called with them.
    """

    def __init__(self, tokens: int, advance: Callable[[int], object]):
        self._left, self._advance = tokens, advance

    def __call__(self, tokens: int) -> None:
        """Counts tokens, no more than are left."""
        counted = min(tokens, self._left)
        self._left -= counted
        if counted:
            self._advance(counted)

    def finish(self) -> None:
        """Counts all that are left."""
        self(self._left)


@contextmanager
def ticking(
    bar: Any, describe: Callable[[], None] = lambda: None, seconds: float = 2.0
) -> Iterator[None]:
    """Redraws a bar every few seconds, from a thread of its own."""
    if bar.disable:
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(seconds):
            describe()
            bar.refresh()

    thread = threading.Thread(target=tick, name="grail-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
