"""Convolutional networks: which sites they have, and what a run makes of them."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grail
from grail.algebra.reduction import Folding
from grail.errors import InputError, ModelError
from grail.networks import find
from grail.networks.channel_graph import Flow
from grail.networks.layers import Consumer
from grail.recipe import Recipe
from tests.convnets import (
    NETWORKS,
    SPREADS,
    UNLISTED,
    Basic,
    Bottleneck,
    Net,
    PreBasic,
    ResNeXt,
    conv,
    images,
    linearly_gated,
    network,
    randomised,
)

ALPHA = 1e-2
FIXED: dict[str, Any] = {"alpha": ALPHA, "toward": "zero", "multiple": 1, "progress": False}


def sites_of(model: nn.Module) -> list[grail.networks.BoundSite]:
    return list(itertools.chain(*find(model).sites(("conv",))))


def seen(model: nn.Module, name: str, batches: list[Tensor], call: int = 0) -> Tensor:
    """What a module reads when it is called for the `call`th time, in fp64."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].double())
    )
    found = []
    with torch.no_grad():
        for batch in batches:
            inputs.clear()
            model(batch)
            found.append(inputs[call])
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sites_of_every_layout_are_found(name):
    assert [site.name for site in sites_of(network(name))] == NETWORKS[name][1]


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_say_nothing_can_go_without_a_trace(name, compensate):
    # Odd channels are cut off at their consumers: a right wiring drops exactly those.
    model, batches = network(name), images()
    with torch.no_grad():
        for consumer in itertools.chain(*(site.consumers for site in sites_of(model))):
            consumer.module.weight[:, 1::2] = 0
        dense = model(batches[0])
    report = grail.compress(
        model, batches, 0.5, None, "wanda", compensate=compensate, multiple=1, progress=False
    )
    assert all(2 * row.kept == row.channels for row in report.sites)
    with torch.no_grad():
        # A dozen layers of fp32 on other shapes.
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrowed_network_is_narrow_and_the_report_counts_it(name):
    model, batches = network(name), images()
    dense = sum(p.numel() for p in model.parameters())
    (saving,) = grail.inspect(model, recipe=Recipe(multiple=1), keeps=[0.5]).savings
    report = grail.compress(model, batches, 0.5, multiple=1, progress=False)
    after = sum(p.numel() for p in model.parameters())
    assert report.model["parameters"] == {"before": dense, "after": after}
    assert after == saving.parameters < dense
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (
                module.out_channels,
                module.in_channels // module.groups,
            )
        if isinstance(module, nn.BatchNorm2d):
            sizes = {len(t) for t in (module.weight, module.running_mean, module.running_var)}
            assert sizes == {module.num_features}


@pytest.mark.parametrize("name", ["torchvision-basic", "torchvision-resnext", "timm-inverted-se"])
def test_stem_and_residual_stream_keep_their_widths(name):
    model = network(name)
    untouched = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.startswith(("conv1.", "bn1.", "fc.")) or "downsample" in key
    }
    grail.compress(model, images(), 0.5, multiple=1, progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in untouched.items())


