"""Every kind of layer against brute force: what it reads, its fit, the error that is reported."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import InputError
from grail.kinds import as_matrix, as_stored
from grail.layers import Consumer

from .kinds import KINDS, as_rows, batches, by_output, design, network, ridge, seen

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
        expected = consumer.outputs_as_tokens(module(x))
    found = consumer.patches(x) @ consumer.by_tap.T + module.bias.detach()
    # fp64 sums of a hundred products.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


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
    expected = ridge(design(there, read)[:, columns], target, ALPHA)
    # An fp32 Gram (1e-6) through a system of condition ≤ 1/α.
    torch.testing.assert_close(by_output(here), expected, rtol=1e-3, atol=1e-4)
    # The narrow network reads those very channels: what was fitted is what it computes.
    assert row.error == pytest.approx(real_error(dense, model, consumer, data), rel=1e-3)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "both": {"compensate": "both"},
    "bias": {"compensate": "bias"},
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
    if (
        settings.get("compensate") in ("both", "bias")
        and dense.get_submodule(consumer).bias is None
    ):
        with pytest.raises(InputError, match="has no bias"):
            grail.compress(model, data, 0.5, KINDS[name].site, progress=False, **settings)
        return
    report = grail.compress(
        model, data, 0.5, KINDS[name].site, multiple=1, progress=False, **settings
    )
    (row,) = report.sites
    assert row.kept < row.channels
    error = row.baseline_error if settings.get("compensate") is False else row.error
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
    expected = ridge(pixels[:, selector.kept], pixels @ weight.T, ALPHA)
    found = by_output(here).unflatten(1, (row.kept, -1)).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


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
    expected = ridge(design(layer, drifted)[:, columns], target, ALPHA)
    found = by_output(model.get_submodule(consumer))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
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
    site = grail.sites.find(model, [KINDS[name].site]).sites(["named"])[0][0]
    saved = site.parameters_saved(site.width(0.5, 1))
    report = grail.compress(model, data, 0.5, KINDS[name].site, multiple=1, progress=False)
    after = sum(p.numel() for p in model.parameters())
    assert report.model["parameters"] == {"before": before, "after": after}
    assert before - after == saved > 0
