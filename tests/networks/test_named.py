"""Networks of any kind: sites that a person names, saved and loaded again."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import grail
from grail.errors import ExportError, InputError, ModelError


class Network(nn.Module):
    """Two convolutions with a residual connection, and a classifier of two layers."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv2 = nn.Conv2d(width, 8, 3, stride=2, padding=1)
        self.down = nn.Conv2d(8, 8, 1, stride=2)
        self.hidden = nn.Linear(8, 20)
        self.act = nn.PReLU(20)
        self.out = nn.Linear(20, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.depthwise(self.bn1(self.conv1(x)).relu())
        x = (self.conv2(y) + self.down(x)).relu()
        return self.out(self.act(self.hidden(x.mean((2, 3)))))


CONV = grail.Site(producers=["conv1"], along=["bn1", "depthwise"], consumers=["conv2"])
HIDDEN = grail.Site(producers=["hidden"], along=["act"], consumers=["out"])
STREAM = grail.Site(producers=["conv2", "down"], consumers=["hidden"], name="stream")


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network().eval()
        model.bn1.running_mean.normal_()
        model.bn1.running_var.uniform_(0.5, 2)
        nn.init.uniform_(model.act.weight, 0.1, 0.5)
    return model


def images(count: int = 6, rows: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, 10, 10, generator=generator) for _ in range(count)]


def inputs_of(model: nn.Module, name: str, batches: list[torch.Tensor]) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("site", [CONV, HIDDEN, STREAM], ids=str)
def test_silent_channels_of_a_named_site_go_without_a_trace(site):
    model, batches = network(), images()
    with torch.no_grad():
        for name in site.consumers:
            model.get_submodule(name).weight[:, 1::2] = 0
        dense = model(batches[0])
    grail.compress(
        model, batches, 0.5, [site], "wanda", compensate=False, multiple=1, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)
    halves = {str(CONV): 6, str(HIDDEN): 10, str(STREAM): 4}
    assert len(model.get_submodule(site.producers[0]).weight) == halves[str(site)]


@pytest.mark.parametrize("per_tap", [True, False])
def test_a_named_convolution_is_the_ridge_solution_over_its_inputs(per_tap):
    model, batches = network(), images()
    dense = copy.deepcopy(model)
    report = grail.compress(
        model,
        batches,
        0.5,
        [CONV],
        "magnitude",
        alpha=1e-2,
        toward="zero",
        drift_correction=0,
        multiple=1,
        per_tap=per_tap,
        progress=False,
    )
    x, weight = inputs_of(dense, "conv2", batches).double(), dense.conv2.weight.detach().double()
    norms = dense.conv1.weight.detach().double().flatten(1).norm(dim=1)
    kept = norms.topk(6).indices.sort().values
    if per_tap:
        tokens = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        kept_columns = (kept[:, None] * 9 + torch.arange(9)).flatten()
        matrix = weight.flatten(1)
    else:
        tokens, kept_columns = x.movedim(1, -1).flatten(0, 2), kept
        matrix = weight.movedim(1, -1).flatten(0, 2)
    gram = tokens.T @ tokens
    a = gram[kept_columns][:, kept_columns]
    ridge = 1e-2 * a.diagonal().mean() * torch.eye(len(a))
    expected = torch.linalg.solve(a + ridge, (matrix @ gram[:, kept_columns]).T).T
    found = model.conv2.weight.detach().double()
    found = found.flatten(1) if per_tap else found.movedim(1, -1).flatten(0, 2)
    # An fp32 Gram (1e-6) through a system of condition ≤ 1/α.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    rebuilt = tokens[:, kept_columns] @ expected.T - tokens @ matrix.T
    relative = (rebuilt.norm() / (tokens @ matrix.T).norm()).item()
    assert report.sites[0].error == pytest.approx(relative, rel=1e-3)


def test_several_consumers_are_each_fitted_to_what_they_read():
    model, batches = network(), images()
    site = grail.Site(producers=["stem"], consumers=["conv1", "down"], name="stream")
    report = grail.compress(model, batches, 0.75, [site], alpha=1e-4, progress=False, multiple=1)
    assert [row.name for row in report.sites] == ["stream → conv1", "stream → down"]
    assert all(row.error < row.baseline_error for row in report.sites)
    assert model.conv1.weight.shape == (12, 6, 3, 3)
    assert model.down.weight.shape == (8, 6, 1, 1)


