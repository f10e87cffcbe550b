"""Every kind of layer against brute force: what it reads, its fit, the error that is reported."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.algebra.kinds import as_matrix, as_stored
from grail.errors import InputError, ModelError
from grail.networks.layers import Consumer
from tests.kinds import KINDS, as_rows, axis, batches, by_output, design, network, ridge, seen
from tests.statistics.test_gradient import assert_close, expected
from tests.statistics.test_gradient import seen as gradients

ALPHA = 1e-2
FIXED: dict[str, Any] = {"alpha": ALPHA, "toward": "zero", "multiple": 1, "progress": False}
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def drawn(kind: type, seed: int) -> tuple[Any, Tensor]:
    """A convolution of drawn settings, and an input that it can read, both fp64."""
    draw, axes = random.Random(seed), int(kind.__name__[-2])
    settings: dict[str, Any] = {
        name: tuple(draw.randint(1, most) for _ in range(axes))
        for name, most in (("kernel_size", 3), ("stride", 3), ("dilation", 2))
    }
    size = tuple(draw.randint(6, 8) for _ in range(axes))
    if kind in TRANSPOSED:
        settings["padding"] = tuple(draw.randint(0, 2) for _ in range(axes))
        most = map(max, settings["stride"], settings["dilation"])
        settings["output_padding"] = tuple(draw.randrange(m) for m in most)
    else:
        named = draw.choice(["same", "valid", None, None])
        settings["padding"] = named or tuple(draw.randint(0, 2) for _ in range(axes))
        settings["padding_mode"] = draw.choice(["zeros", "reflect", "replicate", "circular"])
        if named == "same":
            settings["stride"] = 1
    torch.manual_seed(seed)
    return kind(5, 3, **settings).double(), torch.randn(2, 5, *size, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *TRANSPOSED], ids=lambda kind: kind.__name__)
def test_patches_times_the_weight_by_tap_is_what_the_layer_computes(kind, seed):
    module, x = drawn(kind, seed)
    consumer = Consumer("conv", module)
    with torch.no_grad():
        written = consumer.outputs_as_tokens(module(x))
    found = consumer.patches(x) @ consumer.by_tap.T + module.bias.detach()
    # fp64 sums of a hundred products.
    torch.testing.assert_close(found, written, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", TRANSPOSED, ids=lambda kind: kind.__name__)
def test_rows_of_a_transposed_convolution_write_its_channels(kind, groups):
    torch.manual_seed(0)
    module: Any = kind(6, 9, 2, 2, groups=groups)
    rows = as_matrix(module, module.weight.detach())
    assert torch.equal(as_stored(module, rows), module.weight)
    x = torch.randn(2, 6, *(3,) * len(module.kernel_size))
    silent = copy.deepcopy(module)
    with torch.no_grad():  # without its row and its bias a channel is zero, and no other changes
        rows[4] = 0
        silent.weight.copy_(as_stored(module, rows))
        silent.bias[4] = 0
        before, after = module(x), silent(x)
    assert not after[:, 4].any()
    others = [channel for channel in range(9) if channel != 4]
    assert torch.equal(after[:, others], before[:, others])


class Chosen:
    """A selector that keeps channels by scores of its own, and remembers which."""

    def __init__(self, seed: int = 0):
        self.seed, self.kept = seed, torch.tensor([])

    def __call__(self, view: Any) -> grail.Reduction:
        scores = torch.rand(view.width.channels, generator=torch.Generator().manual_seed(self.seed))
        selection = view.width.best(scores)
        self.kept = selection.index
        return selection


def real_error(dense: nn.Module, narrow: nn.Module, name: str, data: list[Tensor]) -> float:
    """‖y_dense − y_narrow‖ / ‖y_dense − bias‖ at a consumer, by forward passes."""
    module = dense.get_submodule(name)
    there, here = (
        torch.cat([as_rows(module, y) for y in seen(m, name, data)[1]]) for m in (dense, narrow)
    )
    bias = 0 if module.bias is None else module.bias.detach().double()
    return ((there - here).norm() / (there - bias).norm()).item()


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_the_ridge_solution_over_forward_passes(name):
    model, data, selector = network(name), batches(name), Chosen()
    dense, site = copy.deepcopy(model), KINDS[name].site
    settings = {**FIXED, "drift_correction": 0}
    (row,) = grail.compress(model, data, 0.5, [site], selector, **settings).sites
    (consumer,) = site.consumers
    there, here = dense.get_submodule(consumer), model.get_submodule(consumer)
    read, written = seen(dense, consumer, data)
    target = torch.cat([as_rows(there, y) for y in written])
    target = target - (0 if there.bias is None else there.bias.detach().double())
    # Of the dense layer's columns those of the kept channels.
    taps = by_output(there).shape[1] // row.channels
    columns = (selector.kept[:, None] * taps + torch.arange(taps)).flatten()
    solved = ridge(design(there, read)[:, columns], target, ALPHA)
    # An fp32 Gram (1e-6) through a system of condition ≤ 1/α.
    torch.testing.assert_close(by_output(here), solved, rtol=1e-3, atol=1e-4)
    # The narrow network reads those very channels: what was fitted is what it computes.
    assert row.error == pytest.approx(real_error(dense, model, consumer, data), rel=1e-3)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "both": {"fit_bias": True},
    "bias": {"compensate": False, "fit_bias": True},
    "plain": {"compensate": False},
    "folding": {"selector": "folding"},
    "wanda++": {"selector": "wanda++"},
    "open loop": {"closed_loop": False, "drift_correction": 0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_the_reported_error_is_the_real_one(name, settings):
    model, data = network(name), batches(name)
    dense, (consumer,) = copy.deepcopy(model), KINDS[name].site.consumers
    if settings.get("selector") == "folding" and KINDS[name].groups > 1:
        with pytest.raises(InputError, match="group"):
            grail.compress(model, data, 0.5, KINDS[name].site, progress=False, **settings)
        return
    if settings.get("fit_bias") and dense.get_submodule(consumer).bias is None:
        with pytest.raises(InputError, match="has no bias"):
            grail.compress(model, data, 0.5, KINDS[name].site, progress=False, **settings)
        return
    report = grail.compress(
        model, data, 0.5, KINDS[name].site, multiple=1, progress=False, **settings
    )
    (row,) = report.sites
    assert row.kept < row.channels
    error = row.baseline_error if settings == {"compensate": False} else row.error
    # fp32 sums over some hundreds of tokens.
    assert error == pytest.approx(real_error(dense, model, consumer, data), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_map_of_channels_is_fitted_to_pixels(name):
    model, data, selector = network(name), batches(name), Chosen()
    dense, site = copy.deepcopy(model), KINDS[name].site
    settings = {**FIXED, "drift_correction": 0, "per_tap": False}
    (row,) = grail.compress(model, data, 0.5, [site], selector, **settings).sites
    (consumer,) = site.consumers
    there, here = dense.get_submodule(consumer), model.get_submodule(consumer)
    if sum(there.weight.shape[2:]) == len(there.weight.shape[2:]):
        return  # of one tap a convolution reads not every pixel
    read = torch.cat(seen(dense, consumer, data)[0])
    if isinstance(there, nn.Linear):
        read = read.unflatten(-1, (row.channels, -1)).movedim(-2, -1)
    else:
        read = read.movedim(1, -1)
    pixels = read.flatten(0, -2)
    weight = by_output(there).unflatten(1, (row.channels, -1)).movedim(1, -1).flatten(0, 1)
    solved = ridge(pixels[:, selector.kept], pixels @ weight.T, ALPHA)
    found = by_output(here).unflatten(1, (row.kept, -1)).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("correction", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "name", ["conv1d", "same", "transposed", "transposed-groups", "flatten", "instance-norm"]
)
def test_a_later_site_undoes_the_drift_of_an_earlier_one(name, correction):
    torch.manual_seed(0)
    kind, width = KINDS[name], 6
    first = nn.Sequential(nn.Linear(kind.shape[-1], width), nn.ReLU())
    model = nn.Sequential(*first, nn.Linear(width, kind.shape[-1]), network(name)).eval()
    data, selector = batches(name), Chosen()
    names = {field: [f"3.{n}" for n in getattr(kind.site, field)] for field in vars(kind.site)}
    names.pop("name")
    earlier, later = grail.Site(["0"], ["2"]), grail.Site(**names)
    settings = {**FIXED, "drift_correction": correction}
    dense, before = copy.deepcopy(model), copy.deepcopy(model)
    grail.compress(before, data, 0.5, [earlier], selector, **settings)
    row = grail.compress(model, data, 0.5, [earlier, later], selector, **settings).sites[-1]
    (consumer,) = later.consumers
    layer = dense.get_submodule(consumer)
    drifted, held = seen(before, consumer, data)
    asked = seen(dense, consumer, data)[1]
    target = torch.cat(
        [as_rows(layer, y.lerp(d, correction)) for y, d in zip(held, asked, strict=True)]
    )
    target = target - layer.bias.detach().double()
    taps = by_output(layer).shape[1] // row.channels
    columns = (selector.kept[:, None] * taps + torch.arange(taps)).flatten()
    solved = ridge(design(layer, drifted)[:, columns], target, ALPHA)
    found = by_output(model.get_submodule(consumer))
    torch.testing.assert_close(found, solved, rtol=1e-3, atol=2e-4)
    if correction == 1:
        real = real_error(dense, model, consumer, data)
        assert row.error == pytest.approx(real, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_network_of_every_kind_loads_to_the_same_bits(name, tmp_path):
    model, data = network(name), batches(name)
    report = grail.compress(model, data, 0.5, KINDS[name].site, multiple=1, progress=False)
    grail.save(model, tmp_path / "out", report)
    loaded = grail.load(tmp_path / "out", lambda: network(name))
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    numbers = [
        {key: value for key, value in vars(module).items() if isinstance(value, int)}
        for net in (loaded, model)
        for module in net.modules()
    ]
    assert numbers[: len(numbers) // 2] == numbers[len(numbers) // 2 :]
    with torch.no_grad():
        assert loaded(data[0]).shape == model(data[0]).shape


@pytest.mark.parametrize("name", KINDS)
def test_parameters_saved_are_those_that_are_gone(name):
    model, data = network(name), batches(name)
    before = sum(p.numel() for p in model.parameters())
    site = grail.networks.find(model, [KINDS[name].site]).sites(["named"])[0][0]
    saved = site.parameters_saved(site.width(0.5, 1))
    report = grail.compress(model, data, 0.5, KINDS[name].site, multiple=1, progress=False)
    after = sum(p.numel() for p in model.parameters())
    assert report.model["parameters"] == {"before": before, "after": after}
    assert before - after == saved > 0


@pytest.mark.parametrize("name", [name for name in KINDS if name != "batch-norm-of-the-batch"])
def test_regional_gradients_of_every_kind_are_those_of_autograd(name):
    model, data = network(name), batches(name, count=2)
    (layer,) = KINDS[name].site.consumers
    module = model.get_submodule(layer)
    reference = expected(model, model, module, data, lambda _, output: list(output))
    ((channels, (found,)),) = gradients(model, data, sites=KINDS[name].site).items()
    taps = reference.movedim(axis(module), 0).flatten(1).unflatten(1, (channels, -1))
    taps = taps.flip(-1) if axis(module) else taps  # in the order in which windows are read
    assert_close(found, taps.movedim(1, -1).flatten(0, -2))


class Adapter(nn.Module):
    """As a LoRA layer of peft."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(6, 8), nn.ModuleDict({"default": nn.Linear(6, 2)})

    def forward(self, x):
        return self.base_layer(x)


