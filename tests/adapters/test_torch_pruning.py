"""The adapter of Torch-Pruning, against the real library."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

tp = pytest.importorskip("torch_pruning")

import grail  # noqa: E402
from bench.adapters.torch_pruning_resnet import without_operators  # noqa: E402
from grail.adapters.torch_pruning import compensate, prune, sites_of  # noqa: E402
from grail.algebra.kinds import tokens_read  # noqa: E402
from grail.errors import (  # noqa: E402
    EmptyCalibrationError,
    InputError,
    ModelError,
    NonFiniteError,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(*shape, count):
    """Images of few causes, so that channels are correlated, as a trained network's are."""
    causes = 16
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(causes, torch.Size(shape).numel(), generator=generator) / causes**0.5
    noise = torch.randn(count, mix.shape[1]) * 0.1
    return (torch.randn(count, causes) @ mix + noise).view(count, *shape)


def settled(model, batches):
    """Random slopes and offsets, and batch norms that have seen data."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    model.train()
    with torch.no_grad():
        for batch in batches * 3:
            model(batch)
    return model.eval()


def flattened():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(24 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def resnet18():
    without_operators()
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def densenet121():
    without_operators()
    import torchvision

    return torchvision.models.densenet121(num_classes=10)


def vit():
    without_operators()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=10)


class Output(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


def hf_vit():
    without_operators()
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ViTConfig(
        **sizes, image_size=32, patch_size=8, intermediate_size=96, initializer_range=0.1
    )
    config.num_labels = 10
    return Output(ViTForImageClassification(config))


def heads_of(model):
    names = ("qkv", "q_proj", "k_proj", "v_proj")
    return {m: 3 for name, m in model.named_modules() if name.rpartition(".")[2] in names}


def pruner_of(model, ratio=0.5, ignored=(), example=None):
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return tp.pruner.BasePruner(
        model,
        example if example is not None else images(3, 32, 32, count=2),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[head, *ignored],
        num_heads=heads_of(model),
    )


def head_sizes(pruner):
    """What a user of Torch-Pruning writes after a step that narrows attention of timm or HF."""
    for module in pruner.model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
        if hasattr(module, "q_proj"):
            module.head_dim = module.q_proj.out_features // pruner.num_heads[module.q_proj]


def plainly(model, batches, **options):
    pruner = pruner_of(model, **options)
    for group in pruner.step(interactive=True):
        group.prune()
        head_sizes(pruner)


def compensated(model, batches, **options):
    pruner = pruner_of(model, **options)
    for group in pruner.step(interactive=True):
        assert not compensate(model, group, batches).skipped
        group.prune()
        head_sizes(pruner)


def in_one_line(model, batches, **options):
    assert not prune(pruner_of(model, **options), batches, progress=False).skipped


def forms(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def output_errors(dense, ways, batches, ignored=()):
    """Output errors on other images of a dense network after each way; all of equal shapes."""
    x, errors, shapes = images(3, 32, 32, count=64), [], []
    y = outputs(dense, x)
    for way in ways:
        model = copy.deepcopy(dense)
        way(model, batches, ratio=0.3, ignored=[model.get_submodule(name) for name in ignored])
        errors.append(((outputs(model, x) - y).norm() / (y - y.mean(0)).norm()).item())
        shapes.append(forms(model))
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0] != forms(dense)
    return errors


@torch.no_grad()
def outputs(model, x):
    return model(x)


@pytest.mark.parametrize("make", [flattened, resnet18, vit, hf_vit])
def test_the_output_error_is_below_plain_pruning_at_equal_parameters(make):
    batches = list(images(3, 32, 32, count=192).split(24))
    dense = settled(make(), batches)
    plain, between, line = output_errors(dense, (plainly, compensated, in_one_line), batches)
    assert between < 0.9 * plain
    assert line < 0.75 * plain


def test_densenet_reads_concatenations():
    batches = list(images(3, 32, 32, count=64).split(32))
    dense = settled(densenet121(), batches)
    pruned = ("denseblock4.denselayer16", "denseblock4.denselayer15", "denseblock4.denselayer9.")
    left = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, nn.Conv2d) and not any(part in name for part in pruned)
    ]
    plain, between, line = output_errors(dense, (plainly, compensated, in_one_line), batches, left)
    assert between < 0.8 * plain
    assert line < 0.8 * plain


def test_drift_is_corrected_by_prune():
    batches = list(images(3, 32, 32, count=192).split(24))
    dense = settled(vit(), batches)
    between, line = output_errors(dense, (compensated, in_one_line), batches)
    assert line < 0.7 * between


# The weights, against fp64.


def seen_by(model, name, batches):
    """What a layer reads and returns, in fp64."""
    read, returned = [], []
    twin = copy.deepcopy(model).double().eval()

    def look(_, args, y):
        read.append(args[0])
        returned.append(y)

    twin.get_submodule(name).register_forward_hook(look)
    with torch.no_grad():
        for batch in batches:
            twin(batch.double())
    return torch.cat(read), torch.cat(returned)


def ridge(x, target, baseline, alpha, bias=False):
    """W₀ + (T − W₀X)Xᵀ(XXᵀ + λI)⁻¹ of tokens [N, K], [N, O], and the bias, in fp64."""
    x, target = x.double().flatten(0, -2), target.double().flatten(0, -2)
    mean_x = x.mean(0) if bias else torch.zeros_like(x[0])
    mean_t = target.mean(0) if bias else torch.zeros_like(target[0])
    x, target = x - mean_x, target - mean_t
    gram = x.T @ x
    lam = alpha * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    right = (target - x @ baseline.double().T).T @ x
    weight = baseline.double() + torch.linalg.solve(gram + lam, right.T).T
    return weight, mean_t - weight @ mean_x


def off(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def group_of(model, name, lost, example):
    graph = tp.DependencyGraph().build_dependency(model, example, verbose=False)
    module = model.get_submodule(name)
    conv = isinstance(module, nn.Conv2d)
    pruning = tp.prune_conv_out_channels if conv else tp.prune_linear_out_channels
    return graph.get_pruning_group(module, pruning, lost)


def stay(count, lost):
    return [n for n in range(count) if n not in lost]


LOST = [1, 2, 5, 11]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("producer", "consumer", "taps"), [("0", "4", 9), ("4", "8", 16), ("8", "10", 1)]
)
def test_restored_columns_are_the_ridge_solution(producer, consumer, taps, bias):
    batches = list(images(3, 32, 32, count=480).split(32))
    model = settled(flattened(), batches)
    dense = copy.deepcopy(model)
    group = group_of(model, producer, LOST, batches[0][:1])
    # Means are far larger than deviations here, so that centring costs digits of fp32 sums.
    alpha = 0.1 if bias else 1e-2
    compensate(model, group, batches, alpha=alpha, fit_bias=bias, per_tap=True)
    layer, old = model.get_submodule(consumer), dense.get_submodule(consumer)
    x, y = seen_by(dense, consumer, batches)
    channels = model.get_submodule(producer).weight.shape[0]
    kept = stay(channels, LOST)
    columns = torch.cat([torch.arange(n * taps, (n + 1) * taps) for n in kept])
    tokens = tokens_read(old, x)[..., columns]
    target = (y.flatten(2).movedim(1, -1) if y.dim() == 4 else y) - old.bias.double()
    flat, was = layer.weight.detach().flatten(1), old.weight.detach().flatten(1)
    expected, shift = ridge(tokens, target, was[:, columns], alpha, bias)
    assert off(flat[:, columns], expected) < 1e-4
    if bias:
        assert off(layer.bias.detach(), old.bias.detach().double() + shift) < 1e-3
    else:
        assert torch.equal(layer.bias, old.bias)
    others = torch.ones(flat.shape[1], dtype=torch.bool)
    others[columns] = False
    assert torch.equal(flat[:, others], was[:, others])
    untouched = {n for n in dense.state_dict() if not n.startswith(f"{consumer}.")}
    assert all(torch.equal(model.state_dict()[n], dense.state_dict()[n]) for n in untouched)
    group.prune()
    assert torch.equal(model.get_submodule(consumer).weight.flatten(1), flat[:, columns])


@pytest.mark.parametrize(("producer", "consumer"), [("0", "4"), ("4", "8")])
def test_one_map_of_channels_for_all_taps(producer, consumer):
    batches = list(images(3, 32, 32, count=160).split(32))
    model = settled(flattened(), batches)
    dense = copy.deepcopy(model)
    group = group_of(model, producer, LOST, batches[0][:1])
    compensate(model, group, batches, alpha=1e-2, fit_bias=False, per_tap=False)
    layer, old = model.get_submodule(consumer), dense.get_submodule(consumer)
    x, _ = seen_by(dense, consumer, batches)
    channels = model.get_submodule(producer).weight.shape[0]
    kept = stay(channels, LOST)
    every = x.movedim(1, -1) if x.dim() == 4 else x.unflatten(1, (channels, -1)).movedim(1, -1)
    chosen = torch.eye(channels, dtype=torch.float64)[:, kept]
    mapped, _ = ridge(every[..., kept], every, chosen, 1e-2)

    def by_channel(weight):
        return weight.detach().double().reshape(len(weight), channels, -1)

    expected = torch.einsum("oht,hk->okt", by_channel(old.weight), mapped)
    assert off(by_channel(layer.weight)[:, kept], expected) < 1e-4


def test_few_tokens_choose_one_map_and_many_every_column():
    batches = list(images(3, 32, 32, count=480).split(32))
    dense = settled(flattened(), batches)

    def weight(batches, per_tap):
        model = copy.deepcopy(dense)
        compensate(model, group_of(model, "4", LOST, batches[0][:1]), batches, per_tap=per_tap)
        return model[8].weight

    # 320 columns stay.
    assert torch.equal(weight(batches, "auto"), weight(batches, True))
    assert torch.equal(weight(batches[:2], "auto"), weight(batches[:2], False))


class Branches(nn.Module):
    """Two producers, concatenated for one consumer; the first is read by another one, too."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 14, 3, padding=1)
        self.both, self.alone = nn.Conv2d(26, 8, 3), nn.Conv2d(12, 8, 3, stride=2)
        self.after = nn.Linear(16, 10)

    def forward(self, x):
        one, two = torch.relu(self.one(x)), torch.relu(self.two(x))
        both = self.both(torch.cat([one, two], 1)).relu().mean((2, 3))
        return self.after(torch.cat([both, self.alone(one).relu().mean((2, 3))], 1))