def test_later_sites_undo_the_drift_of_earlier_ones():
    batches = images(count=20)
    errors = {}
    for correction in (0.0, 1.0):
        model = network()
        dense = copy.deepcopy(model)
        grail.compress(
            model,
            batches,
            0.5,
            [CONV, STREAM],
            alpha=1e-5,
            drift_correction=correction,
            multiple=1,
            progress=False,
        )
        with torch.no_grad():
            differences = torch.cat([model(batch) - dense(batch) for batch in batches])
        errors[correction] = differences.norm().item()
    assert errors[1.0] < 0.99 * errors[0.0]


def test_a_consumer_may_be_called_by_keyword():
    class ByKeyword(Network):
        def forward(self, x):
            x = self.stem(x).relu().mean((2, 3))
            return self.out(input=self.act(self.hidden(x)))

    class ByPosition(Network):
        def forward(self, x):
            return self.out(self.act(self.hidden(self.stem(x).relu().mean((2, 3)))))

    weights = []
    for kind in (ByKeyword, ByPosition):
        torch.manual_seed(0)
        model = kind().eval()
        grail.compress(model, images(), 0.5, [HIDDEN], progress=False, multiple=1)
        weights.append(model.out.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("batch", ["tensor", "tuple", "mapping"])
def test_a_batch_is_a_tensor_a_tuple_or_keyword_arguments(batch):
    forms = {"tensor": lambda x: x, "tuple": lambda x: (x,), "mapping": lambda x: {"x": x}}
    models = [network(), network()]
    for model, form in zip(models, (forms["tensor"], forms[batch]), strict=True):
        grail.compress(model, list(map(form, images())), 0.5, [HIDDEN], progress=False, multiple=1)
    assert torch.equal(models[0].out.weight, models[1].out.weight)


def test_a_saved_network_loads_to_the_same_outputs(tmp_path):
    model, batches = network(), images()
    report = grail.compress(model, batches, 0.5, [CONV, HIDDEN], progress=False, multiple=1)
    grail.save(model, tmp_path / "out", report)
    loaded = grail.load(tmp_path / "out", Network)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert (loaded.depthwise.groups, loaded.bn1.num_features) == (6, 6)
    assert grail.Report.from_json((tmp_path / "out/report.json").read_text()) == report


def test_a_narrow_transformer_loads_without_its_library_knowing(tmp_path, tiny_llama, tiny_batches):
    model, batches = tiny_llama(tie_word_embeddings=True), tiny_batches()
    widths = {"mlp": [0.5, 0.9], "heads": 2 / 3}
    grail.compress(model, batches, widths, ("mlp", "heads"), progress=False)
    grail.save(model, tmp_path / "out")
    loaded = grail.load(tmp_path / "out", lambda: tiny_llama(tie_word_embeddings=True, seed=3))
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_files_of_other_networks_and_damaged_ones_are_refused(tmp_path):
    model = network()
    folder = grail.save(model, tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        grail.save(model, folder)
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        grail.load(tmp_path, Network)
    with pytest.raises(ExportError, match="makes a Linear of other layers than the saved Network"):
        grail.load(folder, lambda: nn.Linear(2, 2))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ExportError, match="damaged"):
        grail.load(folder, Network)
    flipped = bytearray(weights)
    flipped[-5] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    with pytest.raises(ExportError, match="does not match its hash"):
        grail.load(folder, Network)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "grail.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ExportError, match="not of format 2"):
        grail.load(folder, Network)


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        (("conv9", "conv2"), InputError, "no layer named 'conv9'"),
        (("conv1", "out"), ModelError, "disagree on the number of channels: conv1 12, out 20"),
        (("act", "out"), ModelError, "act is a PReLU, not a plain floating-point Linear"),
        (("conv1", "depthwise"), ModelError, "reads its channels in 12 groups"),
    ],
    ids=["missing", "widths", "kind", "grouped"],
)
def test_sites_that_cannot_be_are_refused_with_the_reason(site, error, message):
    with pytest.raises(error, match=message):
        grail.compress(
            network(), images(), 0.5, [grail.Site(producers=[site[0]], consumers=[site[1]])]
        )


