"""Scores of a compressed network: accuracy, and agreement with the dense network.

| network | score |
|---|---|
| classifier, with labels | `accuracy(network, inputs, labels)` |
| classifier, without | `accuracy(network, inputs, predictions(dense, inputs))` |
| sentence encoder | `mean_cosine` and `rank_correlation` of `embed(encoder, batches)` |
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def predictions(network: nn.Module, inputs: Tensor, batch: int = 500) -> Tensor:
    """Index of the highest output of each of `inputs` [N, …]: [N], int64.

    The network is called as it is: in evaluation mode, if batches shall not matter.
    """
    guesses = []
    for part in inputs.split(batch):
        outputs: Any = network(part)
        guesses.append(getattr(outputs, "logits", outputs).argmax(-1))
    return torch.cat(guesses)


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
