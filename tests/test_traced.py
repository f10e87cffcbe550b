"""Sites found by following channels through a traced network."""

import copy

import pytest
import torch
from torch import nn

import grail
from bench.networks import ResNet
from grail.errors import ModelError

from .test_named import CONV, HIDDEN, Network, network


def parts(site: grail.Site) -> tuple:
    return set(site.producers), set(site.along), set(site.consumers)


def test_activations_of_one_writer_and_one_reader_are_found():
    sites = grail.trace(network())
    assert list(map(parts, sites)) == list(map(parts, (CONV, HIDDEN)))


def test_a_residual_stream_is_one_site_with_all_that_writes_and_reads_it():
    torch.manual_seed(0)
    model = ResNet(channels=1, width=4).eval()
    assert all(len(s.producers) == 1 for s in grail.trace(model))
    streams = [s for s in grail.trace(model, streams=True) if len(s.producers) > 1]
    assert parts(streams[0]) == (
        {"conv1", "layer1.0.conv2", "layer1.1.conv2"},
        {"bn1", "layer1.0.bn2", "layer1.1.bn2"},
        {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"},
    )
    assert "fc" in streams[-1].consumers


def test_what_a_trace_finds_can_be_compressed():
    torch.manual_seed(0)
    model = ResNet(channels=1, width=8).eval()
    batches = [torch.randn(16, 1, 28, 28) for _ in range(4)]
    sites = grail.trace(model, streams=True)
    dense = copy.deepcopy(model)
    with torch.no_grad():  # every odd channel of every site is cut off where it is read
        for site in sites:
            for name in site.consumers:
                dense.get_submodule(name).weight[:, 1::2] = 0
        model.load_state_dict(dense.state_dict())
        expected = dense(batches[0])
        grail.compress(
            model, batches, 0.5, sites, "wanda", compensate=False, multiple=1, progress=False
        )
        torch.testing.assert_close(model(batches[0]), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < 0.3 * sum(
        p.numel() for p in dense.parameters()
    )


class Odd(nn.Module):
    """A concatenation, a map flattened position by position, a shared layer, a broadcast scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.joined, self.shared = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.scaled, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4 * 4, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        both = torch.cat([self.a(x), self.b(x)], 1)
        y = self.shared(self.shared(self.joined(both)))
        y = self.scaled(y * self.scale + self.c(x) * 2)
        return self.last(y.relu().permute(0, 2, 3, 1).flatten(1))


def test_ambiguous_flows_are_given_up():
    with pytest.raises(ModelError, match="no unambiguous site in Odd"):
        grail.trace(Odd().eval(), streams=True)


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between, kind=nn.Linear, *sizes):
        super().__init__()
        self.first, self.second = kind(4, 12, *sizes), kind(12, 4, *sizes)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        nn.Softmax(dim=1),  # of vectors; of tokens it would be along them
        nn.Softmax(dim=-1),
        nn.functional.normalize,
        lambda x: x - x.mean(1).unsqueeze(1),
        nn.BatchNorm1d(10),  # of ten tokens
        nn.PReLU(10),
    ],
    ids=["softmax", "last", "normalize", "centred", "norm", "prelu"],
)
def test_what_may_mix_the_channels_of_vectors_or_of_tokens_is_not_followed(between):
    said = "the channels of first are lost in|has 10 channels, where its site has 12"
    with pytest.raises(ModelError, match=said):
        grail.trace(Between(between).eval())


@pytest.mark.parametrize(
    "between",
    [lambda x: x.flip(1), lambda x: x.cumsum(1), nn.LocalResponseNorm(5), nn.functional.normalize],
    ids=["flip", "cumsum", "response", "normalize"],
)
def test_no_channel_of_an_image_may_depend_on_another(between):
    with pytest.raises(ModelError, match="the channels of first are lost in"):
        grail.trace(Between(between, nn.Conv2d, 1).eval())


def test_layers_along_the_channels_of_vectors_are_found():
    network = Between(nn.Sequential(nn.BatchNorm1d(12), nn.PReLU(12))).eval()
    (site,) = grail.trace(network)
    assert site.along == ("between.0", "between.1")
    vectors = [torch.randn(9, 4) for _ in range(3)]
    grail.compress(network, vectors, 0.5, sites=[site], progress=False)
    assert network(vectors[0]).shape == (9, 4)


def test_layers_along_as_many_tokens_as_there_are_channels_leave_the_network_as_it_was():
    network = Between(nn.BatchNorm1d(12)).eval()
    tokens = [torch.randn(9, 12, 4) for _ in range(3)]
    before = network(tokens[0])
    sites = grail.trace(network)
    with pytest.raises(ModelError, match="does not run once it is narrow"):
        grail.compress(network, tokens, 0.5, sites=sites, progress=False)
    assert torch.equal(network(tokens[0]), before)


def test_a_gated_mlp_has_two_producers():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    (site,) = grail.trace(Gated(), streams=True)
    assert parts(site) == ({"gate", "up"}, set(), {"down"})


def test_what_cannot_be_traced_is_refused_with_the_reason():
    class Branching(Network):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="Branching cannot be traced"):
        grail.trace(Branching())