def test_what_runs_along_must_be_known():
    site = grail.Site(producers=["stem"], along=["hidden"], consumers=["conv1"])
    before = network()
    model = copy.deepcopy(before)
    with pytest.raises(ModelError, match="hidden is a Linear; along a site run batch norm"):
        grail.compress(model, images(), 0.5, [site], multiple=1, progress=False)
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.parametrize("name", ["conv1", "conv2", "depthwise"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_layer_that_computes_its_weight_whenever_it_runs_is_refused(name, how):
    model = network()
    module = model.get_submodule(name)
    if how == "prune":
        prune.l1_unstructured(module, "weight", 0.3)
    else:
        getattr(nn.utils, how)(module)
    with pytest.raises(ModelError, match=f"{name} computes its weight whenever it runs"):
        grail.compress(model, images(), 0.5, [CONV], progress=False)


def test_a_layer_along_has_as_many_channels_as_its_site():
    site = grail.Site(producers=["stem"], along=["bn1"], consumers=["conv1"])
    with pytest.raises(ModelError, match="bn1 has 12 channels, where its site has 8"):
        grail.compress(network(), images(), 0.5, [site], progress=False)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([CONV, grail.Site(["conv1"], ["hidden"])], "two sites are written by 'conv1'"),
        ([HIDDEN, grail.Site(["stem"], ["out"], name="other")], "two sites are read by 'out'"),
        ([5], "sites must be kinds, such as 'mlp', or grail.Site; got 5"),
        ([{"producers": ["hidden"], "consumers": ["out"]}], "or grail.Site; got {'producers'"),
    ],
    ids=["producer", "consumer", "number", "mapping"],
)
def test_sites_that_overlap_or_are_none_are_refused(sites, message):
    model = network()
    with pytest.raises(InputError, match=message):
        grail.compress(model, images(), 0.5, sites, progress=False)
    assert all(map(torch.equal, model.parameters(), network().parameters()))


def test_a_layer_twice_in_a_site_is_refused():
    with pytest.raises(InputError, match="producers names 'conv1' twice"):
        grail.Site(producers=["conv1", "conv1"], consumers=["conv2"])
    with pytest.raises(ModelError, match="hidden writes the channels that it reads"):
        grail.Site(producers=["stem", "hidden"], consumers=["hidden"])


def test_one_site_needs_no_list():
    report = grail.compress(network(), images(), 0.5, HIDDEN, progress=False)
    assert [row.name for row in report.sites] == ["out"]


class Between(nn.Module):
    """Two linear layers and something between them that has no parameters."""

    def __init__(self, between, first=None):
        super().__init__()
        self.first, self.second = first or nn.Linear(6, 16), nn.Linear(16, 4)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


MIXES = {
    "softmax": lambda x: x.softmax(-1),
    "norm": lambda x: nn.functional.normalize(x, dim=-1),
    "roll": lambda x: x.roll(1, -1),
    "layer norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
}


@pytest.mark.parametrize("loop", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("between", MIXES.values(), ids=MIXES)
def test_a_site_whose_channels_are_mixed_on_their_way_is_refused(between, loop):
    torch.manual_seed(0)
    model = Between(between)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(40, 6) for _ in range(3)]
    site = grail.Site(producers=["first"], consumers=["second"])
    settings = {} if loop else {"closed_loop": False, "drift_correction": 0}
    with pytest.raises(ModelError, match="does not read the channels that were kept"):
        grail.compress(model, batches, 0.5, site, progress=False, **settings)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


FORGOTTEN = {
    "open loop": {"closed_loop": False, "drift_correction": 0},
    "folding": {"selector": "folding"},
    "repair": {"repair": True},
    "a site behind": {"sites": [grail.Site(["conv1"], ["conv2"], ["bn1"]), HIDDEN]},
}


@pytest.mark.parametrize("settings", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_forgotten_layer_is_named_as_the_cause_wherever_it_shows(settings):
    model, site = network(), grail.Site(["conv1"], ["conv2"], ["bn1"])  # no depthwise
    with pytest.raises(ModelError, match="name every layer with weights between"):
        grail.compress(model, images(), 0.5, progress=False, **{"sites": [site], **settings})
    assert all(map(torch.equal, model.parameters(), network().parameters()))
    with pytest.raises(ModelError, match="name every layer with weights between"):
        grail.sensitivity(model, images(), sites=[site], progress=False)


@pytest.mark.parametrize("groups", [4, 8])
def test_equally_many_channels_of_each_group_stay(groups):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(16, 5, 1)
    ).eval()
    half = torch.arange(16).view(groups, -1)
    with torch.no_grad():  # of each group the second half says what the first one does
        half = half.view(groups, 2, -1)
        for tensor in (model[0].weight, model[0].bias):
            tensor[half[:, 1].flatten()] = tensor[half[:, 0].flatten()]
    batches = [torch.randn(4, 8, 9, 9) for _ in range(6)]
    dense = copy.deepcopy(model)
    (site,) = grail.trace(model)
    grail.compress(model, batches, 0.5, [site], alpha=1e-10, drift_correction=0, progress=False)
    assert (model[0].out_channels, model[0].groups) == (8, groups)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense(batches[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.randn(4, 3, 10, 10), "got one Tensor"),
        (None, "got one NoneType"),
        ([(torch.randn(4, 3, 10, 10), torch.zeros(4))], "leave labels out"),
    ],
    ids=["tensor", "none", "labels"],
)
def test_batches_that_are_none_or_hold_labels_are_refused(batches, message):
    with pytest.raises(InputError, match=message):
        grail.compress(network(), batches, 0.5, [CONV], progress=False)


