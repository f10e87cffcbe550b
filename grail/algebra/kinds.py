"""Kinds of layers: their storage of weights, the inputs of each output, and refused kinds.

    Linear, Conv1d … Conv3d      weight [outputs, inputs / groups, taps …]
    transformers' Conv1D         weight [inputs, outputs]
    ConvTranspose1d … 3d         weight [inputs, outputs / groups, taps …]

A transposed convolution is an ordinary one of stride 1 with its taps in reverse, over an input with
zeros between its values. A subclass is of its parent's kind where it computes the same.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from grail.arguments import is_quantised
from grail.errors import ModelError
from grail.runtime.transaction import Transaction

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MAPS = (*CONVOLUTIONS, *TRANSPOSED)  # layers that read and write maps [N, channels, …]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Attributes of layers with an adapter, which do not compute with their weight alone.
_ADAPTED = ("base_layer", "lora_A")


def as_matrix(module: Any, weight: Tensor) -> Tensor:
    """Returns a weight, or its gradient, as [outputs, inputs / groups, taps …]."""
    if _is_conv1d(module):
        return weight.T
    if not isinstance(module, TRANSPOSED):
        return weight
    by_group = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return by_group.flip(tuple(range(2, weight.dim())))


def as_stored(module: Any, matrix: Tensor) -> Tensor:
    """Returns the weight whose `as_matrix` is this matrix; the steps are their own inverse."""
    return as_matrix(module, matrix)


def window(module: Any) -> tuple[Any, ...]:
    """Returns what determines which values each output reads; () of a linear layer.

    Layers of one window have the same tokens of an input.
    """
    if not isinstance(module, MAPS):
        return ()
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    # Of transposed convolutions `output_padding`, too.
    sizes = [getattr(module, name, None) for name in (*names, "output_padding")]
    return (module.transposed, *sizes)


def windows(module: Any, x: Tensor) -> Tensor:
    """Returns the values that each output of a convolution reads: [N, positions …, channels·taps].

    Args:
        x: [N, channels, …], the layer's input.
    """
    axes = len(module.kernel_size)
    if isinstance(module, TRANSPOSED):
        x, stride = _spread(module, x), (1,) * axes
    else:
        x, stride = _padded(module, x), module.stride
    steps = zip(module.kernel_size, stride, module.dilation, strict=True)
    for axis, (taps, step, gap) in enumerate(steps, start=2):
        x = x.unfold(axis, gap * (taps - 1) + 1, step)[..., ::gap]
    # Channel by channel in memory, as `torch.nn.functional.unfold` gives them.
    taps_first = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return x.permute(taps_first).flatten(1, 1 + axes).movedim(1, -1)


def columns(module: Any) -> int:
    """Returns the number of columns of a layer's weight as [outputs, columns].

    Raises:
        ModelError: the layer is no Linear, convolution or transformers' Conv1D.
    """
    if not isinstance(module, (nn.Linear, *MAPS)) and not _is_conv1d(module):
        raise ModelError(
            f"a {type(module).__name__} has no weight of [outputs, columns]; Linear, Conv1d to "
            "Conv3d, ConvTranspose1d to 3d and transformers' Conv1D have"
        )
    return as_matrix(module, module.weight.detach())[0].numel()


def tokens_read(module: Any, x: Tensor) -> Tensor:
    """Returns a layer's input as the tokens that the columns of its weight read.

    Args:
        x: the layer's input.

    Returns:
        Of a linear layer the input itself. Of a convolution [N, positions, channels·taps], a token
        for each output position; of one with groups [N, positions, groups, channels/groups·taps],
        a token also for each group, since every group reads as many columns.
    """
    if not isinstance(module, MAPS):
        return x
    tokens = windows(module, x).flatten(1, -2)
    return tokens if module.groups == 1 else tokens.unflatten(-1, (module.groups, -1))


def _padded(module: Any, x: Tensor) -> Tensor:
    """Returns the input of a convolution with its padding."""
    if module.padding == "valid":
        return x
    if module.padding == "same":
        total = [gap * (k - 1) for gap, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(size // 2, size - size // 2) for size in total]
    else:
        sides = [(size, size) for size in module.padding]
    return _ringed(x, sides, module.padding_mode.replace("zeros", "constant"))


def _spread(module: Any, x: Tensor) -> Tensor:
    """Returns the input of a transposed convolution with zeros between and around its values."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in module.stride))
    spread[places] = x
    sides = []
    for axis, taps in enumerate(module.kernel_size):
        side = module.dilation[axis] * (taps - 1) - module.padding[axis]
        sides.append((side, side + module.output_padding[axis]))
    return _ringed(spread, sides, "constant")


def _ringed(x: Tensor, sides: list[tuple[int, int]], mode: str) -> Tensor:
    ring = [size for side in reversed(sides) for size in side]
    return nn.functional.pad(x, ring, mode) if any(ring) else x


