"""A call of the Gram operator: its tensors, their names in messages, and their checks."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grail_kernels import checks
from grail_kernels.errors import InputError
from grail_kernels.tiles import check_packed


class GramCall(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    out: Tensor  # [P], or of a batch [E, P]
    x: Tensor  # [..., H], of a batch [E, ..., H], with offsets [T, H]
    mask: Tensor | None  # a token's bool: [...], shared by a batch, with offsets [T]
    weights: Tensor | None  # as mask, floating point
    sums: Tensor | None  # [H] or [E, H]
    nonfinite: Tensor | None  # [H] or [E, H]
    gate: Tensor | None = None  # as x, which it makes silu(gate)·x
    offsets: Tensor | None = None  # [E + 1]
    backend: str = "auto"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in the order of the schema."""
        return self[:-1]

    @property
    def activations(self) -> dict[str, Tensor]:
        """The activations, by their names in the public functions."""
        return {"x": self.x} if self.gate is None else {"gate": self.gate, "up": self.x}

    @property
    def targets(self) -> dict[str, Tensor | None]:
        """The tensors that are written."""
        return {"out": self.out, "sums": self.sums, "nonfinite": self.nonfinite}

    @property
    def per_token(self) -> dict[str, Tensor | None]:
        """The tensors with an entry for each token."""
        return {"mask": self.mask, "weights": self.weights}

    def as_batch(self) -> "GramCall":
        """The same call with a dimension for its matrices."""
        if self.out.dim() == 2:
            return self
        return self.at(None, *self.targets, "x", "gate")

    def single_matrices(self) -> Iterator["GramCall"]:
        """A call for each matrix of a batch."""
        if self.out.dim() == 1:
            yield self
            return
        bounds = [] if self.offsets is None else self.offsets.tolist()
        for matrix in range(self.out.shape[0]):
            tokens = slice(*bounds[matrix : matrix + 2]) if bounds else matrix
            single = self.at(matrix, *self.targets).at(tokens, "x", "gate")._replace(offsets=None)
            yield single.at(tokens, *self.per_token) if bounds else single

    def at(self, index: Any, *names: str) -> "GramCall":
        """The call with those of the tensors named indexed that there are."""
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{name: t[index] for name, t in given.items() if t is not None})

    def check_forms(self) -> None:
        """Refuses arguments by shapes, dtypes and devices, which fake tensors have as well."""
        x, ragged = self.x, self.offsets is not None
        if ragged and not x.dim() == self.out.dim() == 2:
            raise InputError(
                "with offsets x must be [tokens, channels] sorted by expert, and out [experts, "
                f"packed_numel(channels)]; got {tuple(x.shape)} and {tuple(self.out.shape)}"
            )
        if self.out.dim() > 1 and x.dim() < 2:
            raise InputError(f"x must be [matrices, ..., channels]; got {tuple(x.shape)}")
        for name, tensor in self.activations.items():
            checks.check_activations(name, tensor)
        if self.gate is not None and (self.gate.shape, self.gate.dtype) != (x.shape, x.dtype):
            raise InputError(
                "gate and up must have one shape and dtype; got "
                f"{tuple(self.gate.shape)} {self.gate.dtype} and {tuple(x.shape)} {x.dtype}"
            )
        channels = x.shape[-1]
        matrices = tuple((self.out if ragged else x).shape[:1]) if self.out.dim() > 1 else ()
        check_packed(self.out, channels)
        checks.check_vector("out", self.out, (*matrices, self.out.shape[-1]), torch.float32)
        checks.check_per_token(x.shape[0 if ragged else len(matrices) : -1], **self.per_token)
        if self.sums is not None:
            checks.check_vector("sums", self.sums, (*matrices, channels), torch.float32)
        if self.nonfinite is not None:
            checks.check_vector("nonfinite", self.nonfinite, (*matrices, channels), torch.int64)
        if self.offsets is not None:
            checks.check_vector("offsets", self.offsets, (self.out.shape[0] + 1,), torch.int64)
        checks.check_devices(**self.targets, **self.activations, **self.per_token)

    def check_overlap(self) -> None:
        """Refuses a written tensor that shares memory with another argument."""
        read = {**self.activations, **self.per_token, "offsets": self.offsets}
        checks.check_no_overlap(written=self.targets, read=read)

    def check_offsets(self) -> None:
        """Refuses offsets that decrease or leave the tokens."""
        if self.offsets is None:
            return
        bounds = self.offsets.tolist()
        for expert, (begin, end) in enumerate(pairwise(bounds)):
            if end < begin:
                raise InputError(
                    f"offsets must never decrease; got {begin} then {end} for expert {expert}"
                )
        tokens = self.x.shape[0]
        if bounds[0] != 0 or bounds[-1] > tokens:
            raise InputError(
                f"offsets must go from 0 to at most the {tokens} tokens of x; "
                f"got {bounds[0]} to {bounds[-1]}"
            )
