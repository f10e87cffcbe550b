"""Logits of a batch, of few positions at a time, from the last hidden states where these suffice.

All logits of a batch would need more memory than the model: 16 sequences × 1024 × 49152 are 3 GiB.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from grail.errors import InputError

MOST = 1 << 24  # logits held at a time, 64 MiB of fp32
_PROBED = 16  # tokens that show whether logits are the output layer of the hidden states

Inputs = Mapping[str, Tensor]


class BatchLogits:
    """Logits of the predicting positions of a batch, all but the last of each sequence."""

    vocabulary: int | None = None  # None: a whole sequence at a time, as the model computes them

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns logits [stop − start, vocabulary] of positions, sequence after sequence."""
        raise NotImplementedError


class _OfHidden(BatchLogits):
    def __init__(self, layer: Any, hidden: Tensor, device: torch.device):
        self.hidden = hidden  # [sequences, length, features]
        self.vocabulary = layer.vocabulary if isinstance(layer, _Tail) else layer.weight.shape[0]
        self._layer, self._rows, self._device = layer, hidden[:, :-1].flatten(0, 1), device

    def rows(self, start: int, stop: int) -> Tensor:
        logits = self._layer(self._rows[start:stop].to(self._device))
        assert isinstance(logits, Tensor)
        return logits


class _OfModel(BatchLogits):
    """Runs the model's own forward for each sequence."""

    def __init__(self, model: Any, inputs: Inputs):
        self._model, self._inputs = model, inputs

    def rows(self, start: int, stop: int) -> Tensor:
        index = start // (stop - start)
        one = {name: value[index : index + 1] for name, value in self._inputs.items()}
        logits = self._model(**one, use_cache=False).logits[0, :-1]
        assert isinstance(logits, Tensor)
        return logits


class _Given(nn.Module):
    """Stands for a base model whose last hidden states are known."""

    def __init__(self, outputs: type):
        super().__init__()
        self._outputs = outputs

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        return self._outputs(last_hidden_state=inputs_embeds)


class _Tail(nn.Module):
    """All that a model computes from its last hidden states [rows, features]."""

    def __init__(self, model: Any, outputs: type):
        super().__init__()
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.model = copy.copy(model)
        known = {model.base_model_prefix: _Given(outputs)}
        self.model.__dict__["_modules"] = {**model._modules, **known}

    def forward(self, rows: Tensor) -> Tensor:
        logits = self.model(inputs_embeds=rows[None], use_cache=False).logits[0]
        assert isinstance(logits, Tensor)
        return logits


class Network:
    """A causal language model as a source of logits."""

    def __init__(self, model: Any):
        self.model = model
        self.layer: nn.Module | None = None  # whose outputs of the hidden states are the logits
        self.probed = False  # whether `layer` is known

    def logits(self, index: int, batch: Inputs, targets: Tensor) -> BatchLogits:
        """Returns the logits of the batch of that index."""
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        if not self.probed:
            self.layer, self.probed = output_layer(self.model, inputs["input_ids"]), True
        if self.layer is None:
            return _OfModel(self.model, inputs)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return _OfHidden(self.layer, hidden, hidden.device)


def output_layer(model: Any, tokens: Tensor) -> nn.Module | None:
    """Returns the layer whose outputs of the last hidden states are exactly the logits, if any.

    It is the output layer, or that with what some architectures do around it, who project the
    hidden states first, or scale or cap the logits. Sixteen tokens show it.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens = tokens[:1, :_PROBED]
    outputs = model.base_model(input_ids=tokens, use_cache=False)
    hidden, logits = outputs.last_hidden_state, model(input_ids=tokens, use_cache=False).logits
    if head.weight.shape[1] == hidden.shape[-1] and head(hidden).equal(logits):
        assert isinstance(head, nn.Module)
        return head
    if model.base_model_prefix not in model._modules:
        return None
    with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # of other forward methods
        tail = _Tail(model, type(outputs))
        return tail if tail(hidden[0]).equal(logits[0]) else None
    return None


class Recorded:
    """The logits of a model on some batches, as their last hidden states and its output layer.

    Both are copies in host memory in the model's dtype: [tokens, features] and
    [vocabulary, features]. The model may change or go. Where no layer makes the logits of the
    hidden states (`output_layer`), the model itself is kept and runs again.
    """

    def __init__(self, network: Network):
        self._network: Network | None = network
        self._layer: nn.Module | None = None
        self._states: list[Tensor] = []
        self._targets: list[Tensor] = []

    @property
    def runs_model(self) -> bool:
        """Whether the model runs again for each batch."""
        return self._network is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        layer = () if self._layer is None else self._layer.parameters()
        return sum(tensor.nbytes for tensor in (*self._states, *self._targets, *layer))

    def record(self, logits: BatchLogits, targets: Tensor) -> None:
        """Keeps the next batch."""
        self._targets.append(targets.cpu())
        if not isinstance(logits, _OfHidden):
            return
        if self._network is not None:
            layer = self._network.layer
            if layer is None or any(parameter.is_meta for parameter in layer.parameters()):
                return
            if isinstance(layer, _Tail):
                self._layer = copy.deepcopy(layer).cpu()
            elif type(layer) is nn.Linear:
                self._layer = _copied(layer)
            else:
                return
            self._network = None
        self._states.append(logits.hidden.cpu().clone())

    def logits(self, index: int, batch: Inputs, targets: Tensor) -> BatchLogits:
        """Returns the logits of the batch of that index.

        Raises:
            InputError: that batch was another one.
        """
        known = self._targets[index] if index < len(self._targets) else None
        if known is None or not known.equal(targets.cpu()):
            raise InputError(
                f"batch {index} is not the one of the dense reference; evaluate on the batches "
                "that the reference was made from, in the same order"
            )
        if self._network is not None:
            return self._network.logits(index, batch, targets)
        layer = self._layer
        assert layer is not None
        if next(layer.parameters()).device != targets.device:
            layer = copy.deepcopy(layer).to(targets.device)
        return _OfHidden(layer, self._states[index], targets.device)


def _copied(layer: nn.Linear) -> nn.Linear:
    """Returns a copy of a linear layer in host memory, without its hooks."""
    rows, features = layer.weight.shape
    found = nn.utils.skip_init(
        nn.Linear, features, rows, bias=layer.bias is not None, dtype=layer.weight.dtype
    )
    found.requires_grad_(False)
    found.weight.copy_(layer.weight)
    if layer.bias is not None:
        found.bias.copy_(layer.bias)
    return found


def steps(
    own: BatchLogits, dense: BatchLogits | None, sequences: int, length: int
) -> Iterator[tuple[int, int]]:
    """Yields ranges of positions whose logits are few enough; sequences where these are needed.

    Args:
        own, dense: the logits that are taken together.
        sequences: of the batch.
        length: predicting positions of each.
    """
    sources = [own] if dense is None else [own, dense]
    known = [source.vocabulary for source in sources if source.vocabulary is not None]
    size = max(1, MOST // max(known)) if len(known) == len(sources) else max(1, length)
    for start in range(0, sequences * length, size):
        yield start, min(start + size, sequences * length)