def test_offsets_of_a_concatenation_and_several_consumers():
    batches = list(images(3, 12, 12, count=160).split(32))
    dense = settled(Branches(), batches)
    for producer, offset, consumers in (("one", 0, ("both", "alone")), ("two", 12, ("both",))):
        model = copy.deepcopy(dense)
        group = group_of(model, producer, LOST, batches[0][:1])
        restored = compensate(model, group, batches, alpha=1e-2, fit_bias=False)
        assert set(restored.errors) == set(consumers)
        assert all(after < before for before, after in restored.errors.values())
        for name in consumers:
            old = dense.get_submodule(name)
            x, y = seen_by(dense, name, batches)
            kept = stay(old.in_channels, [n + offset for n in LOST])
            target = y.flatten(2).movedim(1, -1) - old.bias.double()
            tokens = tokens_read(old, x).unflatten(-1, (-1, 9))[..., kept, :].flatten(-2)
            was = old.weight.detach()[:, kept].flatten(1)
            expected, _ = ridge(tokens, target, was, 1e-2)
            found = model.get_submodule(name).weight.detach()[:, kept].flatten(1)
            assert off(found, expected) < 1e-4
        group.prune()
        assert model(batches[0]).shape == (32, 10)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 12, 3, groups=2)
        self.after = nn.Linear(12, 10)

    def forward(self, x):
        return self.after(self.grouped(self.before(x).relu()).relu().mean((2, 3)))


