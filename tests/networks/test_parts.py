"""Sites that have parts of layers: concatenations, rows of one producer, bare parameters."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail import networks
from grail.errors import InputError, ModelError
from tests.networks.test_named import inputs_of


class Joined(nn.Module):
    """A convolution that reads a concatenation, normalised as a whole, of three maps."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.grow = nn.BatchNorm2d(14), nn.Conv2d(14, 4, 3, padding=1)
        self.last, self.head = nn.Conv2d(18, 10, 1), nn.Linear(10 * 6 * 6, 5)

    def forward(self, x):
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        x = torch.cat([x, self.grow(x).relu()], 1)
        return self.head(self.last(x).relu().flatten(1))


def joined_sites():
    """The sites of a `Joined`; the second has its name by hand."""
    part = grail.Part
    return [
        grail.Site(
            ["a"], [part("grow", [(0, 6)]), part("last", [(0, 6)])], [part("norm", [(0, 6)])]
        ),
        grail.Site(
            ["b"],
            [part("grow", [(6, 14)]), part("last", [(6, 14)])],
            [part("norm", [(6, 14)])],
            name="second",
        ),
        grail.Site(["grow"], [part("last", [(14, 18)])]),
        grail.Site(["last"], ["head"]),
    ]


class Twice(nn.Module):
    """GhostNet's module: half of the channels are made of the others, one by one."""

    def __init__(self):
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.short, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, x):
        y = self.primary(x).relu()
        y = torch.cat([y, self.cheap(y).relu()], 1) + self.norm(self.short(x))
        return self.last(y.relu())


def twice_site():
    both = [(0, 8), (8, 16)]
    return grail.Site(
        ["primary", grail.Part("short", both)],
        [grail.Part("last", both)],
        ["cheap", grail.Part("norm", both)],
    )


