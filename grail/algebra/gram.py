"""The streaming Gram accumulator: Σ x xᵀ, Σ x and the token count of one site.

Sums, never running means, so that merging, sharding and resuming are exact; G is mirrored to a full
matrix only when it is read. The kernels are in `grail_kernels`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

import grail_kernels as gk
from grail.algebra.drift import Drift, require_finite
from grail.arguments import as_path, is_whole, require_dense, require_usable, require_whole
from grail.errors import EmptyCalibrationError, InputError, NonFiniteError, StateError
from grail.runtime import state

NonFinite = Literal["refuse", "drop"]

_KIND = "gram"  # of its files


class Gram:
    """Accumulates G = Σ x xᵀ [H, H] over tokens x, in fp32.

    Args:
        channels: H.
        device: where the sums live; by default the device of the first update.
        name: the site, for error messages.
        buffer: how many tokens wait, copied in their own dtype, until G is touched. Default 8192 on
            a GPU. 0, none, on a CPU, where waiting would save only 10% at 256 tokens a call.
        non_finite: "refuse" tokens with NaN or Inf, or "drop" them, counted in `dropped`; on a GPU
            that costs one more read of x.

    Memory: 2·H·(H + 256) bytes, and until G is read buffer·H values where batches are buffered.

    Source: GRAIL (arXiv 2602.23795), section 3: uncentred second moment of the consumer's input.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        name: str = "",
        buffer: int | None = None,
        non_finite: NonFinite = "refuse",
    ):
        require_whole("channels", channels, 1)
        check_buffer(buffer)
        check_non_finite(non_finite)
        self.channels, self.name = int(channels), name
        self._capacity = None if buffer is None else int(buffer)
        self._drops = non_finite == "drop"
        self.drift: Drift | None = None
        self._packed: Tensor | None = None
        self._buffer: Buffer | None = None
        self._feed: _HostFeed | None = None
        self._torn = False  # whether an update ended half-way
        if device is not None:
            self._allocate(require_usable(device))

    def update(
        self,
        x: Tensor | np.ndarray,
        mask: Tensor | np.ndarray | None = None,
        drift: Tensor | np.ndarray | None = None,
    ) -> None:
        """Adds the tokens of `x`.

        Args:
            x: [..., H] fp32, bf16 or fp16, any strides; numpy arrays are copied. On the Gram's
                device, or on the CPU for a Gram on a GPU: it is then copied there while the batch
                before is multiplied.
            mask: [...] bool, where `x` is; tokens where it is False do not count.
            drift: [..., O] what the consumer's output lacks of the dense network's stream, on the
                Gram's device; see `grail.drift`. None is no drift.

        Raises:
            InputError: a shape, dtype or device that does not fit; nothing was added.
            NonFiniteError: NaN or Inf among the counted tokens or their drift, unless those are
                dropped. On a CPU it is raised here and nothing was added; on a GPU, where looking
                would stall the stream, it is raised when a result is read.
            StateError: an update before this one ended half-way, as where memory ran out.
        """
        x = gk.as_tensor("x", x)
        mask = None if mask is None else gk.as_tensor("mask", mask)
        drift = None if drift is None else gk.as_tensor("drift", drift)
        for role, tensor in (("x", x), ("mask", mask), ("drift", drift)):
            if tensor is not None:
                require_dense(role, tensor)
        if x.dim() == 0 or x.shape[-1] != self.channels:
            raise InputError(f"x must be [..., {self.channels}]; got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise InputError(
                f"mask must be bool {tuple(x.shape[:-1])}; got {mask.dtype} {tuple(mask.shape)}"
            )
        gk.check_activations("x", x)
        if drift is not None:
            outputs = "O" if self.drift is None else self.drift.outputs
            if drift.shape[:-1] != x.shape[:-1] or outputs not in ("O", drift.shape[-1]):
                raise InputError(
                    f"drift must be {[*x.shape[:-1], outputs]}; got {list(drift.shape)}"
                )
            gk.check_activations("drift", drift)
        x = x.detach()
        if self._packed is None:
            self._allocate(x.device)
        device = self._filled().device
        if device.type == "cuda" and x.device.type == "cpu":
            x, mask = self._sent(x, device), None if mask is None else mask.to(device)
        beside = [t for t in (x, mask, drift) if t is not None]
        if any(t.device != device for t in beside):
            found = ", ".join(str(t.device) for t in beside)
            raise InputError(f"x, its mask and its drift must be on {device}; got {found}")
        if self._drops:
            mask = self._without_non_finite(x, mask, drift)
        if device.type == "cpu":
            if mask is not None:
                x, drift, mask = x[mask], None if drift is None else drift[mask], None
            sums = self._finite_sums(x)
            if drift is not None:
                require_finite(drift, self._label())
        else:
            sums = None
        self._require_whole()
        self._torn = True
        self._add(x, mask)
        if sums is not None:  # a GPU sums up in the same pass
            self._sum += sums
        if drift is not None:
            self._add_drift(drift.detach(), x, mask)
        self._tokens += x.shape[:-1].numel() if mask is None else mask.sum()
        self._torn = False

    def _without_non_finite(
        self, x: Tensor, mask: Tensor | None, drift: Tensor | None
    ) -> Tensor | None:
        """The mask without the tokens at which a value is NaN or Inf; counts those."""
        values = [t for t in (x, drift) if t is not None]
        on_cpu = x.device.type == "cpu"  # where looking at a sum stalls nothing
        if on_cpu and all(bool(t.sum(dtype=torch.float64).isfinite()) for t in values):
            return mask
        whole = torch.stack([t.isfinite().all(-1) for t in values]).all(0)
        counted = torch.ones_like(whole) if mask is None else mask
        self._dropped += (counted & ~whole).sum()
        return counted & whole

    def _add_drift(self, drift: Tensor, x: Tensor, mask: Tensor | None) -> None:
        if self.drift is None:
            self.drift = Drift(drift.shape[-1], self.channels, self._filled().device)
        self.drift.update(drift, x, mask)

    def _sent(self, x: Tensor, device: torch.device) -> Tensor:
        if self._feed is None:
            self._feed = _HostFeed(device)
        return self._feed(x)

    def _finite_sums(self, x: Tensor) -> Tensor:
        # They are finite only if every value is; only where one is not are the values searched.
        dims = tuple(range(x.dim() - 1))
        sums = x.sum(dims, dtype=torch.float32) if dims else x.float()
        if not bool(sums.isfinite().all()):
            bad = (~x.isfinite()).reshape(-1, self.channels).sum(0)
            if bool(bad.any()):
                self._refuse(bad)
        return sums

    def _add(self, x: Tensor, mask: Tensor | None) -> None:
        if not self._saves_traffic(x):
            self._multiply(x, mask)
            return
        if self._buffer is not None and not self._buffer.accepts(x):
            self._flush()
        if self._buffer is None:
            assert self._capacity is not None
            self._buffer = Buffer(self._capacity, x)
        self._buffer.append(x, mask)

    def _saves_traffic(self, x: Tensor) -> bool:
        # Bytes for each token of T, with values of e bytes: 4H²/T if G is touched now; 4H²/buffer
        # and a copy, 2eH, if it waits.
        if not self._capacity:
            return False
        tokens = x.shape[:-1].numel()
        return tokens * (1 / self._capacity + x.element_size() / (2 * self.channels)) < 1

    def _flush(self) -> None:
        if self._buffer is not None:
            self._multiply(*self._buffer.content())
            self._buffer = None

    def _multiply(self, x: Tensor, mask: Tensor | None) -> None:
        if x.device.type == "cpu":
            gk.gram_(self._filled(), x, mask=mask)
        else:
            gk.gram_(self._filled(), x, mask=mask, sums=self._sum, nonfinite=self._nonfinite)

    def merge(self, other: "Gram") -> None:
        """Adds the sums of `other`, as if its tokens had come here.

        Raises:
            InputError: another channel count, or a drift of another number of outputs.
        """
        gk.check_kind("other", other, Gram, "a grail.Gram")
        if other.channels != self.channels:
            raise InputError(f"cannot merge {other.channels} channels into {self.channels}")
        if self.drift and other.drift and self.drift.outputs != other.drift.outputs:
            raise InputError(
                f"cannot merge a drift of {other.drift.outputs} outputs into one of "
                f"{self.drift.outputs}"
            )
        self._require_whole()
        other._require_whole()
        if other._packed is None:
            return
        if self._packed is None:
            self._allocate(other._packed.device)
        other._flush()
        packed = self._filled()
        packed += other._packed.to(packed.device)
        self._sum += other._sum.to(self._sum.device)
        self._nonfinite += other._nonfinite.to(self._nonfinite.device)
        self._dropped += other._dropped.to(self._dropped.device)
        self._tokens += other._tokens.to(self._tokens.device)
        if other.drift is not None:
            if self.drift is None:
                self.drift = Drift(other.drift.outputs, self.channels, packed.device)
            self.drift.merge(other.drift)

    def save(self, path: str | Path) -> None:
        """Writes sums and counts into a file that `load` reads; see `grail.state`.

        Raises:
            StateError: it could not be written; what was there stays.
        """
        path = as_path("path", path)
        self._require_whole()
        content = {
            "name": self.name,
            "channels": self.channels,
            "block": gk.STRIP_ROWS,  # the packed layout follows from it
            "outputs": None if self.drift is None else self.drift.outputs,
        }
        state.write(path, _KIND, content, self.parts())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Gram":
        """The Gram that `save` wrote, bit for bit.

        Raises:
            StateError: no such file, or one that is damaged, or of another kind or version.
        """
        path = as_path("path", path)
        found = state.read(path, _KIND)
        content = found.content
        if content["block"] != gk.STRIP_ROWS:
            raise StateError(
                f"{path} is packed in strips of {content['block']}, not of {gk.STRIP_ROWS}"
            )
        gram = cls(content["channels"], device, content["name"])
        own = gram.parts(content["outputs"] or 0)
        if _forms(own) != _forms(found.tensors):
            raise StateError(f"{path} holds other sums than a Gram of {gram.channels} channels has")
        for name, tensor in own.items():
            tensor.copy_(found.tensors[name])
        return gram

    def parts(self, outputs: int = 0) -> dict[str, Tensor]:
        """All sums and counts, by name: what adds up where Grams do. To be changed in place.

        Args:
            outputs: of the drift that another Gram knows, so that this one has a place for it.
        """
        if self._packed is None:
            self._allocate(self.device)
        self._flush()
        if outputs and self.drift is None:
            self.drift = Drift(outputs, self.channels, self.device)
        own = {
            "packed": self._filled(),
            "sum": self._sum,
            "nonfinite": self._nonfinite,
            "tokens": self._tokens,
            "dropped": self._dropped,
        }
        if self.drift is not None:
            own |= {f"drift.{name}": tensor for name, tensor in vars(self.drift).items()}
        return own

    def matrix(self) -> Tensor:
        """G [H, H], fp32, bitwise symmetric.

        Raises:
            EmptyCalibrationError: no token was counted.
            NonFiniteError: NaN or Inf came in, or the sums overflowed fp32.
            InputError: activations so small that their squares are lost below fp32's range.
        """
        self._require_tokens()
        return gk.unpack(self._filled(), self.channels)

    @property
    def energy(self) -> Tensor:
        """Σ x² by channel, [H] fp32: the diagonal of G."""
        self._require_tokens()
        return gk.diagonal(self._filled(), self.channels)

    @property
    def sum(self) -> Tensor:
        """Σ x by channel, [H] fp32."""
        self._require_tokens()
        return self._sum.clone()

    @property
    def device(self) -> torch.device:
        """Where the sums live; the CPU before the first update of a Gram that was given none."""
        return torch.device("cpu") if self._packed is None else self._packed.device

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return 0 if self._packed is None else int(self._tokens)

    @property
    def dropped(self) -> int:
        """How many tokens did not count because of NaN or Inf."""
        return 0 if self._packed is None else int(self._dropped)

    @torch.inference_mode(False)  # so that it can be updated outside as well
    def _allocate(self, device: torch.device) -> None:
        if self._capacity is None:
            self._capacity = 0 if device.type == "cpu" else gk.BUFFER_TOKENS
        self._packed, self._sum, self._nonfinite = self._zeros(device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._dropped = torch.zeros((), dtype=torch.int64, device=device)

    def _zeros(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where G packed, Σ x and the counts of NaN and Inf add up."""
        return (
            torch.zeros(gk.packed_numel(self.channels), dtype=torch.float32, device=device),
            torch.zeros(self.channels, dtype=torch.float32, device=device),
            torch.zeros(self.channels, dtype=torch.int64, device=device),
        )

    def _filled(self) -> Tensor:
        assert self._packed is not None
        return self._packed

    def _require_whole(self) -> None:
        if self._torn:
            raise StateError(
                f"{self._label()}: an update failed half-way (out of memory, or interrupted), so "
                "the sums hold a part of its tokens; collect them anew"
            )

    def _require_tokens(self) -> None:
        self._require_whole()
        if self.tokens == 0:
            lost = f" ({self.dropped} with NaN or Inf were dropped)" if self.dropped else ""
            raise EmptyCalibrationError(
                f"{self._label()} saw no token{lost}: calibrate with one or more that are not "
                "masked"
            )
        self._flush()
        if bool(self._nonfinite.any()):
            self._refuse(self._nonfinite)
        energies = gk.diagonal(self._filled(), self.channels)
        overflowed = ~energies.isfinite()
        if bool(overflowed.any()):
            raise NonFiniteError(
                f"{self._label()}: sums of squares beyond fp32",
                overflowed.nonzero().flatten().tolist(),
                int(overflowed.sum()),
            )
        self._require_no_underflow(energies)
        if self.drift is not None:
            self.drift.require_finite(self._label())

    def _require_no_underflow(self, energies: Tensor) -> None:
        # Products have steps of the least denormal, eps·tiny: below a mean square of tiny that is
        # more than eps of the loudest channel.
        loudest = (energies.max().double() / self.tokens).item()
        if loudest >= torch.finfo(torch.float32).tiny:
            return
        if bool(energies.any()) or bool(self._sum.any()):  # else it is silent, not quiet
            raise InputError(
                f"{self._label()}: the loudest channel has a mean square of {loudest:.3g}, below "
                "what fp32 can tell apart; scale the activations up"
            )

    def _refuse(self, counts: Tensor) -> None:
        raise NonFiniteError(
            f"activations of {self._label()}",
            counts.nonzero().flatten().tolist(),
            int(counts.sum()),
        )

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return f"Gram({name}{self.channels} channels, {self.tokens} tokens, on {self.device})"

    def _label(self) -> str:
        return self.name or f"a site of {self.channels} channels"


def check_buffer(buffer: int | None) -> None:
    """Raises InputError for what is no number of tokens that can wait."""
    if buffer is not None and (not is_whole(buffer) or buffer < 0):
        raise InputError(f"buffer must be a number of tokens ≥ 0; got {buffer!r}")


def check_non_finite(non_finite: str) -> None:
    """Raises InputError for what is no way to treat tokens with NaN or Inf."""
    if non_finite not in get_args(NonFinite):
        raise InputError(
            f"non_finite must be one of {', '.join(get_args(NonFinite))}; got {non_finite!r}"
        )


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


class Buffer:
    """Up to `capacity` tokens, copied; of the dtype and on the device of `like` [..., H]."""

    @torch.inference_mode(False)
    def __init__(self, capacity: int, like: Tensor):
        self._tokens = like.new_empty(capacity, like.shape[-1])
        self._counts = torch.ones(capacity, dtype=torch.bool, device=like.device)
        self._used, self._masked = 0, False

    def accepts(self, x: Tensor) -> bool:
        """Whether the tokens of `x` fit in."""
        room = self._tokens.shape[0] - self._used
        return x.dtype == self._tokens.dtype and x.shape[:-1].numel() <= room

    def append(self, x: Tensor, mask: Tensor | None) -> None:
        """Copies the tokens of `x` [..., H] that `accepts` approved, and their mask [...]."""
        place = slice(self._used, self._used + x.shape[:-1].numel())
        self._tokens[place].view(x.shape).copy_(x)
        if mask is not None:
            self._counts[place].view(mask.shape).copy_(mask)
            self._masked = True
        self._used = place.stop

    def content(self) -> tuple[Tensor, Tensor | None]:
        """The tokens [T, H], and their mask [T] if any batch had one."""
        filled = slice(self._used)
        return self._tokens[filled], self._counts[filled] if self._masked else None


class _HostFeed:
    """Brings batches from the host to a GPU, the copy of one beside the work on the one before.

    Two slots, each pinned memory and its twin on the device, take turns. A slot is written again
    only when the device is past the work that read it, so a caller may overwrite its batch at once.
    """

    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)
        self._slots: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._queued: torch.cuda.Event | None = None  # all work before the last call

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., H] on the device, ready for the current stream; valid until the next call."""
        current = torch.cuda.current_stream(self._device)
        if self._queued is not None:
            self._queued.synchronize()  # what read the slot that is about to be written
        self._queued = current.record_event()
        pinned, landed = self._slot(x, current)
        pinned.copy_(x)
        with torch.cuda.stream(self._side):
            landed.copy_(pinned, non_blocking=True)
        current.wait_stream(self._side)
        return landed

    def _slot(self, x: Tensor, current: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        self._slots.reverse()
        slot = self._slots[0]
        if slot is None or slot[0].shape != x.shape or slot[0].dtype != x.dtype:
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            landed = torch.empty(x.shape, dtype=x.dtype, device=self._device)
            slot = self._slots[0] = pinned, landed
            self._side.wait_stream(current)  # the new memory may still be in use there
        return slot
