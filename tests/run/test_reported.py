"""Reported errors are those of the real network, over every family and kind of site."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grail
from grail.errors import ModelError
from tests.convnets import NETWORKS, SPREADS, images, linearly_gated
from tests.convnets import network as convnet
from tests.networks.test_families import CASES, network  # noqa: F401, a fixture
from tests.reported import (
    assert_alike,
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
    consumer_outputs,
)

every_case = pytest.mark.parametrize(("family", "kind"), CASES, ids=[f"{f} {k}" for f, k in CASES])
PAPER = {"alpha": 1e-3, "toward": "zero", "selector": "wanda"}


@every_case
def test_the_error_of_a_site_narrowed_alone_is_the_networks(family, kind, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_are_those_of_the_network(model, batches[:12], (kind,))


@pytest.mark.parametrize(
    ("family", "kind"),
    [case for case in CASES if "experts" not in case[1]],
    ids=[f"{f} {k}" for f, k in CASES if "experts" not in k],
)
def test_the_errors_of_a_run_are_the_networks(family, kind, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_of_a_run_are_those_of_the_network(model, batches[:12], (kind,))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_errors_of_convolutional_networks_are_the_networks(name):
    assert_errors_are_those_of_the_network(convnet(name), images())


@pytest.mark.parametrize("wide", [11, 7])
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_the_errors_of_gates_of_linear_layers_are_the_networks(spread, wide):
    assert_errors_are_those_of_the_network(linearly_gated(spread, wide), images(), multiple=1)


@pytest.mark.parametrize(
    "settings", [{"selector": "folding"}, {"fit_bias": True}, {"compensate": False}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "opt", "bert", "vit"])
def test_errors_hold_for_every_way_of_compensating(family, settings, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_are_those_of_the_network(model, batches[:12], ("mlp",), **settings)


# Sequences, tokens of each, and width of a head: distinct primes, and all alike.
SIZES = [(5, 7, 3), (7, 5, 2), (4, 4, 4), (1, 7, 3), (6, 1, 2)]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


def randomised(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.5 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval()


class Encoder(nn.Module):
    """torch's own encoder, with a padding mask made of an attention mask."""

    def __init__(self, width: int, batch_first: bool, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 2, 24, batch_first=batch_first, norm_first=norm_first
        )
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(width, 5)

    def forward(self, x, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        if self.batch_first:
            return self.head(self.encoder(x, src_key_padding_mask=padding))
        y = self.encoder(x.transpose(0, 1), src_key_padding_mask=padding)
        return self.head(y.transpose(0, 1))


@every_size
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_torchs_own_encoder(norm_first, batch_first, masked, sizes):
    rows, length, head = sizes
    model = randomised(Encoder(2 * head, batch_first, norm_first))
    batches = []
    for number in range(6):
        batch = {
            "x": torch.randn(
                rows, length, 2 * head, generator=torch.Generator().manual_seed(number)
            )
        }
        if masked:
            batch["attention_mask"] = torch.ones(rows, length)
            batch["attention_mask"][: rows // 2, 1 + length // 2 :] = 0
        batches.append(batch)
    names = [f"encoder.layers.{number}.linear" for number in range(2)]
    sites = [grail.Site([f"{name}1"], [f"{name}2"]) for name in names]
    masks = None
    if masked and not batch_first:
        masks = {f"{name}2": [b["attention_mask"].T for b in batches] for name in names}
    for compensate in (True, False):  # plain pruning has errors that no rounding hides
        assert_errors_are_those_of_the_network(model, batches, sites, masks, compensate=compensate)


class Branches(nn.Module):
    """One hidden activation that three layers read, the last behind a function of it."""

    def __init__(self, function):
        super().__init__()
        self.up, self.function = nn.Linear(6, 22), function
        self.first, self.second, self.third = (nn.Linear(22, 4) for _ in range(3))

    def forward(self, x):
        h = self.up(x).relu()
        return self.first(h), self.second(2 * h), self.third(self.function(h))


BY_CHANNEL = {
    "itself": lambda h: h,
    "tanh": torch.tanh,
    "shifted": lambda h: h + 1,
    "negated": torch.neg,
}
MIXING = {
    "l2 norm": lambda h: F.normalize(h, dim=-1),
    "softmax": lambda h: h.softmax(-1),
    "layer norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "rms": lambda h: h / h.square().mean(-1, keepdim=True).add(1e-6).sqrt(),
    "mean added": lambda h: h + h.mean(-1, keepdim=True),
    "roll": lambda h: h.roll(1, -1),
    "flip": lambda h: h.flip(-1),
    "cumsum": lambda h: h.cumsum(-1),
    "halves swapped": lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
}


def branched(function) -> tuple[nn.Module, list[torch.Tensor], list[grail.Site]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(13, 6, generator=generator) for _ in range(6)]
    site = grail.Site(["up"], ["first", "second", "third"])
    return randomised(Branches(function)), batches, [site]


@pytest.mark.parametrize("function", BY_CHANNEL.values(), ids=BY_CHANNEL)
def test_every_consumer_of_a_site_has_its_own_error(function):
    assert_errors_are_those_of_the_network(*branched(function))


def test_mixing_that_only_the_last_batch_shows_is_refused():
    clamped = lambda h: h / (h.norm(dim=-1, keepdim=True) / 9).clamp_min(1)  # noqa: E731
    model, batches, sites = branched(clamped)
    batches = [batch * (1e-3 if number < 5 else 9) for number, batch in enumerate(batches)]
    with pytest.raises(ModelError, match="third does not read the channels that were kept"):
        grail.compress(model, batches, 0.5, sites, progress=False)


def test_what_follows_a_consumer_may_write_over_its_output():
    dense, batches = chain(7, 22, 9, 5)
    dense[3] = nn.ReLU(inplace=True)
    assert_errors_are_those_of_the_network(dense, batches, [grail.Site(["0"], ["2"])])


@pytest.mark.parametrize("change", ["forward", "hook"])
def test_a_consumer_that_returns_something_else_is_refused(change):
    model, batches = chain(7, 22, 5)
    if change == "forward":
        model[2].forward = lambda x: F.linear(x.square(), model[2].weight, model[2].bias)
    else:
        model[2].register_forward_hook(lambda _, __, output: 3 * output)
    with pytest.raises(ModelError, match=r"forward was replaced|something else than its weight"):
        grail.compress(model, batches, 0.5, [grail.Site(["0"], ["2"])], progress=False)


@pytest.mark.parametrize(
    ("keep", "settings"),
    [(0.5, {}), (0.95, {}), (0.5, {"closed_loop": False}), (0.5, {"selector": "folding"})],
    ids=str,
)
@pytest.mark.parametrize("function", MIXING.values(), ids=MIXING)
def test_a_last_consumer_that_reads_mixed_channels_is_refused(function, keep, settings):
    model, batches, sites = branched(function)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="third does not read the channels that were kept"):
        grail.compress(model, batches, keep, sites, progress=False, **settings)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


class Residual(nn.Module):
    """A residual stream that three layers write and three read, one behind the other."""

    def __init__(self, mixes: bool = False):
        super().__init__()
        self.mixes = mixes
        self.embed, self.head = nn.Linear(6, 22), nn.Linear(22, 4)
        self.ups = nn.ModuleList(nn.Linear(22, 9) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(9, 22) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return self.head(F.normalize(x, dim=-1) if self.mixes else x)


def chain(*sizes: int) -> tuple[nn.Module, list[torch.Tensor]]:
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain(*((layer, nn.GELU()) for layer in layers)))
    generator = torch.Generator().manual_seed(0)
    return randomised(model), [torch.randn(31, sizes[0], generator=generator) for _ in range(6)]


@pytest.mark.parametrize("keep", [{"b": 0.5, "c": 1.0}, {"b": 0.5, "c": 0.5}], ids=str)
def test_a_folding_before_another_site_is_fitted_to_what_it_writes(keep):
    dense, batches = chain(7, 22, 18, 5)
    model = copy.deepcopy(dense)
    sites = [grail.Site(["0"], ["2"], name="b"), grail.Site(["2"], ["4"], name="c")]
    report = grail.compress(
        model, batches, keep, sites, "folding", drift_correction=0, progress=False
    )
    row = report.sites[0]
    if keep["c"] < 1:
        assert row.error is not None  # its consumer has lost rows since
        return
    expected, got = (consumer_outputs(m, "2", batches) for m in (dense, model))
    target = expected - dense[2].bias.detach().double()
    assert_alike(
        grail.networks.find(dense, sites).sites(("named",))[0][0],
        "b",
        row.error,
        (expected - got).norm() / target.norm(),
    )


INEXACT = {
    "several consumers": (branched, {}),
    "open loop": (lambda _: (*chain(7, 22, 5), [grail.Site(["0"], ["2"])]), {"closed_loop": False}),
    "plain": (lambda _: (*chain(7, 22, 5), [grail.Site(["0"], ["2"])]), {"compensate": False}),
    "the paper's": (
        lambda _: (*chain(7, 22, 5), [grail.Site(["0"], ["2"])]),
        {"exact_folding": False},
    ),
}


@pytest.mark.parametrize(("make", "settings"), INEXACT.values(), ids=INEXACT)
def test_a_folding_that_is_not_fitted_to_what_it_writes_reports_no_error(make, settings):
    model, batches, sites = make(torch.tanh)
    report = grail.compress(model, batches, 0.5, sites, "folding", progress=False, **settings)
    assert {(row.error, row.baseline_error) for row in report.sites} == {(None, None)}
    assert sum("its error is not measured" in note for note in report.notes) == len(report.sites)


STREAM = grail.Site(["embed", "downs.0", "downs.1"], ["ups.0", "ups.1", "head"], name="stream")


def test_a_residual_stream_is_no_mixing_whatever_its_compensation_changes():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(13, 6, generator=generator) for _ in range(6)]
    report = grail.compress(randomised(Residual()), batches, 0.5, [STREAM], progress=False)
    assert [row.kept for row in report.sites] == [11] * 3
    first, *others = report.sites
    assert first.error is not None  # no other consumer has a say in what it reads
    assert [row.error for row in others] == [None, None]
    assert any("ups.1: its error is not measured: it reads what other" in n for n in report.notes)
    with pytest.raises(ModelError, match="head does not read the channels that were kept"):
        grail.compress(randomised(Residual(mixes=True)), batches, 0.5, [STREAM], progress=False)
