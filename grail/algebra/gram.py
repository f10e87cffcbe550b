"""The streaming Gram accumulator: Σ x xᵀ, Σ x and the token count of one site.

Sums, never running means, so that merging, sharding and resuming are exact; G is mirrored to a full
matrix only when it is read. The kernels are in `grail_kernels`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

import grail_kernels as gk
from grail.algebra.drift import Drift, finite_sums
from grail.algebra.kinds import MAPS, columns, tokens_read
from grail.algebra.sums import HostFeed, Sums, channel_sums, rows_of, zeros
from grail.arguments import (
    as_path,
    is_whole,
    require_dense,
    require_number,
    require_usable,
    require_whole,
)
from grail.errors import EmptyCalibrationError, InputError, NonFiniteError, StateError
from grail.runtime import state

NonFinite = Literal["refuse", "drop"]
Per = Literal["sum", "sample", "token"]

_KIND = "gram"  # of its files


class _Tokens(NamedTuple):
    """The arguments of one update."""

    x: Tensor  # [..., H]
    mask: Tensor | None  # [...]
    drift: Tensor | None  # [..., O], or the target


class Gram:
    """Accumulates G = Σ x xᵀ [H, H] over tokens x, in fp32.

    Args:
        channels: H.
        device: of the sums; by default that of the first update.
        name: the site, for error messages.
        buffer: how many tokens wait, copied in their own dtype, until G is touched. Default 8192 on
            a GPU; 0 on a CPU, where waiting would save only 10% at 256 tokens a call.
        non_finite: "refuse" tokens with NaN or Inf, or "drop" them, counted in `dropped`; on a GPU
            that costs one more read of x. "propagate": they spoil the sums, as in a product of
            torch's, for callers that look for NaN themselves.

    Memory: 2·H·(H + 256) bytes, and until G is read buffer·H values where batches are buffered.

    Source: GRAIL (arXiv 2602.23795), section 3: uncentred second moment of the consumer's input.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        name: str = "",
        buffer: int | None = None,
        non_finite: NonFinite | Literal["propagate"] = "refuse",
    ):
        require_whole("channels", channels, 1)
        check_buffer(buffer)
        if non_finite != "propagate":
            check_non_finite(non_finite, "propagate")
        self.channels, self.name = int(channels), name
        self._buffer = None if buffer is None else int(buffer)
        self._drops, self._propagates = non_finite == "drop", non_finite == "propagate"
        self.drift: Drift | None = None
        self._status: Status | None = None  # as last read from the device, if nothing came since
        self._sums: Sums | None = None
        self._feed: HostFeed | None = None
        self._torn = False  # whether an update failed half-way
        if device is not None:
            self._started(require_usable(device))

    @classmethod
    def of(cls, module: nn.Module, **settings: Any) -> "Gram":
        """Returns an empty Gram for what a layer reads; add to it with `update_from`.

        Args:
            module: Linear, Conv1d to 3d, ConvTranspose1d to 3d, or transformers' Conv1D.
            settings: of `Gram`. There are as many channels as the layer's weight has columns: of a
                convolution channels·taps, of one with groups those of one group.

        Raises:
            ModelError: a layer of another kind.
        """
        return cls(columns(module), **settings)

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
        target: Tensor | np.ndarray | None = None,
        samples: int | None = None,
    ) -> None:
        """Adds the tokens of `x`.

        Args:
            x: [..., H] fp32, bf16 or fp16, any strides; numpy arrays are copied. On the Gram's
                device, or on the CPU for a Gram on a GPU: it is then copied there while the batch
                before is multiplied.
            mask: [...] bool, where `x` is; tokens where it is False do not count.
            drift: [..., O] what the consumer's output lacks of the dense network's stream, on the
                Gram's device; see `grail.algebra.drift`. Where only some calls give it, its sums
                stand for all tokens; where none does, there is no drift.
            target: [..., O] what the consumer should return, without its bias, instead of
                `drift`; then every call gives it.
            samples: how many samples `x` is of, for `hessian(per="sample")`. Default: the size of
                its first axis; 1 for [T, H] and [H], as GPTQ's loops count; 0 if there is no token.

        Raises:
            InputError: a shape, dtype or device that does not fit, or both a drift and a target;
                nothing was added.
            NonFiniteError: NaN or Inf among the counted tokens or their drift, unless those are
                dropped. On a CPU it is raised here and nothing was added; on a GPU, where looking
                would stall the stream, it is raised when a result is read.
            StateError: an update before this one ended half-way, as where memory ran out.
        """
        if samples is not None:
            require_whole("samples", samples, 0)
        of_target = target is not None
        if of_target and drift is not None:
            raise InputError("both a drift and a target came; give one of them")
        given = target if of_target else drift
        self._require_form(of_target, given)
        role = "target" if of_target else "drift"
        tokens = self._on_device(self._checked(x, mask, given, role))
        if self._drops:
            tokens = self._without_non_finite(tokens)
        x, mask, drift = tokens
        samples = _samples_of(x) if samples is None else samples
        on_cpu = x.device.type == "cpu"
        if on_cpu and mask is not None:
            x, drift, mask = x[mask], None if drift is None else drift[mask], None
        # A GPU sums up while it multiplies, and looks for NaN when a result is read.
        sum_of_x = self._finite_sums(x) if on_cpu else None
        sum_of_drift = None
        if on_cpu and drift is not None:
            sum_of_drift = finite_sums(drift.detach(), self._label())
        self._refuse_torn()
        self._torn, self._status = True, None
        sums = self._started()
        sums.add(x, mask)
        if sum_of_x is not None:
            sums.total += sum_of_x
        if drift is not None:
            own = self._drift_of(drift.shape[-1], of_target)
            own.update(drift.detach(), x, mask, sum_of_drift)
        self._tokens += x.shape[:-1].numel() if mask is None else mask.sum()
        self._samples += samples
        self._torn = False

    def update_from(
        self, module: nn.Module, inputs: Tensor | tuple[Any, ...], mask: Tensor | None = None
    ) -> None:
        """Adds what a layer reads in one call: a forward hook's `module` and `inputs`.

        Args:
            module: the layer, of a kind that `Gram.of` takes.
            inputs: its input: [..., H] of a linear layer, [N, channels, …] of a convolution, which
                is unfolded to one token for each output position (and group). A tuple's first one.
            mask: [...] bool, of a linear layer: tokens where it is False do not count.

        Raises:
            ModelError: a layer of another kind.
            InputError, NonFiniteError, StateError: as `update`.
        """
        given: Any = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
        x = gk.as_tensor("the layer's input", given)
        if columns(module) != self.channels:
            raise InputError(
                f"a {type(module).__name__} of {columns(module)} columns came to {self._label()}, "
                f"which has {self.channels} channels; make one with Gram.of(module)"
            )
        if not isinstance(module, MAPS):
            self.update(x, mask)
            return
        if mask is not None:
            raise InputError("a mask counts tokens of a linear layer; a convolution has positions")
        if x.dim() == module.weight.dim() - 1:  # one sample without its axis
            x = x[None]
        gk.check_activations("the layer's input", x)
        self.update(tokens_read(module, x.detach()))

    def _require_form(self, of_target: bool, values: Tensor | np.ndarray | None) -> None:
        if values is None or self.drift is None or self.drift.of_target == of_target:
            return
        came, has = ("target", "drift") if of_target else ("drift", "target")
        raise InputError(
            f"a {came} came to {self._label()}, which has sums of a {has}; give all calls one form"
        )

    def _checked(
        self,
        x: Tensor | np.ndarray,
        mask: Tensor | np.ndarray | None,
        drift: Tensor | np.ndarray | None,
        role: str,
    ) -> _Tokens:
        """Returns the arguments of `update` as tensors whose forms fit."""
        x = gk.as_tensor("x", x)
        mask = None if mask is None else gk.as_tensor("mask", mask)
        drift = None if drift is None else gk.as_tensor(role, drift)
        for name, tensor in (("x", x), ("mask", mask), (role, drift)):
            if tensor is not None:
                require_dense(name, tensor)
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
                    f"{role} must be {[*x.shape[:-1], outputs]}; got {list(drift.shape)}"
                )
            gk.check_activations(role, drift)
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

    def _drift_of(self, outputs: int, of_target: bool) -> Drift:
        """Returns the sums of the drift, which are made if there are none yet."""
        if self.drift is None:
            self.drift = Drift(outputs, self.channels, self.device, of_target)
        return self.drift

    def _finite_sums(self, x: Tensor) -> Tensor:
        # The sums are finite only if every value is; only where one is not are the values searched.
        sums = channel_sums(x)
        if not self._propagates and not bool(sums.isfinite().all()):
            bad = (~x.isfinite()).reshape(-1, self.channels).sum(0)
            if bool(bad.any()):
                self._refuse(bad)
        return sums

    def merge(self, other: "Gram") -> None:
        """Adds the sums of `other`, as if its tokens had come here.

        Raises:
            InputError: another channel count, or a drift of another number of outputs or form.
        """
        gk.check_kind("other", other, Gram, "a grail.Gram")
        if other.channels != self.channels:
            raise InputError(f"cannot merge {other.channels} channels into {self.channels}")
        if self.drift and other.drift and self.drift.outputs != other.drift.outputs:
            raise InputError(
                f"cannot merge a drift of {other.drift.outputs} outputs into one of "
                f"{self.drift.outputs}"
            )
        if self.drift and other.drift and self.drift.of_target != other.drift.of_target:
            raise InputError("cannot merge sums of a target and of a drift; give all one form")
        self._refuse_torn()
        other._refuse_torn()
        if other._sums is None:
            return
        self._started(other.device)
        self._status = None
        other._sums.flush()
        own = self._own_parts()
        for name, tensor in other._own_parts().items():
            own[name].add_(tensor.to(self.device))
        if other.drift is not None:
            self._drift_of(*other.drift.form).merge(other.drift)

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
            "drift": None if self.drift is None else self.drift.form,
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
        own = gram.parts(content["drift"])
        if _forms(own) != _forms(found.tensors):
            raise StateError(f"{path} holds other sums than a Gram of {gram.channels} channels has")
        for name, tensor in own.items():
            tensor.copy_(found.tensors[name])
        return gram

    def parts(self, drift: tuple[int, bool] | None = None) -> dict[str, Tensor]:
        """Returns all sums and counts, by name, to be changed in place: they add up where Grams do.

        Args:
            drift: the form of another Gram's drift (`Drift.form`), for which this one makes a
                place.
        """
        self._started().flush()
        self._status = None
        if drift is not None:
            self._drift_of(*drift)
        own = self._own_parts()
        if self.drift is not None:
            own |= {f"drift.{name}": tensor for name, tensor in self.drift.parts().items()}
        return own

    def _own_parts(self) -> dict[str, Tensor]:
        """Sums and counts but for the drift, without the tokens that wait."""
        sums = self._started()
        return {
            "packed": sums.packed,
            "sum": sums.total,
            "nonfinite": sums.nonfinite,
            "tokens": self._tokens,
            "samples": self._samples,
            "dropped": self._dropped,
        }

    def matrix(self, out: Tensor | None = None) -> Tensor:
        """Returns G [H, H], bitwise symmetric: a new matrix in fp32, or `out`, written in place.

        Args:
            out: [H, H] fp32 or fp64 with rows of adjacent elements, on the Gram's device.

        Raises:
            EmptyCalibrationError: no token was counted.
            NonFiniteError: NaN or Inf came in, or the sums overflowed fp32.
            InputError: activations so small that their squares are lost below fp32's range, or an
                `out` that does not fit.
        """
        return gk.unpack(self.readable().packed, self.channels, out)

    def hessian(
        self,
        per: Per = "sum",
        *,
        scale: float = 1.0,
        out: Tensor | None = None,
        empty: Literal["refuse", "zeros"] = "refuse",
    ) -> Tensor:
        """Returns scale·G / n [H, H] in the convention of another library.

        With scale 2 it is the Hessian of Σ (w·x − y)² / n in one output's weights w (GPTQ, arXiv
        2210.17323, section 3).

        Args:
            per: n: 1 for "sum", `samples` for "sample", `tokens` for "token".
            scale: a factor; GPTQ's loops keep 2.
            out: see `matrix`.
            empty: "zeros" for a matrix of zeros where no token came, as an expert's that the router
                never chose.

        Raises:
            InputError: an unknown `per` or `empty`, or no samples where there are tokens.
            EmptyCalibrationError, NonFiniteError: as `matrix`.
        """
        require_number("scale", scale)
        if per not in get_args(Per):
            raise InputError(f"per must be one of {', '.join(get_args(Per))}; got {per!r}")
        if empty not in ("refuse", "zeros"):
            raise InputError(f"empty must be refuse or zeros; got {empty!r}")
        if empty == "zeros" and not self.tokens:
            self._refuse_torn()
            return gk.unpack(torch.zeros_like(self._started().packed), self.channels, out)
        packed = self.readable().packed
        number = {"sum": 1, "sample": self.samples, "token": self.tokens}[per]
        if not number:
            raise InputError(f"{self._label()} has {self.tokens} tokens of 0 samples")
        return gk.unpack(packed, self.channels, out, alpha=scale / number)

    @property
    def energy(self) -> Tensor:
        """Σ x² by channel, [H] fp32: the diagonal of G."""
        return gk.diagonal(self.readable().packed, self.channels)

    @property
    def sum(self) -> Tensor:
        """Σ x by channel, [H] fp32."""
        return self.readable().total.clone()

    @property
    def device(self) -> torch.device:
        """The device of the sums; the CPU before the first update of a Gram that was given none."""
        return torch.device("cpu") if self._sums is None else self._sums.packed.device

    @property
    def tokens(self) -> int:
        """Number of tokens that were counted."""
        if self._status is not None:
            return self._status.tokens
        return 0 if self._sums is None else int(self._tokens)

    @property
    def samples(self) -> int:
        """Number of samples whose tokens came, counted or not; see `update`."""
        return 0 if self._sums is None else int(self._samples)

    @property
    def dropped(self) -> int:
        """Number of tokens that did not count because of NaN or Inf."""
        if self._status is not None:
            return self._status.dropped
        return 0 if self._sums is None else int(self._dropped)

    @property
    def drift_tokens(self) -> int:
        """Number of tokens whose drift or target was recorded."""
        if self._status is not None:
            return self._status.drift_tokens
        return 0 if self.drift is None else int(self.drift.tokens)

    @property
    def drift_scale(self) -> float:
        """Tokens by tokens of the drift, whose sums it scales; 0 without a drift."""
        return self.tokens / self.drift_tokens if self.drift_tokens else 0.0

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
        self._samples = torch.zeros((), dtype=torch.int64, device=self.device)
        self._dropped = torch.zeros((), dtype=torch.int64, device=self.device)
        return sums

    def _refuse_torn(self) -> None:
        if self._torn or (self._sums is not None and self._sums.torn):
            raise StateError(
                f"{self._label()}: an update failed half-way (out of memory, or interrupted), so "
                "the sums hold a part of its tokens; collect them anew"
            )

    def readable(self) -> Sums:
        """Returns the sums with the tokens that waited, if there were any and all is finite."""
        self._refuse_torn()
        read_together([self])
        status, sums = self._status, self._started()
        assert status is not None
        if status.tokens == 0:
            lost = f" ({status.dropped} with NaN or Inf were dropped)" if status.dropped else ""
            raise EmptyCalibrationError(
                f"{self._label()} saw no token{lost}: calibrate with one or more that are not "
                "masked"
            )
        if self._propagates:
            return sums
        if status.nonfinite:
            self._refuse(sums.nonfinite)
        if status.overflowed:
            overflowed = ~gk.diagonal(sums.packed, self.channels).isfinite()
            raise NonFiniteError(
                f"{self._label()}: sums of squares beyond fp32",
                overflowed.nonzero().flatten().tolist(),
                int(overflowed.sum()),
            )
        self._require_no_underflow(status)
        if self.drift is not None:
            if status.drift_nonfinite:
                self.drift.require_finite(self._label())
            if self.drift.of_target and status.drift_tokens != status.tokens:
                raise InputError(
                    f"{self._label()} has {status.tokens} tokens and the target of "
                    f"{status.drift_tokens}; give the target with every update, or a drift"
                )
        return sums

    def _require_no_underflow(self, status: "Status") -> None:
        # Products have steps of the least denormal, eps·tiny: below a mean square of tiny that is
        # more than eps of the loudest channel.
        loudest = status.loudest / status.tokens
        if loudest < torch.finfo(torch.float32).tiny and not status.silent:
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