def test_everything_kept_changes_no_bit():
    model = network("torchvision-basic")
    before = copy.deepcopy(model.state_dict())
    grail.compress(model, images(), 1.0, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def fingerprint(model: nn.Module) -> list[Any]:
    """Whose tensors a network has, and the sizes that its modules remember."""
    names = ("in_channels", "out_channels", "groups", "num_features", "training")
    sizes = [getattr(module, name, None) for module in model.modules() for name in names]
    tensors = [*model.parameters(), *model.buffers()]
    return [*sizes, *((id(t), t.shape) for t in tensors)]


def test_an_interrupted_run_leaves_the_network_as_it_was():
    model, calls = network("timm-inverted").train(), itertools.count(1)
    before, values = fingerprint(model), copy.deepcopy(model.state_dict())

    def fails_in_the_third_block(view):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return view.width.best(view.gram.energy)

    with pytest.raises(KeyboardInterrupt):
        grail.compress(
            model, images(), 0.5, None, fails_in_the_third_block, repair=True, progress=False
        )
    assert fingerprint(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def patches(x: Tensor) -> Tensor:
    """What a 3×3 convolution reads of [N, H, height, width], as [pixels, H·9]."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def kept_of(weight: Tensor) -> Tensor:
    """The half of the filters of largest norm."""
    norms = weight.detach().double().flatten(1).norm(dim=1)
    return norms.topk(len(norms) // 2).indices.sort().values


def ridge(x: Tensor, target: Tensor) -> Tensor:
    """The W' of least ‖target − x W'ᵀ‖² + λ‖W'‖², by least squares on more rows, not a Gram."""
    strength = (ALPHA * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, strength * torch.eye(x.shape[1], dtype=x.dtype)])
    zeros = target.new_zeros(x.shape[1], target.shape[1])
    return torch.linalg.lstsq(rows, torch.cat([target, zeros])).solution.T


def narrow_by_hand(block: nn.Module, kept: Tensor, weight: Tensor) -> None:
    block.conv1.weight = nn.Parameter(block.conv1.weight[kept])
    for name in ("weight", "bias"):
        setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name)[kept]))
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, getattr(block.bn1, name)[kept])
    block.conv2.weight = nn.Parameter(weight.float())


