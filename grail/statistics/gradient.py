"""Regional gradients: the sensitivity of a block's output to each weight of a site's consumers.

One backward pass for each batch, from the block's output to the consumers'. Nothing is trained.

Source: Yang et al., "Wanda++: pruning large language models via regional gradients" (Findings of
ACL 2025): √(1/N Σ_n (∂‖f(X_n)‖₂/∂W)²) over N sequences X_n.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from grail.algebra.kinds import MAPS
from grail.calibrate.samples import first_tensor
from grail.calibrate.stream import Stream
from grail.errors import InputError, ModelError, NonFiniteError
from grail.networks import BoundSite
from grail.networks.layers import Consumer


def regional_gradient(
    stream: Stream, site: BoundSite, drops: bool = False, holds_out: bool = False
) -> Tensor:
    """Returns the root mean square, over sequences, of ∂‖f(X)‖₂/∂W of a site's consumers.

    Args:
        stream: at the entry of the site's block. Tokens outside its masks do not count.
        site: its consumers are stacked along O.
        drops: whether a sequence whose gradient holds NaN or Inf is left out, not refused.
        holds_out: whether held-out sequences are left out. Guard text always is; where other text
            selects channels than is fitted, that alone counts.

    Returns:
        [O, H] fp32.

    Raises:
        InputError: a site of experts.
        ModelError: a block that returns no tensor.
        NonFiniteError: a gradient with NaN or Inf.
    """
    if site.group is not None:
        raise InputError(
            f"{site.name}: this selector needs the gradient of its weight, which lies in a "
            "tensor of all experts; choose another selector"
        )
    weights: list[Any] = [consumer.module.weight for consumer in site.consumers]
    squares = [torch.zeros_like(weight.detach(), dtype=torch.float32) for weight in weights]
    count = 0
    for batch in range(len(stream)):
        for gradients in _of_sequences(stream, batch, site, holds_out):
            if all(bool(gradient.isfinite().all()) for gradient in gradients):
                count += 1
                for square, gradient in zip(squares, gradients, strict=True):
                    square += gradient.square()
            elif not drops:
                raise _non_finite(site, gradients)
    total = max(1, int(stream.processes.total(torch.tensor(count, dtype=torch.int64))))
    return torch.cat(
        [
            consumer.as_rows((stream.processes.total(square) / total).sqrt())
            for consumer, square in zip(site.consumers, squares, strict=True)
        ]
    )


def _of_sequences(
    stream: Stream, batch: int, site: BoundSite, holds_out: bool
) -> Iterator[list[Tensor]]:
    """Yields the gradient of each consumer's weight, fp32, for each sequence that counts."""
    inputs: dict[nn.Module, Tensor] = {}
    probes: dict[nn.Module, Tensor] = {}

    def probe(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[module] = args[0].detach()
        probes[module] = torch.zeros_like(output, requires_grad=True)
        return output + probes[module]

    modules = [consumer.module for consumer in site.consumers]
    with ExitStack() as hooks, torch.enable_grad():
        for module in modules:
            hooks.enter_context(module.register_forward_hook(probe))
        for parameter in stream.blocks[site.block].parameters():
            if parameter.requires_grad:  # else what runs before the probes is kept for autograd
                hooks.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        output = _block_output(stream, batch, site)
        # Sequences do not mix, so the gradient of the sum holds the gradient of each.
        norms = output.flatten(1).norm(dim=1).sum()
        slopes = torch.autograd.grad(norms, [probes[module] for module in modules])
    samples = len(output)
    for sequence in _counting(stream, batch, samples, holds_out):
        yield [
            _of_weight(
                consumer,
                _rows(inputs[consumer.module], samples, sequence).float(),
                _rows(slope, samples, sequence).float(),
            )
            for consumer, slope in zip(site.consumers, slopes, strict=True)
        ]


def _block_output(stream: Stream, batch: int, site: BoundSite) -> Tensor:
    """Returns the output of the site's block, fp32; 0 for tokens that do not count."""
    returned = stream.run(site.block, batch)
    output = first_tensor(returned)
    if output is None:
        raise ModelError(
            f"{site.name}: its block returns {type(returned).__name__}, in which there is no "
            "tensor to take a gradient of; choose another selector"
        )
    output, mask = output.float(), stream.output_mask(batch)
    if mask is None or mask.shape != output.shape[:-1]:
        return output
    return output.where(mask.unsqueeze(-1), 0)


def _counting(stream: Stream, batch: int, samples: int, holds_out: bool) -> list[int]:
    """Returns the sequences of a batch that count."""
    mask = stream.output_mask(batch)
    counts = torch.ones(samples, dtype=torch.bool) if mask is None else mask.any(1).cpu()
    roles = stream.by_role(batch, holds_out)
    if stream.selecting not in roles:
        return []
    rows = roles[stream.selecting]
    counts = counts if rows is None else counts & rows
    found: list[int] = counts.nonzero().flatten().tolist()
    return found


def _rows(tensor: Tensor, sequences: int, sequence: int) -> Tensor:
    """Returns one sequence's part of a tensor; some layers read all tokens in one row."""
    return tensor.reshape(sequences, -1, *tensor.shape[1:])[sequence]


def _of_weight(consumer: Consumer, x: Tensor, slope: Tensor) -> Tensor:
    """Returns the gradient of a layer's weight, from its input and the gradient of its output."""
    module: Any = consumer.module
    if isinstance(module, MAPS):
        return _of_map(module, x, slope)
    product = slope.flatten(0, -2).T @ x.flatten(0, -2)
    return product if isinstance(module, nn.Linear) else product.T  # a Conv1D's


def _of_map(module: Any, x: Tensor, slope: Tensor) -> Tensor:
    """Returns the gradient of a convolution's weight, for any padding."""
    own = {key: value.detach().float() for key, value in module.named_parameters(recurse=False)}
    with torch.enable_grad():
        weight = own["weight"].requires_grad_()
        (gradient,) = torch.autograd.grad(functional_call(module, own, (x,)), [weight], slope)
    return gradient


def _non_finite(site: BoundSite, gradients: list[Tensor]) -> NonFiniteError:
    rows = torch.cat(
        [c.as_rows(~g.isfinite()) for c, g in zip(site.consumers, gradients, strict=True)]
    )
    channels = rows.any(0).nonzero().flatten().tolist()
    return NonFiniteError(f"gradient of {site.name}", channels, int(rows.sum()))
