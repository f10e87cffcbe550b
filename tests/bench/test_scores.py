"""Scores of compressed networks, against independent computations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bench.quality import scores


class Wrapped(nn.Identity):
    """Returns its input as the logits of a transformers output."""

    def forward(self, x):
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize("network", [nn.Identity(), Wrapped()], ids=["tensor", "logits"])
def test_accuracy_is_the_share_of_right_predictions(network):
    outputs = torch.tensor([[0.0, 1.0, 0.5], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([1, 0, 2, 2], dtype=torch.uint8)
    assert scores.predictions(network, outputs, batch=3).tolist() == [1, 0, 2, 0]
    assert scores.accuracy(network, outputs, labels, batch=3) == 0.75


@pytest.mark.parametrize("network", [nn.Identity(), Wrapped()], ids=["tensor", "logits"])
def test_distances_of_each_input_are_those_of_the_probabilities(network):
    generator = torch.Generator().manual_seed(0)
    own, dense = (torch.randn(7, 4, generator=generator, dtype=torch.float32) for _ in range(2))
    labels = torch.arange(7, dtype=torch.int64) % 4
    logarithms = [scores.log_probabilities(network, x, batch=3) for x in (own, dense)]
    found = scores.distances(*logarithms, labels)
    p, q = (x.double().softmax(-1).numpy() for x in (dense, own))
    np.testing.assert_allclose(found["kl"].numpy(), (p * np.log(p / q)).sum(1), rtol=1e-12)
    assert found["agreement"].tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert found["accuracy"].tolist() == (q.argmax(1) == labels.numpy()).tolist()
    assert found["accuracy"].mean().item() == pytest.approx(scores.accuracy(network, own, labels))
    assert "accuracy" not in scores.distances(*logarithms)


def test_an_embedding_does_not_depend_on_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
    )
    encoder = transformers.BertModel(config).double().eval()
    tokens = torch.randint(50, (1, 7))
    alone = scores.embed(encoder, [{"input_ids": tokens, "attention_mask": torch.ones(1, 7)}])
    padded = torch.cat([tokens, torch.randint(50, (1, 5))], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 5])
    together = scores.embed(encoder, [{"input_ids": padded, "attention_mask": mask}])
    # Embeddings are fp32 of length 1: eps of 1.2e-7, and a few roundings in mean and norm.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    hidden = encoder(input_ids=tokens).last_hidden_state[0].detach().numpy()
    expected = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
    np.testing.assert_allclose(alone[0].numpy(), expected, rtol=0, atol=1e-6)


def test_mean_cosine_averages_over_sentences():
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    compressed = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    # The cosines are 1, 0 and −1; fp64 rounds by 1e-16.
    assert scores.mean_cosine(compressed, dense) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_rank_correlation_is_spearmans(ties):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 5, generator=generator)
    compressed = dense + torch.randn(12, 5, generator=generator)
    if ties:  # unit vectors along axes: their cosines are 0 and 1 alone
        dense, compressed = (torch.eye(5)[half.argmax(1)] for half in (dense, compressed))
    rows, columns = np.triu_indices(12, 1)
    similarities = []
    for vectors in (compressed, dense):
        unit = vectors.double().numpy()
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        similarities.append((unit @ unit.T)[rows, columns])
    expected = stats.spearmanr(*similarities).statistic
    # Both are fp64 over 66 pairs.
    assert scores.rank_correlation(compressed, dense) == pytest.approx(expected, abs=1e-12)