class AdapterInside(nn.Linear):
    """As loralib's, whose adapter is zero before it is trained."""

    def __init__(self):
        super().__init__(6, 8)
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(*s)) for s in ((2, 6), (8, 2)))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Scaled(nn.Linear):
    """Its weight is computed from another one."""

    def __init__(self):
        super().__init__(6, 8)
        self.raw = nn.Parameter(torch.ones(8, 6))

    @property
    def weight(self):
        return self.raw * 2

    @weight.setter
    def weight(self, value):
        pass


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(6, 1, dtype=torch.int32))

    def forward(self, x):
        return x.new_ones(len(x), 8)


class Wrapped(Tensor):
    """As torchao's tensors."""


class Rounded(nn.Linear):
    """As BitLinear."""

    def __init__(self):
        super().__init__(6, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


class Observed(nn.Linear):
    """Its forward computes what a linear layer does, of a state that it keeps."""

    def __init__(self):
        super().__init__(6, 8)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x * self.scale)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x[:, None].expand(-1, 3, -1)
        return self.attention(x, x, x)[0][:, 0]


def of_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(6, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


QUANTISED, ODD = "load the model without quantisation", "something else than that of"
PRODUCERS = {
    "adapter": (Adapter, r"call model\.merge_and_unload\(\) first"),
    "adapter-inside": (AdapterInside, r"call model\.merge_and_unload\(\) first"),
    "property": (Scaled, "computes its weight whenever it runs"),
    "packed": (Packed, QUANTISED),
    "int8": (lambda: of_weight(torch.zeros(8, 6, dtype=torch.int8)), QUANTISED),
    "float8": (lambda: of_weight(torch.zeros(8, 6).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "tensor-subclass": (lambda: of_weight(torch.zeros(8, 6).as_subclass(Wrapped)), "a Wrapped of"),
    "rounded": (Rounded, f"Rounded.*{ODD} Linear"),
    "observed": (Observed, f"Observed.*{ODD} Linear"),
    "lazy": (lambda: nn.LazyLinear(8), "has no size yet; run the model once"),
    "embedding": (lambda: nn.EmbeddingBag(6, 8), "EmbeddingBag.*are Linear, Conv1d to Conv3d and"),
    "recurrent": (lambda: nn.RNN(6, 8), "RNN.*are Linear, Conv1d to Conv3d and"),
}


@pytest.mark.parametrize(("layer", "reason"), PRODUCERS.values(), ids=PRODUCERS)
def test_a_producer_that_cannot_be_narrowed_is_refused_by_its_reason(layer, reason):
    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(ModelError, match=reason) as refusal:
        grail.compress(model, [torch.randn(9, 6)], 0.5, grail.Site(["0"], ["2"]), progress=False)
    assert ("quantis" in str(refusal.value)) == (
        reason in (QUANTISED, "float8_e4m3fn", "a Wrapped of")
    )


def test_a_layer_that_its_owner_does_not_call_is_refused_by_its_reason():
    model = nn.Sequential(nn.Linear(6, 8), Attention(), nn.Linear(8, 3)).eval()
    site = grail.Site(["1.attention.out_proj"], ["2"])
    with pytest.raises(ModelError, match="MultiheadAttention, which reads its weight without"):
        grail.compress(model, [torch.randn(9, 6)], 0.5, site, progress=False)


ALONG = {
    "groups": (lambda: nn.GroupNorm(4, 8), "GroupNorm, which scales each channel by what others"),
    "layer": (lambda: nn.LayerNorm([8, 6]), "LayerNorm, which scales each channel by what others"),
    "rms": (lambda: nn.RMSNorm([8, 6]), "RMSNorm, which scales each channel by what others hold"),
    "lazy": (nn.LazyBatchNorm1d, "LazyBatchNorm1d that has no size yet; run the model once"),
    "grouped": (lambda: nn.Conv1d(8, 8, 1, groups=4), "Conv1d; along a site run batch norm"),
    "sizes": (lambda: nn.InstanceNorm1d(6, affine=True), "1 has 6 channels, where its site has 8"),
}


@pytest.mark.parametrize(("layer", "reason"), ALONG.values(), ids=ALONG)
def test_a_layer_that_cannot_run_along_is_refused_by_its_reason(layer, reason):
    model = nn.Sequential(nn.Conv1d(3, 8, 1), layer(), nn.Conv1d(8, 4, 1)).eval()
    site = grail.Site(["0"], ["2"], ["1"])
    with pytest.raises(ModelError, match=reason):
        grail.compress(model, [torch.randn(9, 3, 6)], 0.5, site, progress=False)


class Same(nn.Conv2d):
    """As timm's, which pads by the size of what it reads."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), True), bias)


class Cast(nn.Conv2d):
    """Computes what its parent does, in another way."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Named(nn.ConvTranspose2d):
    """Only a name."""


@pytest.mark.parametrize("kind", [Same, Standardised, Cast, Named])
def test_a_subclass_is_narrowed_where_it_computes_what_its_parent_does(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), kind(8, 4, 3, padding=1)).eval()
    data, site = [torch.randn(4, 3, 6, 5) for _ in range(3)], grail.Site(["0"], ["2"])
    dense = copy.deepcopy(model)
    if kind in (Same, Standardised):
        with pytest.raises(ModelError, match=f"2 is a {kind.__name__}.*{ODD} Conv2d"):
            grail.compress(model, data, 0.5, site, progress=False)
        return
    (row,) = grail.compress(model, data, 0.5, site, progress=False).sites
    assert row.error == pytest.approx(real_error(dense, model, "2", data), rel=1e-3)


def test_an_output_size_that_is_given_with_a_call_is_refused():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 8, 3, 2), nn.ConvTranspose2d(8, 3, 3, 2)

        def forward(self, x):
            return self.up(self.down(x).relu(), output_size=x.shape[2:])

    site = grail.Site(["down"], ["up"])
    with pytest.raises(ModelError, match="up is called with more than its input, an output_size"):
        grail.compress(Decoder().eval(), [torch.randn(4, 3, 8, 8)], 0.5, site, progress=False)


def test_a_map_without_a_batch_axis_is_refused():
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    with pytest.raises(ModelError, match="no batch axis: samples must lie along the first one"):
        grail.compress(model, [torch.randn(3, 9)], 0.5, grail.Site(["0"], ["2"]), progress=False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_parts_of_another_order_are_refused(interleaved):
    site = grail.Site([grail.Fused("gate_up", interleaved=not interleaved)], ["down"])
    name = "fused-interleaved" if interleaved else "fused"
    with pytest.raises(ModelError, match="does not read the channels that were kept"):
        grail.compress(network(name), batches(name), 0.5, site, progress=False)


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        (lambda: grail.Fused(3), InputError, "name must be the name of a layer; got int"),
        (lambda: grail.Fused("a", parts=1), InputError, "integer of at least 2; got 1"),
        (lambda: grail.Site(grail.Fused("a"), ["b"]), InputError, "must be a list of names; got F"),
        (
            lambda: grail.Site(["a"], [grail.Fused("b")]),
            InputError,
            "must be the name of a layer; got F",
        ),
        (lambda: grail.Site([grail.Fused("a"), "a"], ["b"]), InputError, "names 'a' twice"),
        (lambda: grail.Site([grail.Fused("a")], ["a"]), ModelError, "a writes the channels that"),
    ],
    ids=["name", "parts", "no list", "consumer", "twice", "itself"],
)
def test_fused_layers_that_make_no_site_are_refused(site, error, message):
    with pytest.raises(error, match=message):
        site()


