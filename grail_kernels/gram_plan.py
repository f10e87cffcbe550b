"""The launches of a Gram call on a GPU, prepared once for every call of its form.

Kernels, grids and constants depend on the form of a call only: shapes, strides, dtypes, device and
the alignment of its pointers. A plan keeps them, with a slot for each tensor. Its first run goes
through Triton's own launcher, which compiles; later runs call what that compiled, with the
addresses of other tensors.

    plan = Plan(call)
    laid = plan.scratch("laid", (3, 100), torch.bfloat16)      a place in memory, none as yet
    plan.launch(kernel, (8,), laid_ptr=laid, x_ptr=call.x, H=100, num_warps=4)
    plan(call, addresses)                                      launches
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grail_kernels.gram_call import GramCall

# Each region of the scratch begins at a multiple of so many bytes; the copy engine asks for 16.
_ALIGNMENT = 512

# Descriptors of one launch, each for one address, that a plan keeps.
_KEPT_DESCRIPTORS = 16


class Slot(NamedTuple):
    """The place of a tensor that a kernel reads or writes.

    Attributes:
        source: the number of a tensor of the call, or of a region of the scratch after those.
        start: bytes from the first element of that tensor.
        dtype, shape, stride: of the view that the kernel takes.
    """

    source: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, sources: Sequence[Any]) -> Tensor:
        """The tensor at this place."""
        source: Tensor = sources[self.source]
        start = source.storage_offset() * source.itemsize + self.start
        view = source.new_empty(0, dtype=self.dtype)
        storage = source.untyped_storage()
        return view.set_(storage, start // self.dtype.itemsize, self.shape, self.stride)


class _Described(NamedTuple):
    """A tensor descriptor whose base is a slot."""

    descriptor: Any  # without memory
    slot: Slot


class _Base(NamedTuple):
    """The base of a descriptor, of which a launch wants the address only."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Step:
    """One launch of a plan, whose tensors are slots."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self._kernel, self._grid, self._arguments = kernel, (*grid, 1, 1)[:3], arguments
        self.runner: Any = None
        self._positional = [arguments.get(name) for name in kernel.arg_names]
        numbered = list(enumerate(self._positional))
        self._slots = [(i, a.source, a.start) for i, a in numbered if isinstance(a, Slot)]
        self._descriptors = [
            (i, a.slot.source, a.slot.start, _descriptors(a))
            for i, a in numbered
            if isinstance(a, _Described)
        ]

    def compile(self, sources: Sequence[Any]) -> None:
        """Launches through Triton, and keeps what that compiled; the interpreter has nothing."""
        arguments = {name: _filled(value, sources) for name, value in self._arguments.items()}
        compiled = self._kernel[self._grid](**arguments)
        if compiled is not None:
            self.runner = compiled[self._grid]

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launches what was compiled, on tensors at these addresses."""
        arguments = self._positional.copy()
        for position, source, start in self._slots:
            arguments[position] = addresses[source] + start
        for position, source, start, descriptor in self._descriptors:
            arguments[position] = descriptor(addresses[source] + start)
        self.runner(*arguments, stream=stream)


class Plan:
    """Launches for calls of one form, in their order, and the scratch that they share.

    Attributes:
        fits_others: False if a launch takes a tensor that was made for the first call alone, such
            as a copy of its mask.
    """

    def __init__(self, call: GramCall) -> None:
        self.fits_others = True
        self._device = call.out.device
        self._tensors = call.tensors  # until the first run
        self._steps: list[Step] = []
        self._regions: dict[str, int] = {}  # their bytes, by name
        self._scratch: list[tuple[Tensor, int]] = []

    def scratch(self, region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor at the start of a region, without memory until the plan runs.

        Launches follow one another, so that each may use a region again.
        """
        size = math.ceil(math.prod(shape) * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
        self._regions[region] = max(size, self._regions.get(region, 0))
        number = list(self._regions).index(region)
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._scratch.append((tensor, number))
        return tensor

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Adds a launch of a jitted kernel, on views of the call's tensors and of the scratch.

        The name of an argument that views a tensor of the call begins with that tensor's, as in
        "x_ptr".
        """
        placed = {name: self._placed(name, value) for name, value in arguments.items()}
        self._steps.append(Step(kernel, grid, placed))

    def __call__(self, call: GramCall, addresses: Sequence[int]) -> None:
        """Launches everything on the tensors of a call, whose `addresses` are in its order."""
        if call.out.is_cuda and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self(call, addresses)
            return
        sizes, scratch = list(self._regions.values()), None
        if sizes:
            scratch = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            starts = itertools.accumulate(sizes[:-1], initial=scratch.data_ptr())
            addresses = [*addresses, *starts]
        stream = None
        for step in self._steps:
            if step.runner is None:
                regions = () if scratch is None else scratch.split(sizes)
                step.compile((*call.tensors, *regions))
                continue
            if stream is None:
                stream = _stream(self._device)
            step.run(addresses, stream)
        self._tensors, self._scratch = (), []

    def _placed(self, name: str, value: Any) -> Any:
        """An argument of a launch, a tensor by its slot."""
        if isinstance(value, Tensor):
            return self._slot(name, value)
        if type(value).__name__ != "TensorDescriptor":
            return value
        base = self._slot(name, value.base)
        if not isinstance(base, Slot):
            return value
        return _Described(replace(value, base=_Base(0, base.dtype)), base)

    def _slot(self, name: str, tensor: Tensor) -> Slot | Tensor:
        """The place of a tensor, or itself where the call does not have it."""
        form = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        storage = tensor.untyped_storage()
        for kept, number in self._scratch:
            if kept.untyped_storage()._cdata == storage._cdata:
                return Slot(len(self._tensors) + number, tensor.data_ptr(), *form)
        number = GramCall._fields.index(name.partition("_")[0])
        source = self._tensors[number]
        if source is None or source.untyped_storage().data_ptr() != storage.data_ptr():
            self.fits_others = False
            return tensor
        return Slot(number, tensor.data_ptr() - source.data_ptr(), *form)


def _descriptors(described: _Described) -> Any:
    """A function from an address to the descriptor of what lies there."""

    @functools.lru_cache(_KEPT_DESCRIPTORS)
    def at(address: int) -> Any:
        return replace(described.descriptor, base=_Base(address, described.slot.dtype))

    return at


def _filled(value: Any, sources: Sequence[Any]) -> Any:
    """An argument of a launch with a tensor for its slot."""
    if isinstance(value, Slot):
        return value.view(sources)
    if isinstance(value, _Described):
        return replace(value.descriptor, base=value.slot.view(sources))
    return value


def _stream(device: torch.device) -> int:
    """The current stream of a GPU, as launches name it."""
    from triton.runtime import driver

    active: Any = driver.active
    return int(active.get_current_stream(device.index or 0))
