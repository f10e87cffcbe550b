"""A Gluon kernel on a CPU, from its own source, at the mercy of the worst schedule.

Every partition of `warp_specialize` is a thread, and one of them runs at a time: at each operation
on a barrier the `choice` names the next. What the hardware may do at any time happens here when it
hurts most: a copy fills its slot with NaN when it is issued and brings the data when its barrier is
waited for; a product reads its operands when it is waited for. A slot that is read or overwritten
too early gives NaN, a wait that nothing ends raises `DeadlockError`.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Choice = Callable[[list[int]], int]


class DeadlockError(Exception):
    """Every partition waits."""


def first(runnable: list[int]) -> int:
    return runnable[0]


def last(runnable: list[int]) -> int:
    return runnable[-1]


def at_random(seed: int) -> Choice:
    return random.Random(seed).choice


class Partitions:
    """Threads, one of which runs at a time."""

    def __init__(self, choice: Choice):
        self._choice = choice
        self._turn = threading.Condition()
        self._conditions: dict[int, Callable[[], bool]] = {}
        self._running = -1
        self._problem: BaseException | None = None
        self._local = threading.local()

    def run(self, calls: list[Callable[[], None]]) -> None:
        self._conditions = {index: lambda: True for index in range(len(calls))}
        threads = [threading.Thread(target=self._work, args=pair) for pair in enumerate(calls)]
        for thread in threads:
            thread.start()
        with self._turn:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self._problem:
            raise self._problem

    def wait(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Lets others run, at least until the condition holds."""
        own = self._local.index
        with self._turn:
            self._conditions[own] = condition
            self._pass_on()
            self._wait_for_turn(own)

    def _work(self, index: int, call: Callable[[], None]) -> None:
        self._local.index = index
        try:
            with self._turn:
                self._wait_for_turn(index)
            call()
        except BaseException as problem:
            with self._turn:
                self._problem = self._problem or problem
        with self._turn:
            del self._conditions[index]
            self._pass_on()

    def _wait_for_turn(self, own: int) -> None:
        self._turn.wait_for(lambda: self._running == own or self._problem)
        if self._problem:
            raise DeadlockError

    def _pass_on(self) -> None:
        runnable = [index for index, holds in self._conditions.items() if holds()]
        if runnable:
            self._running = self._choice(runnable)
        elif self._conditions and not self._problem:
            self._problem = DeadlockError(f"partitions {list(self._conditions)} wait")
        self._turn.notify_all()


