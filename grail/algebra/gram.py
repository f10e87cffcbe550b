"""The streaming Gram accumulator: Σ x xᵀ, Σ x and the token count of one site.

Sums, never running means, so that merging, sharding and resuming are exact; G is mirrored to a full
matrix only when it is read. The kernels are in `grail_kernels`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

import grail_kernels as gk
from grail.algebra.drift import Drift, require_finite
from grail.algebra.sums import HostFeed, Sums, zeros
from grail.arguments import as_path, is_whole, require_dense, require_usable, require_whole
from grail.errors import EmptyCalibrationError, InputError, NonFiniteError, StateError
from grail.runtime import state

NonFinite = Literal["refuse", "drop"]

_KIND = "gram"  # of its files


class _Tokens(NamedTuple):
    """The arguments of one update."""

    x: Tensor  # [..., H]
    mask: Tensor | None  # [...]
    drift: Tensor | None  # [..., O]


class Gram:
    """Accumulates G = Σ x xᵀ [H, H] over tokens x, in fp32.

    Args:
        channels: H.
        device: of the sums; by default that of the first update.
        name: the site, for error messages.
        buffer: how many tokens wait, copied in their own dtype, until G is touched. Default 8192 on
            a GPU; 0 on a CPU, where waiting would save only 10% at 256 tokens a call.
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
        self._buffer = None if buffer is None else int(buffer)
        self._drops = non_finite == "drop"
        self.drift: Drift | None = None
        self._sums: Sums | None = None
        self._feed: HostFeed | None = None
        self._torn = False  # whether an update failed half-way
        if device is not None:
            self._started(require_usable(device))

    @classmethod
    def over(
        cls, sums: Sums, channels: int, name: str = "", non_finite: NonFinite = "refuse"
    ) -> "Gram":
        """Returns a Gram of `channels` channels whose tokens are added to `sums`."""
        gram = cls(channels, name=name, non_finite=non_finite)
        gram._count_for(sums)
        return gram

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
                Gram's device; see `grail.algebra.drift`. None is no drift.

        Raises:
            InputError: a shape, dtype or device that does not fit; nothing was added.
            NonFiniteError: NaN or Inf among the counted tokens or their drift, unless those are
                dropped. On a CPU it is raised here and nothing was added; on a GPU, where looking
                would stall the stream, it is raised when a result is read.
            StateError: an update before this one ended half-way, as where memory ran out.
        """
        tokens = self._on_device(self._checked(x, mask, drift))
        if self._drops:
            tokens = self._without_non_finite(tokens)
        x, mask, drift = tokens
        on_cpu = x.device.type == "cpu"
        if on_cpu and mask is not None:
            x, drift, mask = x[mask], None if drift is None else drift[mask], None
        finite_sums = self._finite_sums(x) if on_cpu else None
        if on_cpu and drift is not None:
            require_finite(drift, self._label())
        self._refuse_torn()
        self._torn = True
        sums = self._started()
        sums.add(x, mask)
        if finite_sums is not None:  # a GPU sums up in the same pass
            sums.total += finite_sums
        if drift is not None:
            self._add_drift(drift.detach(), x, mask)
        self._tokens += x.shape[:-1].numel() if mask is None else mask.sum()
        self._torn = False

    def _checked(
        self,
        x: Tensor | np.ndarray,
        mask: Tensor | np.ndarray | None,
        drift: Tensor | np.ndarray | None,
    ) -> _Tokens:
        """Returns the arguments of `update` as tensors whose forms fit."""
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
        return _Tokens(x.detach(), mask, drift)

    def _on_device(self, tokens: _Tokens) -> _Tokens:
        """Returns the tokens on the device of the sums, which the first update determines."""
        x, mask, drift = tokens
        device = self._started(x.device).packed.device
        if device.type == "cuda" and x.device.type == "cpu":
            self._feed = self._feed or HostFeed(device)
            x, mask = self._feed(x), None if mask is None else mask.to(device)
        given = [t for t in (x, mask, drift) if t is not None]
        if any(t.device != device for t in given):
            found = ", ".join(str(t.device) for t in given)
            raise InputError(f"x, its mask and its drift must be on {device}; got {found}")
        return _Tokens(x, mask, drift)

    def _without_non_finite(self, tokens: _Tokens) -> _Tokens:
        """Returns the tokens with a mask that leaves out those with NaN or Inf; counts those."""
        x, mask, drift = tokens
        values = [t for t in (x, drift) if t is not None]
        on_cpu = x.device.type == "cpu"  # where looking at a sum stalls nothing
        if on_cpu and all(bool(t.sum(dtype=torch.float64).isfinite()) for t in values):
            return tokens
        whole = torch.stack([t.isfinite().all(-1) for t in values]).all(0)
        counted = torch.ones_like(whole) if mask is None else mask
        self._dropped += (counted & ~whole).sum()
        return _Tokens(x, counted & whole, drift)

    def _add_drift(self, drift: Tensor, x: Tensor, mask: Tensor | None) -> None:
        if self.drift is None:
            self.drift = Drift(drift.shape[-1], self.channels, self.device)
        self.drift.update(drift, x, mask)

    def _finite_sums(self, x: Tensor) -> Tensor:
        # The sums are finite only if every value is; only where one is not are the values searched.
        dims = tuple(range(x.dim() - 1))
        sums = x.sum(dims, dtype=torch.float32) if dims else x.float()
        if not bool(sums.isfinite().all()):
            bad = (~x.isfinite()).reshape(-1, self.channels).sum(0)
            if bool(bad.any()):
                self._refuse(bad)
        return sums

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
        self._refuse_torn()
        other._refuse_torn()
        if other._sums is None:
            return
        self._started(other.device)
        other._sums.flush()
        own = self._own_parts()
        for name, tensor in other._own_parts().items():
            own[name].add_(tensor.to(self.device))
        if other.drift is not None:
            if self.drift is None:
                self.drift = Drift(other.drift.outputs, self.channels, self.device)
            self.drift.merge(other.drift)

    def save(self, path: str | Path) -> None:
        """Writes sums and counts into a file that `load` reads; see `grail.runtime.state`.

        Raises:
            StateError: it could not be written; what was there stays.
        """
        path = as_path("path", path)
        self._refuse_torn()
        content = {
            "name": self.name,
            "channels": self.channels,
            "block": gk.STRIP_ROWS,  # the packed layout follows from it
            "outputs": None if self.drift is None else self.drift.outputs,
        }
        state.write(path, _KIND, content, self.parts())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Gram":
        """Returns the Gram that `save` wrote, bit for bit.

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
        """Returns all sums and counts, by name, to be changed in place: they add up where Grams do.

        Args:
            outputs: of the drift of another Gram, for which this one makes a place.
        """
        self._started().flush()
        if outputs and self.drift is None:
            self.drift = Drift(outputs, self.channels, self.device)
        own = self._own_parts()
        if self.drift is not None:
            own |= {f"drift.{name}": tensor for name, tensor in vars(self.drift).items()}
        return own

    def _own_parts(self) -> dict[str, Tensor]:
        """Sums and counts but for the drift, without the tokens that wait."""
        sums = self._started()
        return {
            "packed": sums.packed,
            "sum": sums.total,
            "nonfinite": sums.nonfinite,
            "tokens": self._tokens,
            "dropped": self._dropped,
        }

    def matrix(self) -> Tensor:
        """Returns G [H, H], fp32, bitwise symmetric.

        Raises:
            EmptyCalibrationError: no token was counted.
            NonFiniteError: NaN or Inf came in, or the sums overflowed fp32.
            InputError: activations so small that their squares are lost below fp32's range.
        """
        return gk.unpack(self._readable().packed, self.channels)

    @property
    def energy(self) -> Tensor:
        """Σ x² by channel, [H] fp32: the diagonal of G."""
        return gk.diagonal(self._readable().packed, self.channels)

    @property
    def sum(self) -> Tensor:
        """Σ x by channel, [H] fp32."""
        return self._readable().total.clone()

    @property
    def device(self) -> torch.device:
        """The device of the sums; the CPU before the first update of a Gram that was given none."""
        return torch.device("cpu") if self._sums is None else self._sums.packed.device

    @property
    def tokens(self) -> int:
        """Number of tokens that were counted."""
        return 0 if self._sums is None else int(self._tokens)

    @property
    def dropped(self) -> int:
        """Number of tokens that did not count because of NaN or Inf."""
        return 0 if self._sums is None else int(self._dropped)

    def _started(self, device: torch.device | None = None) -> Sums:
        """Returns the sums, which are made on `device`, or on the CPU, where there are none yet."""
        if self._sums is None:
            device = device or self.device
            default = 0 if device.type == "cpu" else gk.BUFFER_TOKENS
            capacity = default if self._buffer is None else self._buffer
            return self._count_for(Sums(*zeros((), self.channels, device), capacity))
        return self._sums

    @torch.inference_mode(False)  # so that the counts can be updated outside as well
    def _count_for(self, sums: Sums) -> Sums:
        self._sums = sums
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self._dropped = torch.zeros((), dtype=torch.int64, device=self.device)
        return sums

    def _refuse_torn(self) -> None:
        if self._torn or (self._sums is not None and self._sums.torn):
            raise StateError(
                f"{self._label()}: an update failed half-way (out of memory, or interrupted), so "
                "the sums hold a part of its tokens; collect them anew"
            )

    def _readable(self) -> Sums:
        """Returns the sums with the tokens that waited, if there were any and all is finite."""
        self._refuse_torn()
        if self.tokens == 0:
            lost = f" ({self.dropped} with NaN or Inf were dropped)" if self.dropped else ""
            raise EmptyCalibrationError(
                f"{self._label()} saw no token{lost}: calibrate with one or more that are not "
                "masked"
            )
        sums = self._started()
        sums.flush()
        if bool(sums.nonfinite.any()):
            self._refuse(sums.nonfinite)
        energies = gk.diagonal(sums.packed, self.channels)
        overflowed = ~energies.isfinite()
        if bool(overflowed.any()):
            raise NonFiniteError(
                f"{self._label()}: sums of squares beyond fp32",
                overflowed.nonzero().flatten().tolist(),
                int(overflowed.sum()),
            )
        self._require_no_underflow(energies, sums.total)
        if self.drift is not None:
            self.drift.require_finite(self._label())
        return sums

    def _require_no_underflow(self, energies: Tensor, total: Tensor) -> None:
        # Products have steps of the least denormal, eps·tiny: below a mean square of tiny that is
        # more than eps of the loudest channel.
        loudest = (energies.max().double() / self.tokens).item()
        if loudest >= torch.finfo(torch.float32).tiny:
            return
        if bool(energies.any()) or bool(total.any()):  # else it is silent, not quiet
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
    """Raises InputError unless `buffer` is a number of tokens or None."""
    if buffer is not None and (not is_whole(buffer) or buffer < 0):
        raise InputError(f"buffer must be a number of tokens ≥ 0; got {buffer!r}")


def check_non_finite(non_finite: str) -> None:
    """Raises InputError for an unknown treatment of tokens with NaN or Inf."""
    if non_finite not in get_args(NonFinite):
        raise InputError(
            f"non_finite must be one of {', '.join(get_args(NonFinite))}; got {non_finite!r}"
        )


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