def two_blocks(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net(Basic)
    net.layer2 = nn.Sequential(conv(16, 24, 1))
    return randomised(net)


BLOCKS = ("layer1.0", "layer1.1")


def by_hand(model: nn.Module, batches: list[Tensor], per_tap: bool, correction: float) -> None:
    """Halves both blocks, with forward passes of the whole network."""
    dense = copy.deepcopy(model)
    for name in BLOCKS:
        block: Any = model.get_submodule(name)
        kept, weight = kept_of(block.conv1.weight), block.conv2.weight.detach().double()
        x = seen(model, f"{name}.conv2", batches)
        if per_tap:
            sums = [seen(m, f"{name}.relu", batches, call=1) for m in (dense, model)]
            norm = block.bn2
            slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            drift = pixels(sums[0] - sums[1]) / slope
            target = patches(x) @ weight.flatten(1).T + correction * drift
            fitted = ridge(patches(x[:, kept]), target).view(-1, len(kept), 3, 3)
        else:
            by_channel = weight.movedim(1, -1).flatten(0, 2)
            fitted = ridge(pixels(x[:, kept]), pixels(x) @ by_channel.T)
            fitted = fitted.view(-1, 3, 3, len(kept)).movedim(-1, 1)
        narrow_by_hand(block, kept, fitted.detach())


@pytest.mark.parametrize(
    ("per_tap", "correction"),
    [(False, 0.0), (True, 0.0), (True, 0.7)],
    ids=["paper", "tap", "drift"],
)
def test_a_run_equals_brute_force_over_whole_forward_passes(per_tap, correction):
    model, batches = two_blocks(), images()
    reference = copy.deepcopy(model)
    by_hand(reference, batches, per_tap, correction)
    settings = {"drift_correction": correction, "per_tap": per_tap, **FIXED}
    grail.compress(model, batches, 0.5, None, "magnitude", **settings)
    for name in BLOCKS:
        ours, theirs = (m.get_submodule(f"{name}.conv2").weight for m in (model, reference))
        # fp32 Grams and forward passes (1e-6) through systems of condition ≤ 1/α.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def error_behind(model: nn.Module, dense: nn.Module, name: str, batches: list[Tensor]) -> float:
    """The relative error of what a batch norm reads."""
    there, here = (seen(m, name, batches) for m in (dense, model))
    return ((here - there).norm() / there.norm()).item()


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_taps_fitted_alone_never_have_the_larger_error(seed, keep):
    # With (next to) no ridge, least squares over taps has all maps of channels among its choices.
    dense, batches = two_blocks(seed), images()
    errors = []
    for per_tap in (True, False):
        model = copy.deepcopy(dense)
        settings = {**FIXED, "alpha": 1e-7, "drift_correction": 0, "per_tap": per_tap}
        grail.compress(model, batches, keep, None, "magnitude", **settings)
        errors.append(error_behind(model, dense, "layer1.0.bn2", batches))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("selector", ["folding", "folding-kmeans", "folding-agglomerative"])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("name", ["torchvision-basic", "torchvision-bottleneck", "timm-inverted"])
def test_folding_of_doubled_channels_loses_nothing(name, compensate, selector):
    model, batches = network(name), images()
    with torch.no_grad():
        for site in sites_of(model):
            for module in (*(p.module for p in site.producers), *(a.module for a in site.along)):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.dim():
                        tensor[1::2] = tensor[::2]
        dense = model(batches[0])
    grail.compress(
        model, batches, 0.5, None, selector, compensate=compensate, multiple=1, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-3, atol=1e-3)


def folded(exact: bool, alpha: float, closed_loop: bool = True) -> tuple[nn.Module, nn.Module]:
    """The dense and the folded network."""
    dense = two_blocks()
    model = copy.deepcopy(dense)
    settings = {**FIXED, "alpha": alpha, "drift_correction": 0, "exact_folding": exact}
    grail.compress(model, images(), 0.5, None, "folding", closed_loop=closed_loop, **settings)
    return dense, model


def test_exact_folding_is_least_squares_on_what_the_folded_filters_write():
    dense, model = folded(exact=True, alpha=ALPHA)
    x = seen(model, "layer1.0.conv2", images())  # of the first block: nothing has drifted yet
    weight = dense.layer1[0].conv2.weight.detach().double()
    target = patches(seen(dense, "layer1.0.conv2", images())) @ weight.flatten(1).T
    fitted = ridge(patches(x), target).view_as(model.layer1[0].conv2.weight)
    torch.testing.assert_close(
        model.layer1[0].conv2.weight.detach().double(), fitted, rtol=1e-3, atol=1e-4
    )


def test_exact_folding_has_less_error_than_the_papers():
    errors = [
        error_behind(model, dense, "layer1.0.bn2", images())
        for dense, model in (folded(exact, alpha=1e-7) for exact in (True, False))
    ]
    assert errors[0] < 0.95 * errors[1]


def test_drift_of_the_residual_stream_is_undone_by_the_last_consumer_of_a_block():
    dense, batches = network("torchvision-bottleneck"), images(count=30, rows=8)
    errors = []
    for correction in (0.0, 1.0):
        model = copy.deepcopy(dense)
        settings = {**FIXED, "alpha": 1e-4, "drift_correction": correction}
        grail.compress(model, batches, 0.5, **settings)
        errors.append(error_behind(model, dense, "avgpool", images(seed=1)))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["torchvision-basic", "timm-inverted"])
@pytest.mark.parametrize("compensate", [False, True], ids=["bias", "both"])
def test_a_shifted_batch_norm_gives_the_dense_networks_means(compensate, name):
    dense, batches = network(name), images()
    model = copy.deepcopy(dense)
    settings = {**FIXED, "drift_correction": 0, "compensate": compensate, "fit_bias": True}
    grail.compress(model, batches, 0.5, None, "magnitude", **settings)
    first = sites_of(dense)[0]
    norm = name_of(dense, first.consumers[0].norm)
    means = []
    for m in (dense, model):
        module: Any = m.get_submodule(norm)
        # The slope and the bias of the norm are the same for both.
        means.append(seen(m, norm, batches).mean((0, 2, 3)) - module.running_mean.double())
    torch.testing.assert_close(*means, rtol=1e-3, atol=1e-4)


