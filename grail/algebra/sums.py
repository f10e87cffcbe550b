"""Sums of a Gram on one device: G packed, Σ x, counts of NaN and Inf, and tokens that wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

import grail_kernels as gk

# torch shares a sum over as many values or more among its threads. Those spin for 9 ms afterwards,
# on the cores that the products need next.
_SERIAL_VALUES = 32768


class Sums:
    """Sums of one Gram. Small batches wait until they are worth a launch.

    Args:
        packed: G, [gk.packed_numel(H)] fp32.
        total: Σ x, [H] fp32.
        nonfinite: number of NaN and Inf by channel, [H] int64.
        capacity: how many tokens may wait, copied in their own dtype.
    """

    def __init__(self, packed: Tensor, total: Tensor, nonfinite: Tensor, capacity: int = 0):
        self.packed, self.total, self.nonfinite = packed, total, nonfinite
        self._capacity = capacity
        self._buffer: Buffer | None = None

    @property
    def torn(self) -> bool:
        """Whether tokens that waited were lost."""
        return False  # a flush that fails keeps them

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds the tokens of `x` [..., H] that `mask` [...] counts."""
        if not self._saves_traffic(x):
            self._multiply(x, mask)
            return
        if self._buffer is not None and not self._buffer.accepts(x):
            self.flush()
        if self._buffer is None:
            self._buffer = Buffer(self._capacity, x)
        self._buffer.append(x, mask)

    def flush(self) -> None:
        """Multiplies the tokens that wait."""
        if self._buffer is not None:
            self._multiply(*self._buffer.content())
            self._buffer = None

    def _multiply(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds tokens to G; on a GPU also to Σ x and the counts, which a CPU took before."""
        if x.device.type == "cpu":
            gk.gram_(self.packed, x, mask=mask)
        else:
            gk.gram_(self.packed, x, mask=mask, sums=self.total, nonfinite=self.nonfinite)

    def _saves_traffic(self, x: Tensor) -> bool:
        # Bytes for each of T tokens, with values of e bytes: 4·H²/T if G is touched now, and
        # 4·H²/capacity and a copy of 2·e·H if the tokens wait.
        if not self._capacity:
            return False
        tokens, channels = x.shape[:-1].numel(), x.shape[-1]
        return tokens * (1 / self._capacity + x.element_size() / (2 * channels)) < 1


@torch.inference_mode(False)  # so that they can be updated outside as well
def zeros(
    shape: tuple[int, ...], channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns G packed, Σ x and counts of NaN and Inf, with leading dimensions of `shape`."""
    return (
        torch.zeros(*shape, gk.packed_numel(channels), dtype=torch.float32, device=device),
        torch.zeros(*shape, channels, dtype=torch.float32, device=device),
        torch.zeros(*shape, channels, dtype=torch.int64, device=device),
    )


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors of one shape as rows of one [E, ...]; a view where they are such already."""
    first, numel = tensors[0], tensors[0].numel()
    if len(tensors) == 1:
        return first[None]
    step = tensors[1].storage_offset() - first.storage_offset()
    for number, tensor in enumerate(tensors):
        if (
            tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or not tensor.is_contiguous()
            or tensor.storage_offset() != first.storage_offset() + number * step
        ):
            return torch.stack(list(tensors))
    if step < numel:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def serial_parts(x: Tensor) -> Sequence[Tensor]:
    """Returns the tokens of `x` [..., H] as parts [t, H] that the calling thread sums alone.

    On a CPU waking other threads takes longer, and they spin into the next product. On a GPU there
    is one part.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu":
        return [tokens]
    return tokens.split(max(1, (_SERIAL_VALUES - 1) // x.shape[-1]))


def as_activations(x: Tensor) -> Tensor:
    """Returns a tensor in a dtype that a Gram takes: others, such as fp64, in fp32."""
    return x if x.dtype in gk.ACTIVATION_DTYPES else x.float()


def channel_sums(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns Σ x over tokens, [H] of `dtype`, of `x` [..., H]."""
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    for part in serial_parts(x):
        total += part.sum(0, dtype=dtype)
    return total.to(dtype)


class Buffer:
    """Up to `capacity` tokens, copied; of the dtype and on the device of `like` [..., H]."""

    @torch.inference_mode(False)
    def __init__(self, capacity: int, like: Tensor):
        self._tokens = like.new_empty(capacity, like.shape[-1])
        self._counts = torch.ones(capacity, dtype=torch.bool, device=like.device)
        self._used, self._masked = 0, False

    def accepts(self, x: Tensor) -> bool:
        """Returns whether the tokens of `x` have the dtype and enough room."""
        room = self._tokens.shape[0] - self._used
        return x.dtype == self._tokens.dtype and x.shape[:-1].numel() <= room

    def append(self, x: Tensor, mask: Tensor | None) -> None:
        """Copies the tokens of `x` [..., H], which `accepts` approved, and their mask [...]."""
        place = slice(self._used, self._used + x.shape[:-1].numel())
        self._tokens[place].view(x.shape).copy_(x)
        if mask is not None:
            self._counts[place].view(mask.shape).copy_(mask)
            self._masked = True
        self._used = place.stop

    def content(self) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens [T, H], and their mask [T] if any batch had one."""
        filled = slice(self._used)
        return self._tokens[filled], self._counts[filled] if self._masked else None


class HostFeed:
    """Copies batches from the host to a GPU while the batch before is multiplied.

    Two slots, each pinned memory and its twin on the device, take turns. A slot is written again
    only when the device has finished the work that read it, so a caller may overwrite its batch at
    once.
    """

    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)
        self._slots: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._queued: torch.cuda.Event | None = None  # all work before the last call

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., H] on the device, ready for the current stream; valid until the next call."""
        current = torch.cuda.current_stream(self._device)
        if self._queued is not None:
            self._queued.synchronize()  # what read the slot that is written next
        self._queued = current.record_event()
        pinned, on_device = self._next_slot(x, current)
        pinned.copy_(x)
        with torch.cuda.stream(self._side):
            on_device.copy_(pinned, non_blocking=True)
        current.wait_stream(self._side)
        return on_device

    def _next_slot(self, x: Tensor, current: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        self._slots.reverse()
        slot = self._slots[0]
        if slot is None or slot[0].shape != x.shape or slot[0].dtype != x.dtype:
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            on_device = torch.empty(x.shape, dtype=x.dtype, device=self._device)
            slot = self._slots[0] = pinned, on_device
            self._side.wait_stream(current)  # the new memory may still be in use there
        return slot
