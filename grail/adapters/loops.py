"""`add_batch` objects for scripts in the form of SparseGPT's, Wanda's and FLAP's.

    from grail.adapters.loops import WrappedGPT  # instead of: from lib.layerwrapper import …

Each object keeps one Gram of what its layer reads (`gram`) and forms what a script reads from it.
The same Gram serves `grail.fit` afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.gram import Gram
from grail.algebra.kinds import MAPS, as_matrix, columns, tokens_read
from grail.algebra.problem import ROUNDING
from grail.algebra.sums import as_activations
from grail.errors import InputError

__all__ = ["BiasGPT", "SparseGPT", "WrappedGPT"]


class _Statistic:
    """An attribute that is formed from the Gram when it is read, and kept until more tokens come.

    A script may change it in place, set it or delete it, as it may an attribute of its own object.
    """

    def __init__(self, form: Callable[[Any], Tensor]):
        self._form, self.__doc__ = form, form.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, loop: Any, owner: type | None = None) -> Any:
        if loop is None:
            return self
        if self._name in loop._given:
            return loop._given[self._name]
        if self._name not in loop._formed:
            loop._formed[self._name] = None if loop.gram is None else self._form(loop)
        return loop._formed[self._name]

    def __set__(self, loop: Any, value: Any) -> None:
        loop._formed.pop(self._name, None)
        loop._given[self._name] = value

    def __delete__(self, loop: Any) -> None:
        self.__set__(loop, None)


class _Loop:
    """The base of all objects: the layer, its Gram and the count of samples.

    Attributes:
        layer: the layer.
        dev: the device of its weight.
        gram: the `Gram` of what the layer reads; None after `free`.
        nsamples: the size of the first axis of each input, summed up; 1 for an input of 2 axes. An
            input without tokens counts, as in the scripts.
    """

    def __init__(self, layer: nn.Module):
        columns(layer)  # refuses other layers
        self.layer: Any = layer
        weight: Any = layer.weight
        self.dev: torch.device = weight.device
        there = None if weight.is_meta else self.dev
        self.gram: Gram | None = Gram.of(layer, device=there)
        self.nsamples = 0
        self._given: dict[str, Any] = {}
        self._formed: dict[str, Any] = {}

    def add_batch(self, inp: Tensor, out: Any = None, blocksize: int = 1024) -> None:
        """Adds what the layer reads in one call.

        Args:
            inp: [tokens, H] or [samples, …, H]; of a convolution [samples, channels, …], which is
                unfolded. On the device of the weight, or on the CPU.
            out: the layer's output, which is not read.
            blocksize: not read; scripts pass it.

        Raises:
            InputError: a shape that does not fit, or a statistic was set or freed by the script.
            NonFiniteError: NaN or Inf, which the scripts sum up.
        """
        if self.gram is None or self._given:
            which = ", ".join(self._given) or "the Gram"
            raise InputError(f"{which} was set, deleted or freed; add_batch comes before that")
        maps = isinstance(self.layer, MAPS)
        axes = self.layer.weight.dim() if maps else 3
        if inp.dim() < axes - 1 or (maps and inp.dim() > axes):
            raise InputError(f"an input has {axes - 1} axes or {axes}; got {tuple(inp.shape)}")
        if inp.dim() < axes:
            inp = inp[None]
        x = tokens_read(self.layer, inp.detach())
        self.gram.update(as_activations(x), samples=len(inp))
        self.nsamples += len(inp)
        self._formed.clear()

    def free(self) -> None:
        """Releases the Gram and what was formed of it, which then is None."""
        self.gram = None
        self._formed.clear()
        self._given.clear()

    def _shape(self) -> torch.Size:
        return as_matrix(self.layer, self.layer.weight.detach()).flatten(1).shape

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape()[1], dtype=torch.float32, device=self.dev)

    def _energy(self) -> Tensor:
        """Σ x² [H]; zeros where no token came."""
        assert self.gram is not None
        return self.gram.energy if self.gram.tokens else self._zeros()


class SparseGPT(_Loop):
    """The statistics of SparseGPT's and GPTQ's scripts.

    `fasterprune`, or `fasterquant`, stays that of the script's own class:

        class Mine(grail.adapters.loops.SparseGPT, sparsegpt.SparseGPT): pass

    Args:
        layer: Linear, a convolution or transformers' Conv1D.

    Source: SparseGPT (arXiv 2301.00774), section 3.1; GPTQ (arXiv 2210.17323), section 3.
    """

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.rows, self.columns = self._shape()

    @_Statistic
    def H(self) -> Tensor:  # noqa: N802 — the scripts' name
        """2/nsamples·Σ x xᵀ [columns, columns] fp32; zeros where no token came."""
        assert self.gram is not None
        return self.gram.hessian(per="sample", scale=2, empty="zeros")


class WrappedGPT(_Loop):
    """The statistics of Wanda's script.

    Args:
        layer: Linear, a convolution or transformers' Conv1D.
        layer_id, layer_name: kept for the script.

    Source: Wanda (arXiv 2306.11695), section 3: the norm of each input feature.
    """

    def __init__(self, layer: nn.Module, layer_id: int = 0, layer_name: str = "none"):
        super().__init__(layer)
        self.rows, self.columns = self._shape()
        self.layer_id, self.layer_name = layer_id, layer_name

    @_Statistic
    def scaler_row(self) -> Tensor:
        """Σ x²/nsamples [columns] fp32; zeros where no token came."""
        return self._energy() / max(1, self.nsamples)


class BiasGPT(_Loop):
    """The statistics of FLAP's script.

    Args:
        layer: Linear, a convolution or transformers' Conv1D.
        metric: kept as `type`: "IFV", "WIFV", "WIFN" or "N/A".

    Source: FLAP (arXiv 2312.11983), section 3: mean and sample variance of each input feature. The
    script forms both call by call; docs/adapters/loops.md derives where they differ from these.
    """

    def __init__(self, layer: nn.Module, metric: str):
        super().__init__(layer)
        self.out_dim, self.in_dim = self._shape()
        self.type = metric

    @_Statistic
    def baseline_inp(self) -> Tensor:
        """The mean over tokens, Σ x/tokens [in_dim] fp32; zeros where no token came."""
        assert self.gram is not None
        return self.gram.sum / self.gram.tokens if self.gram.tokens else self._zeros()

    @_Statistic
    def fluc_inp(self) -> Tensor:
        """Σ (x − mean)²/nsamples [in_dim] fp32; zeros where no token came."""
        assert self.gram is not None
        if not self.gram.tokens:
            return self._zeros()
        energy = self.gram.energy.double()
        deviation = energy - self.gram.sum.double().square() / self.gram.tokens
        # Below this share of the energy it is the rounding of fp32 sums.
        deviation = deviation.where(deviation > 4 * ROUNDING * energy, 0)
        return (deviation / self.nsamples).float()

    @_Statistic
    def scaler_inp(self) -> Tensor:
        """Σ x²/nsamples [in_dim] fp32; zeros where no token came."""
        return self._energy() / max(1, self.nsamples)