class Halves(nn.Module):
    """A layer whose last eight rows one layer reads, and whose other rows another one reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 14)
        self.left, self.right = nn.Linear(6, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.left(x[..., :-8]) + self.right(x[..., -8:])


def halves_sites():
    return [grail.Site([grail.Part("first", [(0, 6)])], ["left"])]


class Scaled(nn.Module):
    """A stream with a layer scale, a buffer of positions and an affine that is no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 9), nn.Linear(9, 8)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("position", torch.randn(1, 8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x) + self.position
        return self.last(x + self.gamma * self.outer(self.inner(x).relu()))


def scaled_site():
    position = grail.Part("position", axis=2)
    return grail.Site(["first", "outer"], ["inner", "last"], ["gamma", position], name="stream")


class Flattened(nn.Module):
    """A linear layer that reads a flattened concatenation of maps."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Linear(160, 7)

    def forward(self, x):
        return self.last(torch.cat([self.a(x), self.b(x)], 1).relu().flatten(1))


def flattened_sites():
    return [
        grail.Site(["a"], [grail.Part("last", [(0, 64)])]),
        grail.Site(["b"], [grail.Part("last", [(64, 160)])]),
    ]


def images(count=6, rows=12, size=6):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, size, size, generator=draw) for _ in range(count)]


def tokens(count=6, length=8):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(12, length, 5, generator=draw) for _ in range(count)]


CASES = {
    "concatenation": (Joined, joined_sites, images),
    "twice": (Twice, lambda: [twice_site()], images),
    "rows": (Halves, halves_sites, tokens),
    "parameters": (Scaled, lambda: [scaled_site()], tokens),
    "flattened": (Flattened, flattened_sites, images),
}
every_case = pytest.mark.parametrize(("kind", "sites", "batches"), CASES.values(), ids=CASES)


def made(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


def bound(model, sites):
    return networks.find(model, sites).sites(("named",))[0]


def silence(model, sites):
    """Cuts every odd channel of every site off where it is read."""
    with torch.no_grad():
        for site, own in zip(sites, bound(model, sites), strict=True):
            for layer in site.consumers:
                weight = model.get_submodule(str(layer)).weight
                for start, stop in getattr(layer, "ranges", [(0, weight.shape[1])]):
                    weight[:, start:stop].unflatten(1, (own.channels, -1))[:, 1::2] = 0


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@every_case
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_silent_channels_of_parts_go_without_a_trace(kind, sites, batches, order):
    model, sites = made(kind), sites()[::order]
    silence(model, sites)
    dense = copy.deepcopy(model)
    (half,) = grail.inspect(model, keeps=[0.5], sites=sites, multiple=1).savings
    grail.compress(
        model, batches(), 0.5, sites, "wanda", compensate=False, multiple=1, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(batches()[0]), dense(batches()[0]), rtol=1e-4, atol=1e-4)
    assert parameters(model) == half.parameters < 0.85 * parameters(dense)


@every_case
@pytest.mark.parametrize("selector", ["greedy", "folding"])
@pytest.mark.parametrize("per_tap", [True, False], ids=["per tap", "alike"])
def test_a_fitted_network_is_nearer_to_the_dense_one_than_a_pruned_one(
    kind, sites, batches, selector, per_tap
):
    dense, errors = made(kind), []
    for compensate in (False, True):
        model = copy.deepcopy(dense)
        report = grail.compress(
            model,
            batches(24),
            0.5,
            sites(),
            selector,
            compensate=compensate,
            per_tap=per_tap,
            multiple=1,
            progress=False,
        )
        with torch.no_grad():
            errors.append(sum((model(x) - dense(x)).square().sum() for x in batches(4)))
    assert errors[1] < (0.7 if (selector, per_tap) == ("greedy", True) else 1) * errors[0]
    assert all(not row.error or row.error < row.baseline_error for row in report.sites)


@pytest.mark.parametrize("per_tap", [True, False], ids=["per tap", "alike"])
@pytest.mark.parametrize("name", ["slice", "twice", "flattened"])
def test_the_columns_of_a_part_are_the_ridge_solution_over_what_they_read(name, per_tap):
    kind, site, layer, ranges, channels = {
        "slice": (Joined, joined_sites()[1], "grow", [(6, 14)], 8),
        "twice": (Twice, twice_site(), "last", [(0, 8), (8, 16)], 8),
        "flattened": (Flattened, flattened_sites()[1], "last", [(64, 160)], 6),
    }[name]
    if name == "slice":  # of its consumers one
        site = grail.Site(["b"], site.consumers, site.along)
    model, batches = made(kind), images()
    dense = copy.deepcopy(model)
    settings = {"toward": "zero", "drift_correction": 0, "multiple": 1, "per_tap": per_tap}
    report = grail.compress(
        model, batches, 0.5, [site], "magnitude", alpha=1e-2, progress=False, **settings
    )
    x = inputs_of(dense, layer, batches).double()
    weight = dense.get_submodule(layer).weight.detach().double()
    producers = [dense.get_submodule(str(p)).weight.detach().double() for p in site.producers]
    rows = [p for w in producers for p in w.flatten(1).split(channels)]
    kept = torch.cat(rows, 1).norm(dim=1).topk(channels // 2).indices.sort().values
    if name == "flattened":  # [N, columns] → [N, channels, positions]
        pieces = [x[:, a:b].unflatten(1, (channels, -1)) for a, b in ranges]
        old = torch.cat([weight[:, a:b].unflatten(1, (channels, -1)) for a, b in ranges], 2)
        taps = torch.cat(pieces, 2)[:, None]  # [N, 1, channels, taps]
    else:
        padding, size = dense.get_submodule(layer).padding, weight.shape[2:]
        pieces = [nn.functional.unfold(x[:, a:b], size, padding=padding) for a, b in ranges]
        pieces = [p.unflatten(1, (channels, -1)).movedim(-1, 1) for p in pieces]
        taps = torch.cat(pieces, 3)  # [N, L, channels, taps]
        old = torch.cat([weight[:, a:b].flatten(2) for a, b in ranges], 2)
    if per_tap:
        of = taps.flatten(2).flatten(0, 1)
        target = of @ old.flatten(1).T
        own = taps[:, :, kept].flatten(2).flatten(0, 1)
    else:  # each pixel once, whatever taps read it
        plain = [x[:, a:b] for a, b in ranges]
        if name == "flattened":
            plain = [p.unflatten(1, (channels, -1)) for p in plain]
        of = torch.cat([p.flatten(2).movedim(1, -1).flatten(0, 1) for p in plain])
        target = of @ old.movedim(2, 1).flatten(0, 1).T
        own = of[:, kept]
    gram = own.T @ own
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram))
    expected = torch.linalg.solve(gram + ridge, own.T @ target).T
    new = model.get_submodule(layer).weight.detach().double()
    before = len(new[0].flatten())
    assert before < len(weight[0].flatten())
    lost, start = 0, []
    for a, b in ranges:
        start.append(a - lost)
        lost += (b - a) // 2
    size = (ranges[0][1] - ranges[0][0]) // 2
    parts = [new[:, s : s + size].reshape(len(new), channels // 2, -1) for s in start]
    found = torch.cat(parts, 2)
    found = found.flatten(1) if per_tap else found.movedim(2, 1).flatten(0, 1)
    # An fp32 Gram (1e-6) through a system of condition ≤ 1/α.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    rest = [i for i in range(weight.shape[1]) if not any(a <= i < b for a, b in ranges)]
    kept_rest = [i for i in range(new.shape[1]) if not any(s <= i < s + size for s in start)]
    assert torch.equal(new[:, kept_rest].float(), weight[:, rest].float())  # bit for bit
    relative = (own @ expected.T - target).norm() / target.norm()
    row = next(row for row in report.sites if layer in (row.name, row.name.split(" ")[-1], layer))
    assert row.error == pytest.approx(relative.item(), rel=1e-3)


def test_a_later_part_undoes_the_drift_of_an_earlier_one():
    sites = flattened_sites()
    errors = {}
    for correction in (0.0, 1.0):
        model = made(Flattened)
        dense, batches = copy.deepcopy(model), images(40)
        settings = {"alpha": 1e-5, "drift_correction": correction, "multiple": 1}
        grail.compress(model, batches, 0.5, sites, progress=False, **settings)
        with torch.no_grad():
            errors[correction] = sum((model(x) - dense(x)).square().sum() for x in batches)
    assert errors[1.0] < 0.95 * errors[0.0]


@every_case
def test_a_narrow_network_with_parts_is_saved_and_loaded(kind, sites, batches, tmp_path):
    model = made(kind)
    report = grail.compress(model, batches(), 0.5, sites(), multiple=1, progress=False)
    grail.save(model, tmp_path / "out", report)
    loaded = grail.load(tmp_path / "out", kind)
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]), model(batches()[0]))
    assert grail.Recipe.load(tmp_path / "out/recipe.json").sites == tuple(sites())


@every_case
def test_an_error_leaves_a_network_with_parts_as_it_was(kind, sites, batches):
    model, calls = made(kind), []
    before = copy.deepcopy(model.state_dict())

    def failing(view):
        calls.append(view)
        if len(calls) == len(sites()):
            raise RuntimeError("it fails at the last site")
        return view.width.best(torch.arange(view.width.channels, dtype=torch.float32))

    with pytest.raises(RuntimeError, match="last site"):
        grail.compress(model, batches(), 0.5, sites(), failing, multiple=1, progress=False)
    assert len(calls) == len(sites())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    grail.compress(model, batches(), 0.5, sites(), multiple=1, progress=False)


class Joins(nn.Module):
    """A linear layer that reads tokens of two layers, [B, L, H] or [L, B, H]."""

    def __init__(self, turns):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(5, 8), nn.Linear(14, 3)
        self.turns = turns

    def forward(self, x):
        x = x.transpose(0, 1) if self.turns else x
        x = self.last(torch.cat([self.a(x), self.b(x).tanh()], -1).relu())
        return x.transpose(0, 1) if self.turns else x


def test_samples_of_a_part_may_lie_along_any_axis():
    parts = [grail.Part("last", [(0, 6)]), grail.Part("last", [(6, 14)])]
    sites = [grail.Site([name], [part]) for name, part in zip("ab", parts, strict=True)]
    networks = []
    for turns in (False, True):
        torch.manual_seed(0)
        networks.append(Joins(turns).eval())
        grail.compress(networks[-1], tokens(), 0.5, sites, multiple=1, progress=False)
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (lambda: grail.Site(["a"], ["grow"]), "disagree on the number of channels: a 6, grow 14"),
        (
            lambda: grail.Site(
                ["b"],
                [grail.Part("grow", [(5, 13)]), grail.Part("last", [(6, 14)])],
                [grail.Part("norm", [(6, 14)])],
            ),
            "once narrow, grow does not read the channels",
        ),
        (lambda: grail.Site(["a"], [grail.Part("grow", [(0, 6)])]), "does not run once it is nar"),
        (lambda: grail.Site(["a"], [grail.Part("grow", [(9, 15)])]), "its parts 9 to 15 must lie"),
        (
            lambda: grail.Site(
                ["a"], [grail.Part("last", [(0, 6)])], [grail.Part("norm", [(0, 7)])]
            ),
            "norm has 7 channels, where its site has 6",
        ),
    ],
    ids=["whole", "offset", "missing", "outside", "along"],
)
def test_parts_that_cannot_be_are_refused_with_the_reason(site, message):
    model = made(Joined)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((InputError, ModelError), match=message):
        grail.compress(model, images(), 0.5, [site()], multiple=1, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sites_may_not_share_a_range():
    sites = [*joined_sites()[:1], grail.Site(["b"], [grail.Part("grow", [(5, 13)])])]
    with pytest.raises(InputError, match="two sites are read by 'grow'; it can belong to one, or"):
        grail.compress(made(Joined), images(), 0.5, sites, multiple=1, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grail.Part("a"), "needs ranges, or the axis"),
        (lambda: grail.Part(3, [(0, 1)]), "name must be the name of a layer; got int"),
        (lambda: grail.Part("a", [(0, 2), (1, 3)]), "must be ascending and not empty"),
        (lambda: grail.Part("a", [(2, 2)]), "must be ascending and not empty"),
        (lambda: grail.Part("a", [(0, 2), (2, 5)]), "must be of one length"),
        (lambda: grail.Part("a", [(-1, 2)]), r"integers from 0; got \(-1, 2\)"),
        (lambda: grail.Part("a", [3]), "integers from 0; got 3"),
        (lambda: grail.Part("a", 3), "ranges must be a list of"),
        (lambda: grail.Part("a", axis="1"), "axis must be an integer"),
        (lambda: grail.Site(grail.Part("a", [(0, 1)]), ["b"]), "must be a list of names"),
    ],
)
def test_parts_in_a_wrong_form_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("along", "error", "message"),
    [
        ("position", ModelError, r"position is \[1, 8, 8\].*give their axis"),
        (grail.Part("position", axis=3), ModelError, "it has no axis 3"),
        (grail.Part("last", axis=0), InputError, "last is no bare parameter"),
        ("beta", InputError, "no layer named 'beta'"),
        (grail.Part("position", axis=0), ModelError, "position has 1 channels, where its site has"),
    ],
    ids=["ambiguous", "axis", "layer", "unknown", "size"],
)
def test_bare_parameters_that_cannot_be_are_refused(along, error, message):
    site = grail.Site(["first", "outer"], ["inner", "last"], ["gamma", along])
    with pytest.raises(error, match=message):
        grail.compress(made(Scaled), tokens(), 0.5, [site], progress=False)


def test_a_bare_parameter_that_is_not_named_is_missed():
    site = grail.Site(["first", "outer"], ["inner", "last"], [grail.Part("position", axis=-1)])
    with pytest.raises(ModelError, match="does not run once it is narrow"):
        grail.compress(made(Scaled), tokens(), 0.5, [site], progress=False)


@every_case
def test_parts_are_measured_and_collected_as_whole_layers_are(kind, sites, batches, tmp_path):
    model = made(kind)
    before = copy.deepcopy(model.state_dict())
    measured = grail.sensitivity(model, batches(), sites=sites(), keep=0.5, progress=False)
    assert set(measured.losses) == {str(site) for site in sites()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    loop = {"closed_loop": False, "drift_correction": 0, "multiple": 1, "progress": False}
    folder = grail.collect(model, batches(), sites(), output=tmp_path / "a", progress=False)
    other = copy.deepcopy(model)
    grail.compress(model, batches(), 0.5, sites(), **loop)
    grail.compress(other, grail.Collected(folder), 0.5, sites(), **loop)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@every_case
def test_a_run_with_parts_is_resumed(kind, sites, batches, tmp_path):
    networks, settings = [made(kind) for _ in range(3)], {"multiple": 1, "progress": False}
    folders = (tmp_path / "state", tmp_path / "state", None)
    reports = [
        grail.compress(model, batches(), 0.5, sites(), resume_dir=folder, **settings)
        for model, folder in zip(networks, folders, strict=True)
    ]
    assert reports[1].resumed
    assert reports[0].model == reports[1].model == reports[2].model
    for other in networks[1:]:
        assert all(map(torch.equal, networks[0].parameters(), other.parameters()))