@pytest.mark.parametrize(("parts", "message"), [(3, "no 3 parts of one size"), (11, "down 11")])
def test_fused_parts_must_fit_the_layer(parts, message):
    site = grail.Site([grail.Fused("gate_up", parts)], ["down"])
    with pytest.raises(ModelError, match=message):
        grail.compress(network("fused"), batches("fused"), 0.5, site, progress=False)


def test_a_layer_of_several_parts_that_is_not_said_to_be_fused_is_refused_with_the_remedy():
    site = grail.Site(["gate_up"], ["down"])
    with pytest.raises(ModelError, match=r"gate_up 22, down 11.*grail\.Fused\(name\)"):
        grail.compress(network("fused"), batches("fused"), 0.5, site, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "same", "transposed", "flatten", "fused", "falcon"])
def test_other_dtypes_report_the_real_error_too(name, dtype):
    model, data = network(name).to(dtype), [batch.to(dtype) for batch in batches(name)]
    dense, (consumer,) = copy.deepcopy(model), KINDS[name].site.consumers
    (row,) = grail.compress(model, data, 0.5, KINDS[name].site, progress=False).sites
    # Outputs are rounded to 8 or 11 bits; the report's are not.
    slack = {torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert row.error == pytest.approx(real_error(dense, model, consumer, data), abs=slack)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_collected_of_every_kind_compresses_to_the_same_bits(name, tmp_path):
    data, site = batches(name), [KINDS[name].site]
    folder = grail.collect(network(name), data, site, output=tmp_path / "a", progress=False)
    model, other = network(name), network(name)
    settings = {"closed_loop": False, "drift_correction": 0, "progress": False}
    grail.compress(model, data, 0.5, site, **settings)
    grail.compress(other, grail.Collected(folder), 0.5, site, **settings)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].groups == 1])