def _samples_of(x: Tensor) -> int:
    """Returns how many samples tokens [..., H] are of."""
    if not x.numel():
        return 0
    return x.shape[0] if x.dim() > 2 else 1


class Status:
    """Counts of a Gram, and what its checks found.

    `loudest`: Σ x² of the loudest channel. `silent`: no value is not 0.
    """

    def __init__(self, *fields: float):
        self.tokens, self.dropped, self.drift_tokens = (int(fields[n]) for n in (0, 1, 6))
        self.nonfinite, self.overflowed, self.silent = (bool(fields[n]) for n in (2, 3, 5))
        self.loudest, self.drift_nonfinite = fields[4], bool(fields[7])


def read_together(grams: Sequence[Gram]) -> None:
    """Reads the counts and checks of Grams from their device: one read for all on one device.

    Reads of the same Grams after that, until their next update, need none for their checks. The
    number of operators depends on that of different sizes, not on that of the Grams.
    """
    alike: dict[tuple[torch.device, int], list[Gram]] = {}
    for gram in dict.fromkeys(grams):
        if gram._status is None:
            gram._started().flush()
            alike.setdefault((gram.device, gram.channels), []).append(gram)
    for device in {device for device, _ in alike}:
        groups = [group for (there, _), group in alike.items() if there == device]
        table = torch.cat([_statuses(group) for group in groups]).tolist()
        for gram, row in zip(itertools.chain(*groups), table, strict=True):
            gram._status = Status(*row)


