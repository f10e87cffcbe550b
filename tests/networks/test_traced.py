"""Sites found by following channels through a traced network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import grail
from bench.quality.networks import ResNet
from grail.errors import InputError, ModelError
from tests.networks.test_named import CONV, HIDDEN, Network, network
from tests.networks.test_parts import (
    Flattened,
    Halves,
    Joined,
    Scaled,
    Twice,
    flattened_sites,
    halves_sites,
    joined_sites,
    made,
    scaled_site,
    twice_site,
)


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
    """A map flattened position by position, a shared layer, a scale that is used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.c = (nn.Conv2d(3, 4, 1) for _ in range(2))
        self.shared = nn.Conv2d(4, 4, 1)
        self.scaled, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4 * 4, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        y = self.shared(self.shared(self.a(x)))
        y = self.scaled(y * self.scale + self.c(x) * self.scale)
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
        (
            lambda x: x.flatten(1) + x.mean((2, 3))[:, :1],
            "a slice whose size is written into the code",
        ),
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


CASES = {
    "concatenation": (Joined, joined_sites),
    "twice": (Twice, lambda: [twice_site()]),
    "rows": (Halves, halves_sites),
    "parameters": (Scaled, lambda: [scaled_site()]),
    "flattened": (Flattened, flattened_sites),
}


@pytest.mark.parametrize(("kind", "sites"), CASES.values(), ids=CASES)
def test_parts_of_layers_are_found(kind, sites):
    found = grail.trace(made(kind), streams=True)
    if kind is Scaled:  # a trace gives every bare parameter's axis
        gamma = grail.Part("gamma", axis=0)
        found = [replace(s, along=["gamma" if a == gamma else a for a in s.along]) for s in found]
    expected = [(set(s.producers), set(s.consumers), set(s.along)) for s in sites()]
    found = [(set(s.producers), set(s.consumers), set(s.along)) for s in found]
    assert [site for site in found if site != ({"inner"}, {"outer"}, set())] == expected


class Chunked(nn.Module):
    """Halves of a map, by several ways to say so; what follows reads one, or both multiplied."""

    def __init__(self, halves):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(4, 2, 1)
        self.halves = halves

    def forward(self, x):
        a, b = self.halves(self.norm(self.first(x)))
        return self.last(a * b.sigmoid())


HALVES = {
    "chunk": lambda x: x.chunk(2, 1),
    "function": lambda x: torch.chunk(x, chunks=2, dim=1),
    "split": lambda x: x.split(x.size(1) // 2, 1),
    "slices": lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
    "narrow": lambda x: (x.narrow(1, 0, x.size(1) // 2), x.narrow(1, x.size(1) // 2, 4)),
}


@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_halves_of_channels_stay_halves(halves):
    torch.manual_seed(0)
    model = Chunked(halves).eval()
    if halves is HALVES["narrow"]:  # its second size is written into the code
        with pytest.raises(ModelError, match="a slice whose size is written into the code"):
            grail.trace(model)
        return
    (site,) = grail.trace(model)
    both = ((0, 4), (4, 8))
    assert site == grail.Site([grail.Part("first", both)], ["last"], [grail.Part("norm", both)])
    batches = [torch.randn(8, 3, 5, 5) for _ in range(3)]
    with torch.no_grad():
        model.last.weight[:, 1::2] = 0
        dense = model(batches[0])
        grail.compress(model, batches, 0.5, [site], "wanda", compensate=False, progress=False)
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)
    assert model.first.out_channels == 4


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x.view(len(x), 2, 4, 5, 5).transpose(1, 2).reshape(x.shape),  # a shuffle
        lambda x: x[:, [0, 2, 4, 6, 1, 3, 5, 7]],
        lambda x: torch.cat([x[:, :6], x[:, 4:6]], 1),
        lambda x: x[:, ::2].repeat(1, 2, 1, 1),
        lambda x: torch.cat(x.split(3, 1), 1),
        lambda x: torch.cat([x, x.mean(1, keepdim=True)], 1)[:, :8],
    ],
    ids=["shuffle", "index", "fixed", "step", "split", "mean"],
)
def test_channels_that_change_places_are_not_followed(mixed):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(mixed(self.first(x)))

    model, batches = Mixed().eval(), [torch.randn(8, 3, 5, 5) for _ in range(3)]
    try:
        sites = grail.trace(model, streams=True)
    except ModelError:
        return
    before = model(batches[0])
    with pytest.raises(ModelError):  # only a run shows it, and leaves everything as it was
        grail.compress(model, batches, 0.5, sites, progress=False)
    assert torch.equal(model(batches[0]), before)