def test_what_the_network_loses_by_a_site_of_every_kind_is_measured(name):
    model, data = network(name), batches(name)
    before = copy.deepcopy(model.state_dict())
    measured = grail.sensitivity(model, data, 0.5, [KINDS[name].site], progress=False)
    (loss,) = measured.losses.values()
    assert 0 < loss < 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [n for n in KINDS if not n.startswith(("fused", "group-norm"))])
def test_a_trace_finds_the_site_of_every_kind(name):
    (found,) = grail.trace(network(name))
    site = KINDS[name].site
    assert (found.producers, found.along, found.consumers) == (
        site.producers,
        site.along,
        site.consumers,
    )


class SamePadding(nn.Conv2d):
    """TensorFlow's: how much is padded depends on what a size leaves over the stride."""

    def forward(self, x):
        sides = []
        for size, taps, step in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            missing = max(0, (-(-size // step) - 1) * step + taps - size)
            sides = [missing // 2, missing - missing // 2, *sides]
        return self._conv_forward(nn.functional.pad(x, sides), self.weight, self.bias)


class ByRank(nn.Linear):
    """Normalises what it returns for tokens alone."""

    def forward(self, x):
        y = super().forward(x)
        return nn.functional.normalize(y, dim=-1) if x.dim() > 2 else y


@pytest.mark.parametrize(
    "layer",
    [*(SamePadding(6, 4, 3, step) for step in (1, 2, 3, 4)), ByRank(6, 4)],
    ids=lambda layer: repr(layer),
)
def test_a_subclass_that_differs_only_for_some_inputs_is_refused(layer):
    with pytest.raises(ModelError, match="its forward computes something else"):
        Consumer("layer", layer)


@pytest.mark.parametrize("compensate", [False, True], ids=["bias", "both"])
def test_no_bias_goes_into_a_norm_that_others_use(compensate):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2, self.down = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in "123")
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(self.c2(self.c1(x).relu())) + self.norm(self.down(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(Shared(), Shared())).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="has no bias, nor a batch norm after it"):
        grail.compress(
            model,
            [torch.randn(4, 3, 9, 9)] * 3,
            0.5,
            compensate=compensate,
            fit_bias=True,
            progress=False,
        )
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