def _statuses(grams: Sequence[Gram]) -> Tensor:
    """Returns the fields of `Status` [E, 8] in fp64, of Grams of one size and device."""
    sums = [gram._started() for gram in grams]
    energies = gk.diagonal(rows_of([each.packed for each in sums]), grams[0].channels)
    total = rows_of([each.total for each in sums])
    nonfinite = rows_of([each.nonfinite for each in sums])
    nothing = Drift(1, 1, grams[0].device)
    drifts = [gram.drift or nothing for gram in grams]
    # The largest magnitude is NaN or infinite where a value is.
    largest = (
        torch.stack(torch._foreach_norm(values, math.inf)).double()
        for values in ([drift.cross for drift in drifts], [drift.sum for drift in drifts])
    )
    fields = (
        torch.stack([gram._tokens for gram in grams]),
        torch.stack([gram._dropped for gram in grams]),
        nonfinite.any(-1),
        ~energies.isfinite().all(-1),
        energies.amax(-1),
        ~(energies.any(-1) | total.any(-1)),
        torch.stack([drift.tokens for drift in drifts]),
        ~torch.stack(list(largest)).isfinite().all(0),
    )
    return torch.stack([field.double() for field in fields], 1)


def check_buffer(buffer: int | None) -> None:
    """Raises InputError unless `buffer` is a number of tokens or None."""
    if buffer is not None and (not is_whole(buffer) or buffer < 0):
        raise InputError(f"buffer must be a number of tokens ≥ 0; got {buffer!r}")


def check_non_finite(non_finite: str, *others: str) -> None:
    """Raises InputError for an unknown treatment of tokens with NaN or Inf."""
    allowed = (*get_args(NonFinite), *others)
    if non_finite not in allowed:
        raise InputError(f"non_finite must be one of {', '.join(allowed)}; got {non_finite!r}")


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