class Turned(nn.Module):
    """Moves its first channel behind the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x[:, 1:], x[:, :1]], 1))


def test_what_a_slice_of_fixed_size_leaves_can_be_narrowed():
    torch.manual_seed(0)
    model, batches = Turned().eval(), [torch.randn(8, 3, 5, 5) for _ in range(3)]
    (site,) = grail.trace(model)
    assert site == grail.Site([grail.Part("first", [(1, 8)])], [grail.Part("last", [(0, 7)])])
    with torch.no_grad():
        model.last.weight[:, :4] = 0
        dense = model(batches[0])
        grail.compress(model, batches, 3 / 7, [site], "wanda", compensate=False, progress=False)
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)
    assert (model.first.out_channels, model.last.in_channels) == (4, 4)


class Branches(nn.Module):
    """Its control flow depends on sizes and on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x, deep=False):
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1))
        a, b = self.a(x), self.b(x)
        if a.shape != b.shape or x.sum() > 1e9:
            b = nn.functional.interpolate(b, size=a.shape[-2:], mode="bilinear")
        for _ in range(x.size(1)):
            a = a.relu()
        return self.last(torch.cat([a, b], 1))


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_an_example_decides_the_control_flow(form):
    torch.manual_seed(0)
    model, batches = Branches().eval(), [torch.randn(6, 3, 9, 9) for _ in range(3)]
    with pytest.raises(ModelError, match="give a batch, example="):
        grail.trace(model)
    x = batches[0].clone()
    example = {"tensor": x, "tuple": (x, False), "mapping": {"x": x}}[form]
    sites = grail.trace(model, example=example)
    assert [str(site) for site in sites] == ["last[0:6]", "last[6:10]"]
    assert torch.equal(x, batches[0])
    report = grail.compress(model, batches, 0.5, sites, multiple=1, progress=False)
    assert all(row.error < row.baseline_error for row in report.sites)


def test_an_example_shows_whether_a_linear_layer_reads_vectors_or_tokens():
    model = Between(nn.Softmax(dim=1)).eval()
    (site,) = grail.trace(model, example=torch.randn(2, 5, 4))
    assert parts(site) == ({"first"}, set(), {"second"})
    with pytest.raises(ModelError, match="lost in between"):
        grail.trace(model, example=torch.randn(2, 4))


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (
            {"y": torch.ones(2, 3, 9, 9)},
            InputError,
            "example must be a batch.*missing a required",
        ),
        ((1, 2, 3), InputError, "example must be a batch.*too many positional"),
        (torch.ones(2, 5, 9, 9), ModelError, "cannot be traced.*expected input"),
    ],
    ids=["keyword", "many", "shape"],
)
def test_an_example_that_is_no_batch_is_refused(example, error, message):
    with pytest.raises(error, match=message):
        grail.trace(Branches().eval(), example=example)


def test_attention_does_not_hinder_a_trace():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    (site,) = grail.trace(layer, example=torch.randn(2, 5, 8))
    assert parts(site) == ({"linear1"}, set(), {"linear2"})


class Padded(nn.Module):
    """Prepends a token and adds positions; both are parameters without a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 6)) for n in (1, 6))
        self.scale = nn.Parameter(torch.randn(6, 1))
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x)], 1)
        return self.last((x + self.places) * self.scale.view(1, 1, -1) * self.gain)


def test_bare_parameters_run_along_the_axis_of_the_channels():
    torch.manual_seed(0)
    model, batches = Padded().eval(), [torch.randn(8, 5, 4) for _ in range(3)]
    (site,) = grail.trace(model)
    axes = {"token": 2, "places": 2, "scale": 0}
    assert set(site.along) == {grail.Part(name, axis=axis) for name, axis in axes.items()}
    with torch.no_grad():
        model.last.weight[:, 1::2] = 0
        dense = model(batches[0])
        grail.compress(model, batches, 0.5, [site], "wanda", compensate=False, progress=False)
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)
    assert (model.token.shape[2], model.scale.shape[0], model.gain.shape) == (3, 3, ())
