"""Sites that a grouped convolution reads: each group is a problem of its own."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail.algebra.kinds import as_matrix, as_stored
from grail.errors import InputError, ModelError
from tests.networks.test_named import inputs_of
from tests.networks.test_parts import images, made, parameters

GROUPS = 3


class Grouped(nn.Module):
    """A bottleneck whose middle convolution has groups, and one that is transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.middle = nn.Conv2d(12, 18, 3, stride=2, padding=1, groups=GROUPS)
        self.up = nn.ConvTranspose2d(18, 12, 2, groups=2)
        self.pointwise = nn.Conv2d(12, 8, 1, groups=4, bias=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.middle(self.norm(self.first(x)).relu()).relu()
        return self.last(self.pointwise(self.up(x).relu()).relu().mean((2, 3)))


def sites():
    return [
        grail.Site(["first"], ["middle"], ["norm"]),
        grail.Site(["middle"], ["up"]),
        grail.Site(["up"], ["pointwise"]),
        grail.Site(["pointwise"], ["last"]),
    ]


def test_sites_of_grouped_convolutions_are_found():
    found = grail.trace(made(Grouped))
    assert [(s.producers, s.consumers, s.along) for s in found] == [
        (s.producers, s.consumers, s.along) for s in sites()
    ]


KEEP = {"middle": 0.5, "up": 2 / 3, "pointwise": 1 / 3, "last": 0.5}


def silence(model):
    """Cuts off the channels that a group can spare: one of two, one of three, two of three."""
    silent = {"middle": lambda c: c % 2 == 1, "up": lambda c: c % 3 == 2}
    silent |= {"pointwise": lambda c: c % 3 > 0, "last": lambda c: c % 2 == 1}
    for name, is_silent in silent.items():
        module = model.get_submodule(name)
        matrix = as_matrix(module, module.weight.detach()).clone()
        matrix[:, [c for c in range(matrix.shape[1]) if is_silent(c)]] = 0
        module.weight.data = as_stored(module, matrix).contiguous()


def test_silent_channels_that_groups_read_go_without_a_trace():
    model = made(Grouped)
    silence(model)
    dense = copy.deepcopy(model)
    (share,) = grail.inspect(model, keeps=[KEEP], sites=sites(), multiple=1).savings
    grail.compress(
        model, images(), KEEP, sites(), "wanda", compensate=False, multiple=1, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images()[0]), dense(images()[0]), rtol=1e-4, atol=1e-4)
    shapes = {name: list(model.get_submodule(name).weight.shape) for name in KEEP}
    assert shapes == {
        "middle": [12, 2, 3, 3],
        "up": [12, 2, 2, 2],
        "pointwise": [4, 1, 1, 1],
        "last": [5, 4],
    }
    assert parameters(model) == share.parameters