def test_names_are_lists_and_kinds_do_not_mix_with_sites():
    with pytest.raises(InputError, match="producers must be a list of names"):
        grail.Site(producers="conv1", consumers=["conv2"])
    with pytest.raises(InputError, match="either kinds"):
        grail.compress(network(), images(), 0.5, [HIDDEN, "mlp"])


def test_every_share_of_kept_channels_reaches_its_site():
    model = network()
    grail.compress(
        model, images(), {"conv2": 0.5, "out": 0.25}, [CONV, HIDDEN], progress=False, multiple=1
    )
    assert np.array_equal([model.conv2.in_channels, model.out.in_features], [6, 5])


def test_attention_that_is_not_known_cannot_be_corrected():
    with pytest.raises(InputError, match="correct_attention is for transformers"):
        grail.compress(network(), images(), 0.5, [CONV], correct_attention=True, progress=False)


def test_token_weights_are_refused_where_no_norm_reads_the_stream():
    with pytest.raises(InputError, match="token_weights is for sites after which norms read"):
        grail.compress(network(), images(), 0.5, [CONV], token_weights=True, progress=False)


def test_a_bias_takes_up_the_mean_of_what_is_lost():
    model, batches = network(), images()
    dense = copy.deepcopy(model)
    grail.compress(
        model,
        batches,
        0.5,
        [HIDDEN],
        "magnitude",
        compensate=False,
        fit_bias=True,
        multiple=1,
        progress=False,
    )
    mean = inputs_of(dense, "out", batches).double().mean(0)
    kept = dense.hidden.weight.detach().norm(dim=1)
    kept = (kept.square() + dense.hidden.bias.detach() * 0).topk(10).indices.sort().values
    lost = torch.ones(20, dtype=torch.bool)
    lost[kept] = False
    weight = dense.out.weight.detach()
    assert torch.equal(model.out.weight, weight[:, kept])
    expected = dense.out.bias.detach().double() + weight[:, lost].double() @ mean[lost]
    torch.testing.assert_close(model.out.bias.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("site", [CONV, HIDDEN], ids=str)
def test_weights_and_bias_together_are_least_squares_with_an_intercept(site):
    model, batches = network(), images()
    dense = copy.deepcopy(model)
    settings = {"alpha": 0.0, "drift_correction": 0, "multiple": 1, "progress": False}
    grail.compress(model, batches, 0.5, [site], fit_bias=True, **settings)
    name = site.consumers[0]
    x, narrow = inputs_of(dense, name, batches), inputs_of(model, name, batches)
    with torch.no_grad():
        target = dense.get_submodule(name)(x)
        found = model.get_submodule(name)(narrow)
    if target.dim() == 4:
        narrow = nn.functional.unfold(narrow, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        target, found = (t.movedim(1, -1).flatten(0, 2) for t in (target, found))
    design = torch.cat([narrow, torch.ones(len(narrow), 1)], 1).double().numpy()
    best = design @ np.linalg.lstsq(design, target.double().numpy(), rcond=None)[0]
    ours, theirs = (np.linalg.norm(t - target.double().numpy()) for t in (found.numpy(), best))
    # In fp32 Grams of condition some 1e4 the least squares error is met to a thousandth, and where
    # there is none, eps·√κ = 6e-6 of the target is; 5e-5 was seen on a CPU with short vectors.
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4 * target.norm().item())


def test_a_layer_without_a_place_for_a_bias_is_refused():
    model = network()
    model.down.bias = None
    site = grail.Site(producers=["stem"], consumers=["conv1", "down"])
    with pytest.raises(InputError, match="conv1 has no bias"):
        grail.compress(model, images(), 0.5, [site], compensate=False, fit_bias=True)