class Barrier:
    """A barrier in shared memory: a phase ends after its arrivals and the bytes expected."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.copies: deque[Callable[[], None]] = deque()

    def arrive(self, arrivals: int = 0, expected: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += expected
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if not self.pending and not self.bytes:
            self.phase ^= 1
            self.pending = self.count

    def land(self) -> None:
        """Brings what was copied so far."""
        while self.copies:
            self.copies.popleft()()


class Memory:
    """Shared memory: an array of numbers, or a list of barriers."""

    def __init__(self, held: Any):
        self.held = held

    def index(self, index: int) -> Any:
        found = self.held[index]
        return Memory(found) if isinstance(found, np.ndarray) else found

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.held.transpose(order))


class Accumulator:
    """The result of products of which some may be in flight; nothing but a wait reads it."""

    __array_ufunc__ = None

    def __init__(self, value: np.ndarray):
        self.value = value


class Number(int):
    """An integer with a type."""

    def to(self, dtype: type) -> int:
        return int(self)


class Pointer:
    """An element of an array of which so many were written."""

    def __init__(self, array: np.ndarray, written: np.ndarray, offset: Any = 0):
        self.array, self.written, self.offset = array, written, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.written, self.offset + offset)

    def write(self, value: np.ndarray, mask: Any, add: bool) -> None:
        offsets = np.broadcast_to(self.offset, value.shape)
        chosen = np.broadcast_to(True if mask is None else mask, value.shape)
        places = offsets[chosen]
        self.written[places] += 1
        self.array[places] = value[chosen] + (self.array[places] if add else 0)

    def read(self, mask: Any = True, other: float = 0.0) -> np.ndarray:
        offsets, chosen = np.broadcast_arrays(self.offset, mask)
        return np.where(chosen, self.array[np.where(chosen, offsets, 0)], np.float32(other))


class Descriptor:
    """Activations in blocks, as a `TensorDescriptor` describes them."""

    def __init__(self, described: Any):
        self.block = tuple(described.block_shape)
        self.x = described.base.float().numpy()
        self.dtype, self.layout = "16-bit", described.layout
        self.block_type = SimpleNamespace(nbytes=2 * int(np.prod(self.block)), shape=self.block)

    def read(self, token: int, channel: int) -> np.ndarray:
        block = np.zeros(self.block, np.float32)
        part = self.x[token : token + self.block[0], channel : channel + self.block[1]]
        block[: part.shape[0], : part.shape[1]] = part
        return block


class Machine:
    """A multiprocessor that runs one program after another.

    Args:
        module: with the kernels.
        choice: the partition, of those that can run, that runs next.
        replaced: texts in the source of the kernels, and what stands there instead.
        walk: the (row, column) of each block, by the number of rows and the group.
    """

    def __init__(
        self,
        module: ModuleType,
        walk: Callable[[int, int], list[tuple[int, int]]],
        choice: Choice = first,
        replaced: dict[str, str] | None = None,
    ):
        self._choice, self._walk = choice, walk
        self._program: tuple[int, ...] = ()
        self._programs: tuple[int, ...] = ()
        self._local = threading.local()
        language = self._language()
        self.space = vars(module) | {
            "gl": language,
            "tl": language,
            "mbarrier": self._barriers(),
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
            "tile_of": self._tile_of,
        }
        self.partitions = Partitions(choice)
        left = dict(replaced or {})
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)  # of what `jit` decorates
            if inspect.isfunction(function) and name != "tile_of":
                self._define(name, function, left)
        assert not left, f"not in the source: {left}"

    def launch(self, kernel: str, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        """Runs every program of a launch."""
        self._programs = grid
        for index in np.ndindex(*grid):
            self._program = index
            self.space[kernel](*arguments, **named)

    def _define(self, name: str, function: Any, left: dict[str, str]) -> None:
        source = textwrap.dedent(inspect.getsource(function))
        for old in [old for old in left if old in source]:
            source = source.replace(old, left.pop(old))
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
                for argument in node.args.args:
                    argument.annotation = None
        exec(compile(tree, name, "exec"), self.space)

    def _language(self) -> SimpleNamespace:
        def allocate(dtype: type, shape: list[int], layout: Any) -> Memory:
            if dtype is np.int64:
                return Memory([Barrier() for _ in range(shape[0])])
            return Memory(np.full(shape, np.nan, np.float32))

        return SimpleNamespace(
            float32=np.float32,
            int32=np.int32,
            int64=np.int64,
            minimum=min,
            where=lambda condition, yes, no: yes if condition else no,
            cdiv=lambda a, b: -(-a // b),
            static_range=range,
            arange=lambda low, high, layout=None: np.arange(low, high),
            zeros=lambda shape, dtype, layout=None: np.zeros(shape, dtype),
            program_id=lambda axis: self._program[axis],
            num_programs=lambda axis: self._programs[axis],
            allocate_shared_memory=allocate,
            SliceLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None,
            warp_specialize=self._specialize,
            atomic_add=lambda ptr, value, mask, sem: ptr.write(value, mask, add=True),
            store=lambda ptr, value, mask=None: ptr.write(value, mask, add=False),
            load=lambda ptr, mask=True, other=0.0: ptr.read(mask, other),
        )

    def _specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        self.partitions = Partitions(self._choice)
        self.partitions.run([lambda part=part: part[0](*part[1]) for part in parts])

    def _barriers(self) -> SimpleNamespace:
        def initialise(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        def wait(barrier: Barrier, phase: int) -> None:
            def has_ended() -> bool:
                if barrier.phase == phase:
                    barrier.land()
                return barrier.phase != phase

            self.partitions.wait(has_ended)

        def arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
            barrier.arrive(count if pred else 0)
            self.partitions.wait()

        return SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=initialise,
            wait=wait,
            arrive=arrive,
            expect=lambda barrier, count: barrier.arrive(1, count),
        )

    def _copy(self, described: Descriptor, place: list[int], full: Barrier, slot: Memory) -> None:
        slot.held[...] = np.nan

        def land() -> None:
            slot.held[...] = described.read(*place)
            full.arrive(0, -described.block_type.nbytes)

        full.copies.append(land)
        self.partitions.wait()

    def _multiply(
        self, rows: Memory, columns: Memory, total: Any, use_acc: bool, is_async: bool
    ) -> Accumulator:
        assert is_async
        flying = self._local.__dict__.setdefault("flying", deque())
        result = total if isinstance(total, Accumulator) else Accumulator(total)
        flying.append((result, rows.held, columns.held, use_acc))
        return result

    def _wait_for_products(self, in_flight: int, deps: tuple[Accumulator]) -> Any:
        """The accumulator; as numbers, if nothing is in flight."""
        flying = self._local.__dict__.setdefault("flying", deque())
        while len(flying) > in_flight:
            result, rows, columns, use_acc = flying.popleft()
            with np.errstate(invalid="ignore"):
                result.value = rows @ columns + (result.value if use_acc else 0)
        return deps[0] if flying else deps[0].value

    def _tile_of(self, block: int, block_rows: int, group: int) -> tuple[Number, Number]:
        walk = self._walk(block_rows, group)
        row, column = walk[block] if block < len(walk) else (0, 0)  # of no tile: nobody asks
        return Number(row), Number(column)