def test_weights_and_biases_together_are_least_squares_with_an_intercept():
    dense, batches = two_blocks(), images()
    model = copy.deepcopy(dense)
    settings = {**FIXED, "drift_correction": 0, "fit_bias": True}
    grail.compress(model, batches, 0.5, None, "magnitude", **settings)
    block, ours = dense.layer1[0], model.layer1[0]
    kept = kept_of(block.conv1.weight)
    x = seen(dense, "layer1.0.conv2", batches)
    target = patches(x) @ block.conv2.weight.detach().double().flatten(1).T
    read = patches(x[:, kept])
    fitted = ridge(read - read.mean(0), target - target.mean(0))
    shift = target.mean(0) - fitted @ read.mean(0)
    torch.testing.assert_close(
        ours.conv2.weight.detach().double().flatten(1), fitted, rtol=1e-3, atol=1e-4
    )
    moved = (block.bn2.running_mean - ours.bn2.running_mean).double()
    torch.testing.assert_close(moved, shift, rtol=1e-3, atol=1e-3)


def test_a_bias_without_a_place_is_refused():
    with pytest.raises(InputError, match="conv2"):  # behind it comes the sum
        grail.compress(
            network("pre-activation"),
            images(),
            0.5,
            compensate=False,
            fit_bias=True,
            progress=False,
        )


@pytest.mark.parametrize("per_tap", [True, False])
def test_a_strided_pointwise_convolution_is_fitted_to_the_pixels_that_it_reads(per_tap):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 12, 3), nn.ReLU(), conv(12, 20, 1, stride=2)).eval()
    dense, batches = copy.deepcopy(model), images()
    site = grail.Site(producers=["0"], consumers=["2"])
    settings = {**FIXED, "drift_correction": 0.5, "per_tap": per_tap}
    report = grail.compress(model, batches, 0.5, [site], "magnitude", **settings)
    x, weight = seen(dense, "2", batches), dense[2].weight.detach().double().flatten(1)
    kept, x = kept_of(dense[0].weight), x[:, :, ::2, ::2]
    fitted = ridge(pixels(x[:, kept]), pixels(x) @ weight.T)
    ours = model[2].weight.detach().double().flatten(1)
    torch.testing.assert_close(ours, fitted, rtol=1e-3, atol=1e-4)
    assert report.sites[0].tokens == 4 * 5 * 6 * 6


@pytest.mark.parametrize("name", NETWORKS)
def test_a_landing_shows_what_the_consumer_adds_to(name):
    # What the consumer writes more is seen there, scaled: its drift is what was left out.
    model, batches = network(name), images(count=1)
    for site in sites_of(model):
        if len(site.consumers) > 1:
            continue
        aim = landed(model, site, batches[0])
        weight = site.consumers[0].module.weight
        kept = weight.detach().clone()
        more = torch.zeros_like(kept)
        more[:, 0] = 0.1
        x = seen(model, name_of(model, site.consumers[0].module), batches).float()
        with torch.no_grad():
            weight += more
        drift = site.drift(aim, landed(model, site, batches[0]))
        module = site.consumers[0].module
        expected = F.conv2d(x, -more, None, module.stride, module.padding)
        # fp32 differences of numbers of some 1, over a slope of at least 0.4.
        torch.testing.assert_close(drift, expected.flatten(2).movedim(1, -1), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("slope", [1e-6, 1e-12, 1e-30, 1e-41])
def test_no_drift_is_asked_for_behind_a_slope_of_next_to_nothing(slope):
    # As after training with weight decay; what such an output lacks would be divided by it.
    model, batches = network("torchvision-basic"), images()
    norms = [m for name, m in model.named_modules() if name.endswith("bn2")]
    assert norms
    with torch.no_grad():
        for norm in norms:
            norm.weight[:2] = slope
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    dense = model(batches[0])
    grail.compress(model, batches, 0.5, drift_correction=1.0, progress=False)
    assert max(float(p.detach().abs().max()) for p in model.parameters()) < 10 * largest
    assert bool((model(batches[0]) - dense).isfinite().all())


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def landed(model: nn.Module, site: grail.networks.BoundSite, batch: Tensor) -> Tensor:
    """What the driver would see where a site lands."""
    from grail.statistics.observing import watch

    shown: list[Tensor] = []
    block = find(model).blocks[site.block]
    with watch(site, block, None, lambda x: shown.append(x.clone())), torch.no_grad():
        model(batch)
    return shown[0]


RESIDUAL = {
    "producers": ["conv1", "layer1.0.conv2", "layer1.1.conv2"],
    "along": ["bn1", "layer1.0.bn2", "layer1.1.bn2"],
    "consumers": ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"],
}


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_silent_channels_of_a_named_residual_stream_go_without_a_trace(compensate):
    model, batches, site = network("torchvision-basic"), images(), grail.Site(**RESIDUAL)
    with torch.no_grad():
        for name in site.consumers:
            model.get_submodule(name).weight[:, 1::2] = 0
        dense = model(batches[0])
    grail.compress(
        model, batches, 0.5, [site], "wanda", compensate=compensate, multiple=1, progress=False
    )
    assert {len(model.get_submodule(name).weight) for name in site.producers} == {8}
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)


