"""Scores of a compressed network: accuracy, and agreement with the dense network.

| network | score |
|---|---|
| classifier, with labels | `accuracy(network, inputs, labels)` |
| classifier, without | `accuracy(network, inputs, predictions(dense, inputs))` |
| classifier, for each input | `distances(log_probabilities(network, inputs), …)` |
| sentence encoder | `mean_cosine` and `rank_correlation` of `embed(encoder, batches)` |
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def predictions(network: nn.Module, inputs: Tensor, batch: int = 500) -> Tensor:
    """Index of the highest output of each of `inputs` [N, …]: [N], int64.

    The network is called as it is: in evaluation mode, if batches shall not matter.
    """
    return torch.cat([logits.argmax(-1) for logits in _logits(network, inputs, batch)])


@torch.no_grad()
def log_probabilities(network: nn.Module, inputs: Tensor, batch: int = 500) -> Tensor:
    """Logarithms of the probabilities of each of `inputs` [N, …]: [N, classes], fp64."""
    found = _logits(network, inputs, batch)
    return torch.cat([logits.double().log_softmax(-1) for logits in found])


def distances(own: Tensor, dense: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Measures of each input, [N] fp64, from log-probabilities of two networks, [N, classes].

    KL(dense‖own) in nats, agreement of the predictions and, with labels [N], being right.
    """
    guesses = own.argmax(-1)
    found = {
        "kl": (dense.exp() * (dense - own)).sum(-1),
        "agreement": (guesses == dense.argmax(-1)).double(),
    }
    return found if labels is None else found | {"accuracy": (guesses == labels).double()}


def _logits(network: nn.Module, inputs: Tensor, batch: int) -> Iterator[Tensor]:
    for part in inputs.split(batch):
        outputs: Any = network(part)
        yield getattr(outputs, "logits", outputs)


def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of `inputs` [N, …] whose prediction is that of `labels` [N]."""
    return (predictions(network, inputs, batch) == labels).float().mean().item()


@torch.no_grad()
def embed(
    encoder: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> Tensor:  # [N, hidden] fp32, each of length 1
    """Sentence embeddings: the mean of the last hidden states where the mask is 1, normalised.

    This is the pooling all-MiniLM-L6-v2 was trained with (Reimers and Gurevych 2019,
    arXiv 1908.10084).
    """
    embeddings = []
    for batch in batches:
        hidden = encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        embeddings.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(embeddings)


def mean_cosine(embeddings: Tensor, dense: Tensor) -> float:
    """Mean cosine of each sentence's embedding with its dense one; both [N, hidden]."""
    return F.cosine_similarity(embeddings.double(), dense.double(), dim=-1).mean().item()


def rank_correlation(embeddings: Tensor, dense: Tensor) -> float:
    """Spearman correlation of the similarities of all pairs of sentences; both [N, hidden].

    It is 1 if the compressed encoder orders all N (N − 1) / 2 pairs as the dense one does.
    """
    pairs = torch.triu_indices(len(dense), len(dense), offset=1)
    ranks = []
    for vectors in (embeddings, dense):
        unit = F.normalize(vectors.double(), dim=-1)
        ranks.append(_ranks((unit @ unit.T)[pairs[0], pairs[1]]))
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Rank of each of `values` [N]; equal ones share the mean of their ranks."""
    _, position, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[position]