def test_a_grouped_convolution_is_fitted_by_group():
    batches = list(images(3, 12, 12, count=160).split(32))
    model = settled(Grouped(), batches)
    dense = copy.deepcopy(model)
    group = group_of(model, "before", [1, 3, 9, 11], batches[0][:1])
    restored = compensate(model, group, batches, alpha=1e-2, fit_bias=False)
    assert set(restored.errors) == {"grouped"}
    old, kept = dense.grouped, stay(8, [1, 3])
    x, y = seen_by(dense, "grouped", batches)
    target = (y - old.bias.double()[:, None, None]).flatten(2).movedim(1, -1)
    tokens = tokens_read(old, x).unflatten(-1, (8, 9))[..., kept, :].flatten(-2)
    for part in range(2):
        rows = slice(part * 6, part * 6 + 6)
        was = old.weight.detach()[rows][:, kept].flatten(1)
        expected, _ = ridge(tokens[..., part, :], target[..., rows], was, 1e-2)
        found = model.grouped.weight.detach()[rows][:, kept].flatten(1)
        assert off(found, expected) < 1e-4


def test_a_grouped_convolution_that_loses_other_channels_in_each_group_is_left_alone():
    batches = [images(3, 12, 12, count=32)]
    model = settled(Grouped(), batches)
    before = copy.deepcopy(model.state_dict())
    restored = compensate(model, group_of(model, "before", [1, 3, 8, 9], batches[0]), batches)
    assert not restored.errors
    assert "loses other channels in each" in restored.skipped["grouped"]
    assert same(model, before)