@pytest.mark.parametrize("bias", [False, True], ids=["weights", "bias"])
@pytest.mark.parametrize("per_tap", [True, False], ids=["per tap", "alike"])
def test_each_group_is_the_ridge_solution_over_its_own_inputs(per_tap, bias):
    model, batches = made(Grouped), images()
    dense = copy.deepcopy(model)
    report = grail.compress(
        model,
        batches,
        0.5,
        sites()[0],
        "magnitude",
        alpha=1e-2,
        toward="zero",
        fit_bias=bias,
        per_tap=per_tap,
        progress=False,
    )
    x, old = inputs_of(dense, "middle", batches).double(), dense.middle.weight.detach().double()
    norms = dense.first.weight.detach().double().flatten(1).norm(dim=1).view(GROUPS, -1)
    kept = norms.topk(2).indices.sort(1).values
    squares = torch.zeros(2, dtype=torch.float64)
    for group, (own, weight) in enumerate(zip(x.split(4, 1), old.split(6), strict=True)):
        if per_tap:
            tokens = nn.functional.unfold(own, 3, padding=1, stride=2).transpose(1, 2)
            tokens = tokens.flatten(0, 1).unflatten(1, (4, 9))
            matrix = weight.flatten(2)
            target = tokens.flatten(1) @ matrix.flatten(1).T
            narrow = tokens[:, kept[group]].flatten(1)
        else:
            tokens = own.movedim(1, -1).flatten(0, 2)
            target = tokens @ weight.flatten(2).movedim(2, 1).flatten(0, 1).T
            narrow = tokens[:, kept[group]]
        means = (narrow.mean(0), target.mean(0)) if bias else (0, 0)
        a, b = narrow - means[0], target - means[1]
        gram = a.T @ a
        ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram))
        expected = torch.linalg.solve(gram + ridge, a.T @ b).T
        found = model.middle.weight.detach().double()[group * 6 :][:6].flatten(2)
        found = found.flatten(1) if per_tap else found.movedim(2, 1).flatten(0, 1)
        # An fp32 Gram (1e-6) through a system of condition ≤ 1/α.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        squares += torch.stack([(a @ expected.T - b).square().sum(), target.square().sum()])
        if bias and per_tap:
            shift = (model.middle.bias - dense.middle.bias).double()[group * 6 :][:6]
            lacking = target.mean(0) - expected @ narrow.mean(0)
            torch.testing.assert_close(shift, lacking, rtol=1e-3, atol=1e-4)
    (row,) = report.sites
    assert row.error == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-3)
    assert row.error < row.baseline_error


@pytest.mark.parametrize("selector", ["greedy", "wanda++", "flap"])
def test_a_fitted_grouped_network_is_nearer_to_the_dense_one_than_a_pruned_one(selector):
    dense, errors = made(Grouped), []
    for compensate in (False, True):
        model = copy.deepcopy(dense)
        report = grail.compress(
            model, images(24), KEEP, sites(), selector, compensate=compensate, progress=False
        )
        with torch.no_grad():
            errors.append(sum((model(x) - dense(x)).square().sum() for x in images(4)))
    assert errors[1] < 0.5 * errors[0]
    assert all(row.error < row.baseline_error for row in report.sites)


def test_collected_sums_of_a_grouped_convolution_serve(tmp_path):
    networks, kept = [made(Grouped), made(Grouped)], {"drift_correction": 0, "closed_loop": False}
    folder = grail.collect(networks[0], images(), sites(), output=tmp_path / "sums", progress=False)
    for model, batches in zip(networks, (images(), grail.Collected(folder)), strict=True):
        grail.compress(model, batches, KEEP, sites(), progress=False, **kept)
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, other)


def test_a_narrow_grouped_network_is_saved_and_loaded(tmp_path):
    model = made(Grouped)
    report = grail.compress(model, images(), KEEP, sites(), progress=False)
    grail.save(model, tmp_path / "out", report)
    loaded = grail.load(tmp_path / "out", Grouped)
    with torch.no_grad():
        assert torch.equal(loaded(images()[0]), model(images()[0]))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"selector": "folding"},
            InputError,
            "folding averages single channels, not .* the channels of groups",
        ),
        (
            {"selector": lambda view: grail.Selection(range(6), 12)},
            InputError,
            "equally many channels must stay in each group",
        ),
        (
            {"sites": grail.Site(["first"], [grail.Part("middle", [(0, 4)])])},
            ModelError,
            "middle reads its channels in 3 groups; a site must have all of them",
        ),
        (
            {"sites": grail.Site([grail.Part("middle", [(0, 6)])], ["up"])},
            ModelError,
            "middle writes its channels in 3 groups; a site can have all of them",
        ),
    ],
    ids=["folded", "uneven", "columns", "rows"],
)
def test_what_groups_do_not_allow_is_refused(settings, error, message):
    model = made(Grouped)
    before = copy.deepcopy(model.state_dict())
    settings = {"sites": sites()[:1], "keep": 0.5, "progress": False, **settings}
    with pytest.raises(error, match=message):
        grail.compress(model, images(), **settings)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
