"""llm-compressor's GPTQ on GRAIL's Grams: half the memory, and one product for layers of one input.

llm-compressor 0.14 keeps H = Σ 2 x xᵀ [C, C] in fp32 for each layer and divides it by the number
of samples before it quantises. Here a layer's H waits as the packed triangle of a `grail.Gram`,
which layers that read the same tensor share, and becomes dense when the layer's turn comes. In a
distributed run llm-compressor's own reduce sums the packed triangles.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import grail_kernels as gk
from grail.adapters import _llmcompressor_library as library
from grail.algebra.gram import Gram
from grail.algebra.kinds import columns
from grail.algebra.sums import as_activations
from grail.errors import InputError
from grail.run._accumulate import SharedGrams

# Tokens that wait on a GPU: all of a usual batch of one sample, a small part of a Gram's memory.
_GPU_BUFFER = 2048


def _on_device(gram: Gram, x: Tensor) -> Tensor:
    """Returns an input where its Gram is, in a dtype that a Gram takes."""
    return as_activations(x).to(gram.device)


class GPTQModifier(library.GPTQ):
    """llm-compressor's GPTQModifier with the same arguments, hooks and results.

    NaN and Inf reach H, and llm-compressor then rounds to nearest, as it does on its own. An
    expert that no token reached is treated as llm-compressor treats it. Layers are Linear;
    llm-compressor 0.14 quantises no convolution.

    Raises:
        InputError: another GPTQModifier of the recipe quantises the same layer.

    Source: GPTQ (arXiv 2210.17323), section 3; llm-compressor 0.14.0.1, `modifiers/gptq`.
    """

    _shared: Any = library.PrivateAttr(default_factory=partial(SharedGrams, convert=_on_device))

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Applies the scheme; called by llm-compressor."""
        done: bool = super().on_initialize(state, **kwargs)
        for other in library.active_session().lifecycle.recipe.modifiers:
            if other is self or not isinstance(other, library.GPTQ):
                continue
            if twice := [
                name for m, name in self._module_names.items() if m in other._module_names
            ]:
                raise InputError(
                    f"two GPTQModifiers of the recipe quantise {twice[0]} and {len(twice) - 1} "
                    "more layers; give each layer to one, by targets and ignore"
                )
        return done

    def calibrate_module(self, module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        """Adds the input of a layer's call to its Gram; a forward hook."""
        x = args[0]
        if module not in self._num_samples:
            device = torch.device(library.get_execution_device(module))
            self._num_samples[module] = torch.zeros((), dtype=torch.float32, device=device)
            settings = {
                "name": self._module_names.get(module, ""),
                "buffer": _GPU_BUFFER * (device.type != "cpu"),
            }
            make = partial(Gram.of, module, device=device, non_finite="propagate", **settings)
            self._shared.enter(module, module, make)
        # As llm-compressor counts: the first axis, of [T, C] one sample, also without a token.
        self._num_samples[module] += 1 if x.dim() == 2 else x.shape[0]
        self._shared.observe(module, module, x)

    def compress_modules(self) -> None:
        """Quantises what was calibrated since the last call."""
        self._shared.finish()
        lent: set[int] = set()
        for module, gram in self._shared.items():
            packed = gram.parts()["packed"]
            # A reduce over processes adds in place, for each layer on its own.
            own = packed.clone() if library.is_distributed() and id(gram) in lent else packed
            lent.add(id(gram))
            self._hessians[module] = own
        self._shared.clear()
        super().compress_modules()

    def compress_module_list(self, module_list: Sequence[nn.Module]) -> None:
        """Quantises modules; the dense matrices of one batch of them are in memory at a time."""
        if not module_list:
            return
        for batch in library.assign_batches(
            list(module_list), self.batched_quantization, self.block_size
        ):
            for module in batch:
                packed = self._hessians[module]
                if packed.dim() == 1:  # a caller's own may be dense
                    self._hessians[module] = gk.unpack(packed, columns(module), alpha=2.0)
            super().compress_module_list(batch)
