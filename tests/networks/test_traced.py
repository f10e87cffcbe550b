"""Sites found by following channels through a traced network."""

import copy

import pytest
import torch
from torch import nn

import grail
from bench.quality.networks import ResNet
from grail.errors import ModelError
from tests.networks.test_named import CONV, HIDDEN, Network, network


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


class LeNet(nn.Module):
    """Two convolutions, and a classifier that reads their flattened map."""

    def __init__(self, flatten):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 7, 3)
        self.fc1, self.fc2 = nn.Linear(7 * 6, 11), nn.Linear(11, 5)
        self.flatten = flatten

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = self.flatten(nn.functional.max_pool2d(self.conv2(x).relu(), 2))
        return self.fc2(self.fc1(x).relu())


def unpacked(x):
    b, c, h, w = x.shape
    return x.view(b, c * h * w)


FLATTENS = {
    "module": nn.Flatten(),
    "method": lambda x: x.flatten(1),
    "function": lambda x: torch.flatten(x, start_dim=1),
    "size": lambda x: x.view(x.size(0), -1),
    "sizes": lambda x: x.view(x.size()[0], -1),
    "shape": lambda x: x.reshape(x.shape[0], -1),
    "len": lambda x: x.reshape(len(x), -1),
    "tuple": lambda x: torch.reshape(x, (x.size(0), -1)),
    "unpacked": unpacked,
    "product": lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
    "turned": lambda x: x.transpose(2, 3).flatten(1),
    "dropout": nn.Sequential(nn.Flatten(), nn.Dropout(), nn.ReLU()),
}
LENET_BATCHES = [torch.randn(50, 1, 20, 16) for _ in range(3)]


def lenet(flatten):
    torch.manual_seed(0)
    return LeNet(flatten).eval()


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS)
def test_a_flattened_map_is_followed_to_its_linear_layer(flatten):
    model, batches = lenet(flatten), LENET_BATCHES
    sites = grail.trace(model)
    found = [(site.producers, site.consumers) for site in sites]
    assert found == [(("conv1",), ("conv2",)), (("conv2",), ("fc1",)), (("fc1",), ("fc2",))]
    with torch.no_grad():  # every odd channel is cut off where it is read
        model.conv2.weight[:, 1::2] = model.fc2.weight[:, 1::2] = 0
        model.fc1.weight.view(11, 7, 6)[:, 1::2] = 0
        dense = model(batches[0])
    keep = {str(sites[0]): 0.5, str(sites[1]): 4 / 7, str(sites[2]): 6 / 11}
    grail.compress(model, batches, keep, sites, "wanda", compensate=False, progress=False)
    assert (model.conv2.out_channels, model.fc1.in_features) == (4, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)


class MapThenLinear(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.first, self.second, self.flatten = nn.Conv2d(1, 7, 3), nn.Linear(42, 3), flatten

    def forward(self, x):
        return self.second(self.flatten(self.first(x)))


MISLAID = {
    "channels last": (lambda x: x.permute(0, 2, 3, 1).flatten(1), "does not read the channels"),
    "softmax": (lambda x: x.flatten(1).softmax(1), "does not read the channels"),
    "turned round": (lambda x: x.flatten(1).flip(1), "does not read the channels"),
    "fixed": (lambda x: x.view(-1, 42), "does not run once it is narrow"),
}


@pytest.mark.parametrize(("flatten", "message"), MISLAID.values(), ids=MISLAID)
def test_a_flattened_map_of_another_layout_is_neither_found_nor_narrowed(flatten, message):
    model = lenet(flatten)
    assert all(site.consumers != ("fc1",) for site in grail.trace(model))
    before = copy.deepcopy(model.state_dict())
    site = grail.Site(["conv2"], ["fc1"])
    with pytest.raises(ModelError, match=message):
        grail.compress(model, LENET_BATCHES, 0.5, [site], progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("flatten", "reason"),
    [
        (lambda x: x.view(-1, 42), r"view \(call_method\), perhaps for its sizes"),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), "lost in permute"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(42)), "runs over a flattened map"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(42)), "LayerNorm"),
        (lambda x: x.flatten(1) + x.mean((2, 3)).repeat(1, 6), "repeat"),
        (lambda x: x.flatten(1) + x.mean((2, 3))[:, :1], "lost in getitem"),
    ],
    ids=["fixed", "channels last", "norm", "layer norm", "repeated", "broadcast"],
)
def test_why_a_flattened_map_is_not_followed_is_said(flatten, reason):
    with pytest.raises(ModelError, match=reason):
        grail.trace(MapThenLinear(flatten).eval())


def test_tracing_leaves_the_names_of_a_file_alone():
    before = dict(globals())
    grail.trace(lenet(FLATTENS["len"]))
    assert {name: before[name] for name in globals() if name in before} == before
    assert "len" not in globals()


class Positions(nn.Module):
    """Adds a layer of numbers that follow from a size to a map."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3)
        self.place = nn.Linear(1, 1)

    def forward(self, x):
        hidden = self.first(x).relu()
        places = torch.arange(hidden.size(2), dtype=torch.float32)[:, None]
        return self.second(hidden) + self.place(places).sum()


def test_what_is_computed_of_sizes_alone_is_no_obstacle():
    (site,) = grail.trace(Positions().eval())
    assert parts(site) == ({"first"}, set(), {"second"})
    batches = [torch.randn(4, 3, 9) for _ in range(3)]
    grail.compress(Positions().eval(), batches, 0.5, [site], progress=False)


class Upsampled(nn.Module):
    """Resizes a map to the size of another, as the decoder of a U-Net does."""

    def __init__(self):
        super().__init__()
        self.down, self.inner, self.up = (
            nn.Conv2d(3, 8, 3, 2),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 3, 1),
        )

    def forward(self, x):
        hidden = self.inner(self.down(x).relu())
        return self.up(nn.functional.interpolate(hidden, size=x.shape[2:], mode="bilinear"))


def test_a_map_may_be_resized_to_another_ones_size():
    found = [parts(site) for site in grail.trace(Upsampled().eval())]
    assert found == [({"down"}, set(), {"inner"}), ({"inner"}, set(), {"up"})]


class TwoHeads(nn.Module):
    """A map that a convolution, a pooled and a flattened head read."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3), nn.SyncBatchNorm(10)
        self.map, self.flat, self.pooled = nn.Conv2d(10, 4, 3), nn.Linear(160, 3), nn.Linear(10, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        flat = self.flat(x.reshape(len(x), -1))
        return self.map(x).mean((2, 3)), flat, self.pooled(x.mean((2, 3)))


def test_a_flattened_map_may_have_other_readers():
    torch.manual_seed(0)
    model, batches = TwoHeads().eval(), [torch.randn(40, 3, 6, 6) for _ in range(5)]
    (site,) = grail.trace(model, streams=True)
    assert parts(site) == ({"stem"}, {"norm"}, {"map", "flat", "pooled"})
    report = grail.compress(model, batches, 0.5, [site], progress=False)
    assert [row.error < 1 for row in report.sites] == [True] * 3
    assert (model.map.in_channels, model.flat.in_features, model.pooled.in_features) == (5, 80, 5)


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
