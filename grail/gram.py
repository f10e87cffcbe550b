"""The streaming Gram accumulator: Σ x xᵀ, Σ x and the token count of one site.

Sums, never running means, so that merging, sharding and resuming are exact; G is mirrored to a full
matrix only when it is read. The kernels are in `grail_kernels.gram`.
"""

import torch
from torch import Tensor

import grail_kernels as gk
from grail.errors import EmptyCalibrationError, InputError, NonFiniteError


class Gram:
    """Accumulates G = Σ x xᵀ [H, H] over tokens x, in fp32.

    Args:
        channels: H.
        device: where the sums live; by default the device of the first update.
        name: the site, for error messages.

    Source: GRAIL (arXiv 2602.23795), section 3: uncentred second moment of the consumer's input.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None, name: str = ""):
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise InputError(f"channels must be a positive integer; got {channels!r}")
        self.channels, self.name = channels, name
        self._packed: Tensor | None = None
        if device is not None:
            self._allocate(torch.device(device))

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Adds the tokens of `x`.

        Args:
            x: [..., H] fp32, bf16 or fp16, any strides.
            mask: [...] bool; tokens where it is False do not count.

        Raises:
            InputError: a shape, dtype or device that does not fit; nothing was added.
            NonFiniteError: NaN or Inf among the counted tokens. On a CPU it is raised here and
                nothing was added; on a GPU, where looking would stall the stream, it is raised when
                a result is read.
        """
        if x.dim() == 0 or x.shape[-1] != self.channels:
            raise InputError(f"x must be [..., {self.channels}]; got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise InputError(
                f"mask must be bool {tuple(x.shape[:-1])}; got {mask.dtype} {tuple(mask.shape)}"
            )
        x = x.detach()
        if self._packed is None:
            self._allocate(x.device)
        if x.device.type == "cpu":
            self._update_checked(x if mask is None else x[mask])
        else:
            gk.gram_(self._filled(), x, mask=mask, sums=self._sum, nonfinite=self._nonfinite)
            self._tokens += x.shape[:-1].numel() if mask is None else mask.sum()

    def _update_checked(self, x: Tensor) -> None:
        # The sums come first: they are finite only if every value is, and nothing was added yet.
        dims = tuple(range(x.dim() - 1))
        sums = x.sum(dims, dtype=torch.float32) if dims else x.float()
        if not bool(sums.isfinite().all()):
            bad = (~x.isfinite()).reshape(-1, self.channels).sum(0)
            if bool(bad.any()):
                self._refuse(bad)
        gk.gram_(self._filled(), x)
        self._sum += sums
        self._tokens += x.shape[:-1].numel()

    def merge(self, other: "Gram") -> None:
        """Adds the sums of `other`, as if its tokens had come here.

        Raises:
            InputError: another channel count.
        """
        if other.channels != self.channels:
            raise InputError(f"cannot merge {other.channels} channels into {self.channels}")
        if other._packed is None:
            return
        if self._packed is None:
            self._allocate(other._packed.device)
        assert self._packed is not None
        self._packed += other._packed.to(self._packed.device)
        self._sum += other._sum.to(self._sum.device)
        self._nonfinite += other._nonfinite.to(self._nonfinite.device)
        self._tokens += other._tokens.to(self._tokens.device)

    def matrix(self) -> Tensor:
        """G [H, H], fp32, bitwise symmetric.

        Raises:
            EmptyCalibrationError: no token was counted.
            NonFiniteError: NaN or Inf came in, or the sums overflowed fp32.
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
    def tokens(self) -> int:
        """How many tokens were counted."""
        return 0 if self._packed is None else int(self._tokens)

    def _allocate(self, device: torch.device) -> None:
        self._packed = torch.zeros(gk.packed_numel(self.channels), device=device)
        self._sum = torch.zeros(self.channels, device=device)
        self._nonfinite = torch.zeros(self.channels, dtype=torch.int64, device=device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)

    def _filled(self) -> Tensor:
        assert self._packed is not None
        return self._packed

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise EmptyCalibrationError(
                f"{self._label()} saw no token: calibrate with one or more that are not masked"
            )
        if bool(self._nonfinite.any()):
            self._refuse(self._nonfinite)
        overflowed = ~gk.diagonal(self._filled(), self.channels).isfinite()
        if bool(overflowed.any()):
            raise NonFiniteError(
                f"{self._label()}: sums of squares beyond fp32",
                overflowed.nonzero().flatten().tolist(),
                int(overflowed.sum()),
            )

    def _refuse(self, counts: Tensor) -> None:
        raise NonFiniteError(
            f"activations of {self._label()}",
            counts.nonzero().flatten().tolist(),
            int(counts.sum()),
        )

    def _label(self) -> str:
        return self.name or f"a site of {self.channels} channels"
