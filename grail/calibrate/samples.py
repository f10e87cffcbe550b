"""Samples and masks: the sample that each token of a layer's input belongs to, and if it counts.

A layer of an unknown network may read [B, L, H], [L, B, H], or all tokens in one row, sample by
sample or position by position. Sizes do not distinguish these, so the network is tried: one sample
of a batch is replaced by another, and the tokens that change belong to it.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grail.errors import InputError

Key = TypeVar("Key")
Change = Callable[[str, Tensor], Tensor]  # of an argument, by its name

_TRIES = 4  # samples that are replaced at most
_RTOL = 1e-3  # of the largest value: a token that changed by less may only be rounded otherwise
_IGNORED = -100  # the label of padding
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Order:
    """The order of the tokens in a layer's input.

    `samples_first`: all tokens of a sample come before those of the next, [B, L, H], [B·L, H] or
    [B, H]; otherwise [L, B, H] or [L·B, H]. `decoder`: they are a decoder's, with a mask of its
    own.
    """

    samples_first: bool = True
    decoder: bool = False

    def by_sample(self, tokens: Tensor, samples: int) -> Tensor:
        """Returns the tokens with the samples along the first axis."""
        alone = samples == 1 and tokens.dim() == 3 and len(tokens) > 1  # [L, 1, H]
        if self.samples_first and not alone:
            return tokens
        if tokens.dim() == 2:
            tokens = tokens.unflatten(0, (-1, samples))
        return tokens.transpose(0, 1)


def find_orders(
    observe: Callable[[Change], Mapping[Key, Tensor]], samples: int
) -> dict[Key, bool | None]:
    """Finds out whether samples come first in what a network computes of one batch.

    Args:
        observe: runs the network with changed arguments; returns tokens [..., H] by any key.
        samples: B, 2 or more.

    Returns:
        By key True for [B, L, H], [B·L, H] and [B, H], False for [L, B, H] and [L·B, H], None for
        another order, or where no token changed.
    """
    plain = observe(lambda name, tensor: tensor)
    if any(tokens.dim() < 2 for tokens in plain.values()):
        raise InputError(
            "a layer that would be narrowed reads one vector, without an axis of samples; give "
            "batches of samples along the first axis, x[None] for one"
        )
    orders = {key: _Orders(samples) for key in plain}
    for sample in range(min(samples, _TRIES)):
        found = observe(_replaced(samples, sample, (sample + 1) % samples))
        for key, tokens in plain.items():
            orders[key].compare(sample, _changed(tokens, found[key]))
        if all(of_key.found is not None for of_key in orders.values()):
            break
    return {
        # One token a sample is in either order.
        key: True if shape[0] == shape.numel() == samples else orders[key].found
        for key, shape in ((key, tokens.shape[:-1]) for key, tokens in plain.items())
    }


@dataclass
class _Orders:
    """The orders of tokens that fit the changes so far."""

    samples: int
    first: bool = True
    last: bool = True
    changed: bool = False

    def compare(self, sample: int, changed: Tensor) -> None:
        """Drops the orders in which a token that changed, [...] bool, is another sample's."""
        places, shape = changed.flatten().nonzero().flatten(), changed.shape
        if not len(places):
            return
        per_sample = changed.numel() // self.samples
        self.changed = True
        self.first &= shape[0] % self.samples == 0 and bool((places // per_sample == sample).all())
        divides = len(shape) <= 2 and shape[-1] % self.samples == 0
        self.last &= divides and bool((places % self.samples == sample).all())

    @property
    def found(self) -> bool | None:
        """Whether samples come first; None if that is open."""
        return self.first if self.changed and self.first != self.last else None


def first_tensor(output: Any) -> Tensor | None:
    """Returns the first floating-point tensor with an axis of samples of a network's output."""
    found = tuple(output.values()) if isinstance(output, Mapping) else output
    for value in found if isinstance(found, (tuple, list)) else (found,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
    return None


def changed_arguments(
    names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any], change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changes every tensor among the arguments of a forward whose parameters have these names."""

    def changed(name: str, argument: Any) -> Any:
        return change(name, argument) if isinstance(argument, Tensor) else argument

    # Those of *args have no names.
    named = itertools.zip_longest(itertools.islice(names, len(args)), args, fillvalue="")
    return (
        tuple(changed(name, argument) for name, argument in named),
        {name: changed(name, argument) for name, argument in kwargs.items()},
    )


def _changed(tokens: Tensor, others: Tensor) -> Tensor:
    """Returns [...] bool, the tokens [..., H] that differ."""
    tokens, others = tokens.nan_to_num(), others.nan_to_num()
    return (tokens - others).abs().amax(-1) > _RTOL * tokens.abs().amax()


def _replaced(samples: int, sample: int, other: int) -> Change:
    """Replaces one sample by another, in every argument that has samples and is no mask."""

    def change(name: str, tensor: Tensor) -> Tensor:
        is_mask = "mask" in name or tensor.dtype == torch.bool
        if is_mask or tensor.dim() == 0 or len(tensor) != samples:
            return tensor
        tensor = tensor.clone()
        tensor[sample] = tensor[other]
        return tensor

    return change


@dataclass(frozen=True)
class Masks:
    """The tokens of one batch that count, [B, L] bool; None where all do.

    `tokens`: of the model's input. `decoder`: of its decoder's input, if the model has an encoder
    and a decoder (`decodes`). `frames`: makes a mask [B, frames] from the mask of an input that the
    model shortens first, such as sound.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    decodes: bool = False
    frames: Callable[[int, Tensor], Tensor] | None = None

    def cpu(self) -> "Masks":
        """Returns the same masks on the CPU."""
        tokens, decoder = (None if m is None else m.cpu() for m in (self.tokens, self.decoder))
        return replace(self, tokens=tokens, decoder=decoder)

    @property
    def of_output(self) -> Tensor | None:
        """The mask of the model's output."""
        return self.decoder if self.decodes else self.tokens

    def of(self, decoder: bool, length: int | None = None) -> Tensor | None:
        """Returns the mask of the layers of one side, for tokens [B, length]."""
        mask = self.decoder if decoder else self.tokens
        if mask is None or decoder or self.frames is None or length in (None, mask.shape[1]):
            return mask
        made = self.frames(length, mask.long()).bool()
        return made if made.shape == (len(mask), length) else mask


def masks_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Masks:
    """Returns the masks of a batch, from the arguments of the model's forward.

    Raises:
        InputError: a mask that is not [B, L].
    """
    names = inspect.signature(model.forward).parameters
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    tokens = _mask(given, "attention_mask")
    frames = None
    if tokens is not None and not any(name in given for name in ("input_ids", "inputs_embeds")):
        owners = (m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask"))
        owner: Any = next(owners, None)
        frames = None if owner is None else owner._get_feature_vector_attention_mask
    decodes = decoder_of(model) is not None
    decoder = _decoder_mask(given, tokens) if decodes else None
    return Masks(tokens, decoder, decodes, frames)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Returns the decoder of an encoder-decoder of transformers, which may be part of a model."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            find = getattr(module, "get_decoder", None)
            decoder = None if find is None else find()
            if isinstance(decoder, nn.Module) and decoder is not module:
                return decoder
    return None


def change_decoder_inputs(name: str, tensor: Tensor) -> Tensor:
    """Shifts a decoder's inputs, or the labels that a model makes them of, by a token."""
    is_input = name in (*_DECODER_INPUTS, "labels") and tensor.dim() > 1
    return tensor.roll(1, 1) if is_input else tensor


def _decoder_mask(given: Mapping[str, Any], tokens: Tensor | None) -> Tensor | None:
    """Returns the mask of the decoder's inputs, which a model may make of labels or tokens."""
    if given.get("decoder_attention_mask") is not None:
        return _mask(given, "decoder_attention_mask")
    if any(given.get(name) is not None for name in _DECODER_INPUTS):
        return None
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        counts = labels != _IGNORED
        return None if bool(counts.all()) else counts
    if tokens is None or bool(tokens.all()):
        return None
    return tokens.roll(1, dims=1).index_fill(
        1, torch.tensor(0, dtype=torch.int64, device=tokens.device), True
    )


def _mask(given: Mapping[str, Any], name: str) -> Tensor | None:
    mask = given.get(name)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"{name} must be [B, L], not 0 where a token counts; got {got}")
    return mask.bool()