class Swapping(nn.Module):
    """Two layers read one tensor, in another order in every second batch."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(12, 16), nn.Linear(8, 4)
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 8)
        self.turn = 0

    def forward(self, x):
        x, self.turn = self.before(x).tanh(), self.turn + 1
        layers = (self.one, self.two) if self.turn % 2 else (self.two, self.one)
        return self.after(torch.relu(layers[0](x) + layers[1](x)))


def test_layers_that_read_one_tensor_get_their_own_outputs():
    batches = list(images(12, count=160).split(32))
    model = settled(Swapping(), batches)
    dense, kept = copy.deepcopy(model), stay(16, LOST)
    group = group_of(model, "before", LOST, batches[0][:1])
    errors = compensate(model, group, batches, alpha=1e-2, fit_bias=False).errors
    assert errors["one"] == errors["two"]  # of one fit
    for name in ("one", "two"):
        old = dense.get_submodule(name)
        x, y = seen_by(dense, name, batches)
        expected, _ = ridge(x[..., kept], y - old.bias.double(), old.weight.detach()[:, kept], 1e-2)
        assert off(model.get_submodule(name).weight.detach()[:, kept], expected) < 1e-4


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(12, 24), nn.LayerNorm(24)
        self.read, self.after = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.after(self.read(self.norm(self.embed(x).tanh())).relu())


def test_a_layer_norm_of_fewer_channels_is_what_its_reader_is_fitted_to():
    batches = list(images(10, 12, count=160).split(32))
    model = settled(Normalised(), batches)
    dense, kept = copy.deepcopy(model), stay(24, LOST)
    group = group_of(model, "embed", LOST, batches[0][:1])
    compensate(model, group, batches, alpha=1e-2, fit_bias=False)
    inside, _ = seen_by(dense, "norm", batches)
    norm = dense.norm
    weight, bias = (t.detach().double()[kept] for t in (norm.weight, norm.bias))
    x = F.layer_norm(inside[..., kept], (len(kept),), weight, bias, norm.eps)
    _, y = seen_by(dense, "read", batches)
    target = y - dense.read.bias.double()
    expected, _ = ridge(x, target, dense.read.weight.detach()[:, kept], 1e-2)
    assert off(model.read.weight.detach()[:, kept], expected) < 1e-4


def test_a_shift_goes_into_the_batch_norm_of_a_layer_without_a_bias():
    batches = list(images(3, 12, 12, count=160).split(32))
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    dense = copy.deepcopy(settled(model, batches))
    compensate(model, group_of(model, "0", LOST, batches[0][:1]), batches, alpha=1e-2)
    x, y = seen_by(dense, "2", batches)
    kept = stay(16, LOST)
    tokens = tokens_read(dense[2], x).unflatten(-1, (16, 9))[..., kept, :].flatten(-2)
    was = dense[2].weight.detach()[:, kept].flatten(1)
    expected, shift = ridge(tokens, y.flatten(2).movedim(1, -1), was, 1e-2, bias=True)
    assert off(model[2].weight.detach()[:, kept].flatten(1), expected) < 1e-4
    assert off(model[3].running_mean, dense[3].running_mean.double() - shift) < 1e-4
    assert torch.equal(model[3].running_var, dense[3].running_var)


def test_transposed_convolutions_and_bf16():
    batches = list(images(3, 12, 12, count=160).split(32))
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, stride=2)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        dense = settled(copy.deepcopy(model), batches).to(dtype)
        inputs = [batch.to(dtype) for batch in batches]
        errors = []
        for restores in (False, True):
            narrow = copy.deepcopy(dense)
            group = group_of(narrow, "0", LOST, inputs[0][:1])
            if restores:
                found = compensate(narrow, group, inputs).errors["2"]
                assert found[1] < 0.8 * found[0]
            group.prune()
            assert narrow[2].weight.dtype == dtype
            with torch.no_grad():
                hidden = [part[:3](inputs[0]).double() for part in (narrow, dense)]
            errors.append((hidden[0] - hidden[1]).norm().item())
        assert errors[1] < 0.8 * errors[0]


# What it leaves as it was.


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[n], before[n]) for n in before)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_group_without_consumers_needs_no_run():
    model = flattened().eval()
    before = copy.deepcopy(model.state_dict())
    group = group_of(model, "10", [0, 3], images(3, 32, 32, count=1))
    restored = compensate(model, group, [torch.zeros(1, 1)])  # no input of the model
    assert (restored.errors, restored.skipped) == ({}, {})
    assert same(model, before)


def test_modes_and_batch_norms_stay():
    batches = list(images(3, 32, 32, count=64).split(32))
    model = settled(flattened(), batches)
    group = group_of(model, "0", LOST, batches[0][:1])
    model.train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    norms = copy.deepcopy(model[1].state_dict())
    compensate(model, group, batches)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model[1].state_dict()[name], norms[name]) for name in norms)
    assert hooks(model) == 0
    pruner = pruner_of(model)
    model.train()
    prune(pruner, batches, progress=False)
    assert all(m.training for m in model.modules())
    assert hooks(model) == 0
    assert int(model[1].num_batches_tracked) == int(norms["num_batches_tracked"])


def test_alpha_is_chosen_on_held_out_batches():
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    batches, x, errors = list(torch.randn(60, 40).split(12)), torch.randn(500, 40), {}
    for alpha in ("auto", 1e-3):
        model = copy.deepcopy(dense)
        group = group_of(model, "0", [*LOST, 20, 30, 40, 50], batches[0])
        compensate(model, group, batches, alpha=alpha)
        group.prune()
        errors[alpha] = (outputs(model, x) - outputs(dense, x)).norm().item()
    assert errors["auto"] < 0.95 * errors[1e-3]


def test_parameters_stay_the_same_objects():
    batches = [images(3, 32, 32, count=64)]
    model = settled(flattened(), batches)
    weight = model[4].weight
    weight.grad = torch.ones_like(weight)
    compensate(model, group_of(model, "0", LOST, batches[0][:1]), batches)
    assert model[4].weight is weight
    assert weight.requires_grad
    assert weight.grad is not None


def test_the_forward_ends_after_the_last_reader():
    batches = list(images(3, 32, 32, count=96).split(32))
    model = settled(flattened(), batches)
    calls = Counter()
    for name in ("4", "8"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    group = group_of(model, "0", LOST, batches[0][:1])
    calls.clear()
    compensate(model, group, batches)
    assert calls == {"4": 4, "8": 1}  # one batch is run whole, to see what reads


NAN = torch.full((2, 3, 32, 32), torch.nan)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], EmptyCalibrationError, "batches is empty"),
        (torch.zeros(2, 3, 32, 32), InputError, "list"),
        ([images(3, 32, 32, count=2), NAN], NonFiniteError, "NaN"),
        ([torch.zeros(2, 3, 32, 32, device="meta")], InputError, "meta device"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], InputError, "leave labels out"),
        (["text"], InputError, "a batch must be"),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(batches, error, says):
    model = flattened().eval()
    group = group_of(model, "0", LOST, images(3, 32, 32, count=1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        compensate(model, group, batches)
    assert same(model, before)
    assert hooks(model) == 0
    pruner = pruner_of(model)
    with pytest.raises(error, match=says):
        prune(pruner, batches, progress=False)
    assert same(model, before)
    assert hooks(model) == 0


def test_bad_arguments():
    model, batches = flattened().eval(), [images(3, 32, 32, count=8)]
    group = group_of(model, "0", LOST, batches[0][:1])
    with pytest.raises(InputError, match="another"):
        compensate(flattened(), group, batches)
    with pytest.raises(InputError, match="interactive=True"):
        compensate(model, [1], batches)
    with pytest.raises(InputError, match="alpha"):
        compensate(model, group, batches, alpha=-1)
    with pytest.raises(InputError, match="per_tap"):
        compensate(model, group, batches, per_tap="all")
    with pytest.raises(InputError, match="pruner or a DependencyGraph"):
        sites_of(model)


def test_a_weight_of_two_layers_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.three.weight = self.two.weight

        def forward(self, x):
            return self.three(self.two(self.one(x).relu()).relu())

    model, batches = Tied().eval(), [torch.randn(64, 8)]
    group = group_of(model, "one", [1, 2], batches[0])
    assert compensate(model, group, batches).skipped == {
        "two": "its weight is that of another layer, too"
    }


def test_batches_of_every_form():
    x = images(3, 32, 32, count=64)
    dense = settled(hf_vit(), [x])
    name = next(n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and "fc1" in n)
    reader = name.replace("fc1", "fc2")
    weights = []
    for batches in (
        list(x.split(32)),
        iter(x.split(32)),
        [(part,) for part in x.split(32)],
        [{"pixel_values": part} for part in x.split(32)],
    ):
        model = copy.deepcopy(dense)
        compensate(model, group_of(model, name, LOST, x[:1]), batches)
        weights.append(model.get_submodule(reader).weight)
    assert not torch.equal(weights[0], dense.get_submodule(reader).weight)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


# In one line.


def test_prune_sets_the_sizes_of_heads_and_calls_update():
    batches = list(images(3, 32, 32, count=64).split(32))
    model, seen = settled(vit(), batches), []
    restored = prune(pruner_of(model), batches, progress=False, update=seen.append)
    assert seen == [model]
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (3, 8, 24)
    assert attention.scale == 16**-0.5
    assert all(after <= before for before, after in restored.errors.values())


def test_a_pruned_network_that_does_not_run_is_said():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)
            self.size = 8

        def forward(self, x):
            return self.two(self.one(x).view(-1, self.size))

    batches = [torch.randn(64, 8)]
    with pytest.raises(ModelError, match=r"does not run.*update"):
        prune(pruner_of(Fixed().eval(), example=batches[0]), batches, progress=False)
    model = Fixed().eval()

    def update(model):
        model.size = model.one.out_features

    restored = prune(pruner_of(model, example=batches[0]), batches, progress=False, update=update)
    assert set(restored.errors) == {"two"}


def test_several_steps():
    batches = list(images(3, 32, 32, count=96).split(32))
    model = settled(flattened(), batches)
    pruner = tp.pruner.BasePruner(
        model,
        batches[0][:1],
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model[10]],
    )
    for width in (12, 8):
        prune(pruner, batches, progress=False)
        assert model[0].out_channels == width


# Sites.


def test_sites_of_a_convnet_with_a_flatten():
    model = flattened().eval()
    sites = sites_of(pruner_of(model))
    assert [(site.written, site.consumers, site.along) for site in sites] == [
        (("0",), ("4",), ("1",)),
        (("4",), ("8",), ()),
        (("8",), ("10",), ()),
    ]
    assert sites.refused == {}
    graph = tp.DependencyGraph().build_dependency(model, images(3, 32, 32, count=1))
    assert sites_of(graph) == sites
    assert sites_of(graph).refused == {"10": "the network's output"}
    assert len(sites_of(graph, ignored=[model[0]])) == 2


def test_sites_are_what_compress_takes():
    batches = list(images(3, 32, 32, count=96).split(32))
    model = settled(flattened(), batches)
    sites = sites_of(pruner_of(model))
    grail.compress(model, batches, keep=0.5, multiple=1, sites=sites, progress=False)
    assert [model[n].weight.shape[0] for n in (0, 4, 8)] == [8, 12, 32]
    assert model(batches[0]).shape == (32, 10)


class Twice(nn.Module):
    """A layer reads each channel twice, in columns that lie H apart."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(12, 4)

    def forward(self, x):
        hidden = self.one(x)
        return self.two(torch.cat([hidden.relu(), hidden.tanh()], 1))


def test_a_concatenation_is_no_flatten():
    graph = tp.DependencyGraph().build_dependency(Twice(), torch.randn(2, 8), verbose=False)
    found = sites_of(graph)
    assert found == []
    assert found.reasons == {"an index map": 1, "the network's output": 1}


@pytest.mark.parametrize(
    ("make", "count", "reasons"),
    [
        (resnet18, 12, {}),
        (densenet121, 58, {"an index map": 62}),
        (vit, 3, {"attention": 3, "a norm over channels": 1}),
        (Grouped, 1, {"a grouped convolution": 1}),
    ],
)
def test_what_a_site_cannot_say_has_a_reason(make, count, reasons):
    model = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sites_of(pruner_of(model))
    assert len(found) == count
    assert found.reasons == reasons