def test_consumers_of_a_residual_stream_are_each_fitted_to_the_dense_network():
    model, batches, site = network("torchvision-basic"), images(), grail.Site(**RESIDUAL)
    dense = copy.deepcopy(model)
    grail.compress(model, batches, 0.5, [site], "magnitude-l1", drift_correction=0, **FIXED)
    rows = [dense.get_submodule(name).weight.detach().flatten(1) for name in site.producers]
    kept = torch.cat(rows, 1).norm(p=1, dim=1).topk(8).indices.sort().values
    for name in ("layer1.0.conv1", "layer1.1.conv1"):
        x = seen(dense, name, batches)
        weight = dense.get_submodule(name).weight.detach().double()
        fitted = ridge(patches(x[:, kept]), patches(x) @ weight.flatten(1).T).view(16, 8, 3, 3)
        ours = model.get_submodule(name).weight.detach().double()
        torch.testing.assert_close(ours, fitted, rtol=1e-3, atol=1e-4)


def test_a_grouped_convolution_keeps_as_many_channels_of_each_group():
    model = randomised(Net(ResNeXt))
    with torch.no_grad():  # the loudest are all in the first two groups
        model.layer1[0].conv2.weight[:8] *= 100
        before = model.layer1[0].conv2.weight.clone()
    report = grail.compress(
        model, images(), 0.3, None, "magnitude", compensate=False, progress=False
    )
    after = model.layer1[0].conv2
    assert (after.in_channels, after.out_channels, after.groups) == (16, 4, 4)
    for old, new in zip(before.split(4), after.weight, strict=True):
        assert torch.equal(new, old[old.flatten(1).norm(dim=1).argmax()])
    assert any("4 of 16 channels (1 in each group) = 0.250" in note for note in report.notes)
    assert any("layer1.0.conv2 reads its channels in 4 groups" in note for note in report.notes)