def set_sizes(module: Any, change: Transaction) -> None:
    """Sets a layer's attributes of its sizes by its weight."""
    shape = module.weight.shape
    if _is_conv1d(module):
        sizes = {"nx": shape[0], "nf": shape[1]}
    elif isinstance(module, nn.Linear):
        sizes = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, TRANSPOSED):
        sizes = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    else:
        sizes = {"out_channels": shape[0], "in_channels": shape[1] * module.groups}
    for key, value in sizes.items():
        if hasattr(module, key):
            change.set_attribute(module, key, value)


def is_depthwise(module: Any) -> bool:
    """Returns whether a layer is a convolution with one filter for each channel."""
    if not isinstance(module, MAPS):
        return False
    return module.groups == module.in_channels == module.out_channels and module.groups > 1


def _is_conv1d(module: Any) -> bool:
    """Returns whether a layer is transformers' Conv1D, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def require_plain(name: str, module: Any) -> None:
    """Raises ModelError for a layer whose weight alone does not determine its output."""
    is_a = f"{name} is a {type(module).__name__}"
    if any(hasattr(module, mark) for mark in _ADAPTED):
        raise ModelError(f"{is_a}, a layer with an adapter: call model.merge_and_unload() first")
    if is_quantised(module):
        raise ModelError(f"{is_a}, a quantised layer: load the model without quantisation")
    kind = next((kind for kind in (nn.Linear, *MAPS) if isinstance(module, kind)), None)
    if kind is None and not _is_conv1d(module):
        raise ModelError(
            f"{is_a}, not a plain floating-point Linear or convolution; producers and consumers "
            "of a site are Linear, Conv1d to Conv3d and ConvTranspose1d to 3d"
        )
    require_own(name, module)
    weight: Tensor = module.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _FLOATS:
        raise ModelError(
            f"{is_a}, not a plain floating-point Linear or convolution: its weight is a "
            f"{type(weight).__name__} of {weight.dtype}; load the model without quantisation"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ModelError(
            f"{name} belongs to torch's MultiheadAttention, which reads its weight without calling "
            "it, so what it reads cannot be seen"
        )
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise ModelError(
            f"{is_a} whose forward was replaced on this very layer, so its weight alone does not "
            "say what it computes; restore the forward of its class"
        )
    if kind is not None and not _computes_as(kind, module):
        raise ModelError(
            f"{is_a}, not a plain floating-point Linear or convolution: its forward computes "
            f"something else than that of {kind.__name__}; replace it by one"
        )


def require_own(name: str, module: nn.Module) -> None:
    """Raises ModelError for a layer without a weight, or that computes it whenever it runs."""
    for key in ("weight", "bias"):
        computed = isinstance(getattr(type(module), key, None), property)
        if computed or is_parametrized(module, key) or key in vars(module):
            raise ModelError(
                f"{name} computes its {key} whenever it runs, as torch.nn.utils.prune, weight_norm "
                "and spectral_norm make it do; make that permanent first (prune.remove, "
                "remove_weight_norm, remove_spectral_norm, remove_parametrizations)"
            )
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        raise ModelError(
            f"{name} is a {type(module).__name__} that has no size yet; run the model once on a "
            "batch, which gives it one"
        )


def plain_output(module: Any, x: Tensor) -> Tensor:
    """Computes a layer's output by its weight and bias alone, as its kind does."""
    if _is_conv1d(module):
        return nn.functional.linear(x, module.weight.T, module.bias)
    kind = next(kind for kind in (nn.Linear, *MAPS) if isinstance(module, kind))
    output: Tensor = kind.forward(module, x)
    return output


def _computes_as(kind: Any, module: Any) -> bool:
    """Returns whether a layer of a subclass of `kind` computes the same as its parent.

    Where it overrides how it computes, both are tried on a twin with a few small weights.
    """
    own: Any = type(module)
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    if all(getattr(own, name) is getattr(kind, name) for name in methods):
        return True
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if set(tensors) - {"weight", "bias"}:
        return False
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    if kind is nn.Linear:
        weight = drawn(5, 3)
        inputs = [drawn(*(2, 4, 6)[:axes], 3) for axes in range(4)]
    else:
        weight = drawn(2 * module.groups, 2, *module.kernel_size)
        taps = list(zip(module.dilation, module.kernel_size, strict=True))
        # Padding may hang on what is left of a size over the stride.
        inputs = [
            drawn(2, 2 * module.groups, *(gap * (size - 1) + more for gap, size in taps))
            for more in range(2, 3 + max(module.stride))
        ]
    small = {"weight": weight, "bias": None if module.bias is None else drawn(len(weight))}
    twin, plain = copy.copy(module), copy.copy(module)
    twin.__dict__["_parameters"] = plain.__dict__["_parameters"] = small
    plain.__class__ = kind
    try:
        return all(torch.allclose(own.forward(twin, x), plain.forward(x)) for x in inputs)
    except Exception:  # it may want anything but such weights
        return False