@pytest.mark.parametrize(
    "selector", ["folding", lambda view: Folding(torch.arange(16) // 2)], ids=["folding", "own"]
)
def test_a_grouped_convolution_is_not_folded(selector):
    with pytest.raises(InputError, match="group"):
        grail.compress(randomised(Net(ResNeXt)), images(), 0.5, None, selector, progress=False)


def test_a_grouped_convolution_refuses_more_channels_of_one_group_than_of_another():
    with pytest.raises(InputError, match=r"\(2 in each group\) must stay, whole and in ascending"):
        grail.compress(
            randomised(Net(ResNeXt)),
            images(),
            0.5,
            selector=lambda view: grail.Selection(range(view.width.kept), view.width.channels),
            progress=False,
        )


class Shuffled(Basic):
    """Its channels change places before the second convolution reads them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(F.channel_shuffle(hidden, 2)))


class Softened(Basic):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(hidden.softmax(1)))


class Doubled(Basic):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(hidden)))))


class Normalised(Basic):
    def __init__(self, c: int, o: int, stride: int):
        super().__init__(c, o, stride)
        self.bn1 = nn.GroupNorm(2, o)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Softened, "softmax"),
        (Shuffled, "channel_shuffle"),
        (Doubled, "runs twice"),
        (Normalised, "GroupNorm"),
    ],
)
def test_channels_that_cannot_be_followed_are_refused_with_the_reason(block, reason):
    net = Net(lambda c, o, stride: block(16, 16, 1))
    with pytest.raises(ModelError, match=reason):
        find(net)


class Beside(Basic):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


def test_a_second_output_of_a_block_is_no_place_to_see_a_sum():
    flow = Flow(Beside(16, 16, 1))
    (channels,) = flow.inner()
    assert flow.sum_behind(channels.consumers[0]) is None


class Scaled(Basic):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return torch.add(x, out, alpha=0.1)


class Kept(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))).add(x, alpha=0.1)


@pytest.mark.parametrize(("block", "share"), [(Scaled, 0.1), (Kept, 1)])
def test_a_scaled_sum_shows_what_a_consumer_writes_at_that_scale(block, share):
    flow = Flow(randomised(block(16, 16, 1)))
    (channels,) = flow.inner()
    module, slope = flow.sum_behind(channels.consumers[0])
    norm = flow.norm(channels.consumers[0])
    expected = share * norm.weight / (norm.running_var + norm.eps).sqrt()
    assert module is None
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-6, atol=0)


class Branching(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x


def test_a_block_that_cannot_be_traced_is_left_out_with_a_note():
    net = randomised(Net(Basic))
    net.layer1[1] = randomised(Branching(16, 16, 1))
    report = grail.compress(net, images(), 0.5, progress=False)
    assert any("layer1.1: its forward cannot be traced" in note for note in report.notes)
    assert net.layer1[1].conv1.out_channels == 16


class ConvNeXt(nn.Module):
    """transformers' and torchvision's: its channels inside are written by a linear layer."""

    def __init__(self, c: int, o: int, stride: int):
        super().__init__()
        self.dwconv, self.pwconv = conv(16, 16, 3, groups=16), conv(16, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.pwconv(F.relu(self.dwconv(x))).permute(0, 2, 3, 1)
        return x + self.fc2(F.gelu(self.fc1(hidden))).permute(0, 3, 1, 2)


def test_linear_layers_inside_a_block_of_convolutions_are_narrowed():
    net = randomised(Net(lambda c, o, stride: ConvNeXt(16, 16, 1)))
    net.layer2, batches = nn.Sequential(conv(16, 24, 1)), images()
    with torch.no_grad():
        for site in sites_of(net):
            for consumer in site.consumers:
                consumer.module.weight[:, 1::2] = 0
        dense = net(batches[0])
    report = grail.compress(net, batches, 0.5, None, "wanda", multiple=1, progress=False)
    assert any(row.name == "layer1.0.fc1" and row.kept == 12 for row in report.sites)
    with torch.no_grad():
        torch.testing.assert_close(net(batches[0]), dense, rtol=1e-4, atol=1e-4)


class Pooled(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.layer1(F.relu(self.bn1(self.conv1(x)))), 2)
        return self.fc(self.avgpool(self.layer2(x)).flatten(1))


def test_something_between_two_blocks_is_refused():
    with pytest.raises(ModelError, match="between"):
        grail.compress(randomised(Pooled(Bottleneck)), images(), 0.5, progress=False)


def test_a_network_of_untraceable_blocks_is_refused_with_the_reason():
    with pytest.raises(ModelError, match=r"layer1\.0 of Net: its forward cannot be traced"):
        find(Net(lambda c, o, stride: Branching(16, 16, 1)))


@pytest.mark.parametrize("per_tap", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_padded_pointwise_convolution_is_fitted_to_what_it_reads(mode, per_tap):
    torch.manual_seed(0)
    padded = nn.Conv2d(12, 20, 1, stride=2, padding=1, padding_mode=mode)
    model = nn.Sequential(conv(3, 12, 3), nn.ReLU(), padded).eval()
    dense, batches = copy.deepcopy(model), images()
    site = grail.Site(producers=["0"], consumers=["2"])
    settings = {**FIXED, "drift_correction": 0.5, "per_tap": per_tap}
    report = grail.compress(model, batches, 0.5, [site], "magnitude", **settings)
    x, weight = seen(dense, "2", batches), dense[2].weight.detach().double().flatten(1)
    x = F.pad(x, (1, 1, 1, 1), "constant" if mode == "zeros" else mode)[:, :, ::2, ::2]
    kept = kept_of(dense[0].weight)
    fitted = ridge(pixels(x[:, kept]), pixels(x) @ weight.T)
    ours = model[2].weight.detach().double().flatten(1)
    torch.testing.assert_close(ours, fitted, rtol=1e-3, atol=1e-4)
    assert report.sites[0].tokens == 4 * 5 * 7 * 7


@pytest.mark.parametrize("padding", ["same", "valid", 0], ids=str)
def test_a_pointwise_convolution_reads_pixels_whatever_its_padding_is_called(padding):
    (x,) = images(count=1)
    consumer = Consumer("conv", nn.Conv2d(3, 4, 1, padding=padding))
    assert torch.equal(consumer.patches(x).flatten(0, 1), pixels(x))


def test_the_target_of_a_block_is_its_own_whatever_the_one_before_it_was_measured_at(monkeypatch):
    blocks = nn.Sequential(PreBasic(8, 8, 1), Basic(8, 8, 1))  # its output; before its last ReLU
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks, head))
    batches, targets, drift = images(count=3), [], grail.networks.BoundSite.drift
    dense = seen(model, "1.1.relu", batches, call=1)

    def noting(site, target, observed):
        if site.block == 1:
            targets.append(target.double())
        return drift(site, target, observed)

    monkeypatch.setattr(grail.networks.BoundSite, "drift", noting)
    grail.compress(model, batches, 0.5, drift_correction=1.0, progress=False)
    assert torch.equal(torch.cat(targets)[-len(dense) :], dense)  # after those of a rehearsal


def test_blocks_that_a_chain_of_attributes_holds_are_found_like_those_of_a_list():
    torch.manual_seed(0)
    model = randomised(UNLISTED["regnet"]())
    listed = nn.Sequential(model.stem, nn.Sequential(*model.s1.children(), *model.s2.children()))
    assert list(find(model).blocks) == list(find(listed).blocks)
    names = [f"s{stage}.b{block}.conv2.conv" for stage in (1, 2) for block in (1, 2)]
    assert [site.name for site in sites_of(model)] == names
    for consumer in itertools.chain(*(site.consumers for site in sites_of(model))):
        with torch.no_grad():
            consumer.module.weight[:, 1::2] = 0
    batches = images()
    dense = model(batches[0])
    grail.compress(model, batches, 0.5, None, "wanda", multiple=1, progress=False)
    torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)


class Reversed(nn.Module):
    """Its blocks run in another order than they are registered, and one does not run."""

    def __init__(self):
        super().__init__()
        self.second, self.unused, self.first = (Basic(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Skips(Reversed):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Again(Reversed):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x)))


class Head(nn.Module):
    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stem, self.stage, self.fc = conv(3, 8, 3), stage, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def test_a_chain_has_the_order_in_which_it_runs():
    model = randomised(Head(Reversed()))
    assert list(find(model).blocks) == [model.stage.first, model.stage.second]
    assert len(grail.compress(model, images(), 0.5, progress=False).sites) == 2


@pytest.mark.parametrize("stage", [Skips, Again], ids=["skips", "again"])
def test_a_stage_that_does_more_than_pass_on_is_no_chain(stage):
    with pytest.raises(
        ModelError, match=r"no sites are known for Head.*sites=grail\.trace\(model\)"
    ):
        find(randomised(Head(stage())))


@pytest.mark.parametrize("name", UNLISTED)
def test_a_trace_finds_the_sites_of_networks_without_lists_of_blocks(name):
    torch.manual_seed(0)
    model, batches = randomised(UNLISTED[name]()), images()
    sites = grail.trace(model)
    with torch.no_grad():
        for site in sites:
            for consumer in site.consumers:
                model.get_submodule(consumer).weight[:, 1::2] = 0
        dense = model(batches[0])
    grail.compress(model, batches, 0.5, sites, "wanda", multiple=1, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense, rtol=1e-4, atol=1e-4)


def test_what_stands_between_blocks_is_refused_with_the_trace_that_can():
    with pytest.raises(ModelError, match=r"between.*sites=grail\.trace\(model\)"):
        grail.compress(randomised(Pooled(Bottleneck)), images(), 0.5, progress=False)


@pytest.mark.parametrize(
    "name", ["torchvision-basic", "torchvision-mobilenet", "pre-activation", "torchvision-resnext"]
)
def test_synchronised_norms_are_taken_along_as_batch_norms_are(name):
    # In evaluation mode both compute the same, so every weight is the same, to the bit.
    plain = network(name)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    for model in (plain, synchronised):
        grail.compress(model, images(), 0.5, repair=True, progress=False)
    expected = plain.state_dict()
    for key, value in synchronised.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_a_gate_of_linear_layers_reads_and_writes_the_channels(spread):
    for site in sites_of(linearly_gated(spread)):
        layers = [
            [layer.name.split(".", 2)[2] for layer in side]
            for side in (site.producers, site.consumers)
        ]
        assert layers == [["expand", "gate.fc.2"], ["gate.fc.0", "project"]]
        assert [a.name.split(".", 2)[2] for a in site.along] == ["bn1", "depthwise", "bn2"]


def test_a_gate_of_channels_that_leave_the_block_leaves_them_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(7, 11, 1), conv(11, 7, 1)
            self.squeeze, self.excite = nn.Linear(7, 3), nn.Linear(3, 7)

        def forward(self, x):
            b, c = x.shape[:2]
            x = self.second(self.first(x)) + x
            return x * self.excite(self.squeeze(x.mean((2, 3)))).view(b, c, 1, 1)

    model = nn.Sequential(conv(3, 7, 3), nn.Sequential(Outer(), Outer()))
    assert [site.name for site in sites_of(model)] == ["1.0.first", "1.1.first"]


@pytest.mark.parametrize(
    "mix", [lambda x, z: torch.einsum("bchw,bc->bchw", x, z), lambda x, z: x.sort(1)[0]]
)
def test_a_network_without_channels_to_narrow_is_told_the_way_out(mix):
    with pytest.raises(ModelError, match=r"no channels to narrow.*grail\.trace.*grail\.Site"):
        find(linearly_gated(mix))


@pytest.mark.parametrize("empty", [0, 1, 3])
@pytest.mark.parametrize("name", ["torchvision-basic", "timm-inverted-se"])
def test_an_empty_batch_changes_nothing(name, empty):
    batches, reports = images(3), []
    for calibration in (batches, [*batches[:empty], batches[0][:0], *batches[empty:]]):
        report = grail.compress(network(name), calibration, 0.5, progress=False)
        reports.append([(site.error, site.baseline_error, site.tokens) for site in report.sites])
    assert reports[0] == reports[1]
