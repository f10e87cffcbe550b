"""Producers that are refitted: the rows are those of brute force, the errors the network's."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.algebra.producer_fit import LEAST_WEIGHT
from grail.calibrate.hidden_states import OutputCache
from grail.errors import InputError
from grail.run import producer_refit
from tests.convnets import images
from tests.convnets import network as convnet
from tests.networks.test_families import network  # noqa: F401, a fixture
from tests.reported import (
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
)
from tests.run.test_reported import randomised

# Gated units, of one fused layer too, GELU and ReLU; norms after the consumer; images.
FAMILIES = ["llama", "phi3", "gemma2", "gpt2", "opt", "bert", "vit"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_the_error_of_a_site_narrowed_alone_is_the_networks(family, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_are_those_of_the_network(model, batches[:12], ("mlp",), refit_producers=2)


@every_family
def test_the_errors_of_a_run_are_the_networks(family, network):  # noqa: F811
    model, batches = network(family)
    assert_errors_of_a_run_are_those_of_the_network(
        model, batches[:12], ("mlp",), refit_producers=2
    )


@every_family
def test_errors_fall_and_widths_stay(family, network):  # noqa: F811
    model, batches = network(family)
    reports = [compressed(model, batches, refit_producers=steps)[1] for steps in (0, 2)]
    without, with_refit = ([row.error for row in report.sites] for report in reports)
    assert sum(with_refit) < 0.97 * sum(without)
    kept = [[(row.name, row.kept) for row in report.sites] for report in reports]
    assert kept[0] == kept[1]


def compressed(model, batches, keep=0.5, sites=("mlp",), **settings):
    model = copy.deepcopy(model)
    report = grail.compress(model, batches, keep, sites, progress=False, **settings)
    return model, report


@dataclass
class Seen:
    """What a layer reads and returns for all tokens, [N, …] fp64."""

    x: Tensor
    y: Tensor


@torch.no_grad()
def seen(model: nn.Module, name: str, batches: list[Tensor]) -> Seen:
    found: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(name)
    with layer.register_forward_hook(lambda _, args, y: found.append((args[0], y))):
        for batch in batches:
            model(batch)
    x, y = (
        torch.cat([t.flatten(0, -2) for t in each]).double() for each in zip(*found, strict=True)
    )
    return Seen(x, y)


def textbook(x: Tensor, slope: Tensor, missing: Tensor, consumer: Tensor, steps: int) -> Tensor:
    """The change of a producer's rows by conjugate gradients, in fp64."""
    gram, alpha = x.mT @ x, producer_refit.DAMPING
    strength = alpha * gram.diagonal().mean()
    weights = consumer.square().sum(0) * slope.square().mean(0)
    weights = (weights + LEAST_WEIGHT * weights.mean())[:, None]

    def back(lacking: Tensor) -> Tensor:
        return (slope * (lacking @ consumer)).mT @ x

    def system(rows: Tensor) -> Tensor:
        return back((slope * (x @ rows.mT)) @ consumer.mT) + strength * weights * rows

    inverse = torch.linalg.inv(gram + strength * torch.eye(len(gram), dtype=torch.float64))
    residual = back(missing)
    change, direction = torch.zeros_like(residual), residual @ inverse / weights
    for _ in range(steps):
        size = (residual * (residual @ inverse / weights)).sum()
        seen_by = system(direction)
        length = size / (direction * seen_by).sum()
        change, residual = change + length * direction, residual - length * seen_by
        ready = residual @ inverse / weights
        direction = ready + (residual * ready).sum() / size * direction
    return change


def assert_rows(layer: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(layer.weight.double(), expected, rtol=2e-4, atol=2e-5)


# One block is narrow, nothing drifts and nothing is held out: all steps are taken.
ALONE = {"keep": {"mlp": [0.5, 1.0]}, "alpha": 1e-3, "drift_correction": 0}


@pytest.mark.parametrize("steps", [1, 3])
def test_the_layers_of_a_gated_unit_are_those_of_brute_force(steps, tiny_llama, tiny_batches):
    dense, batches = tiny_llama(), tiny_batches(count=5)
    plain, _ = compressed(dense, batches, **ALONE)
    found, _ = compressed(dense, batches, **ALONE, refit_producers=steps)
    path = "model.layers.0.mlp"
    target = seen(dense, f"{path}.down_proj", batches).y
    gate, up, down = (
        seen(plain, f"{path}.{name}_proj", batches) for name in ("gate", "up", "down")
    )
    consumer = plain.get_submodule(f"{path}.down_proj").weight.double()
    rows = {name: plain.get_submodule(f"{path}.{name}_proj").weight.double() for name in NAMES}
    # The unit is linear in the upper layer, which is therefore first.
    act = nn.functional.silu(gate.y)
    rows["up"] = rows["up"] + textbook(up.x, act, target - down.y, consumer, steps)
    upper = up.x @ rows["up"].mT
    sigmoid = gate.y.sigmoid()
    slope = upper * (sigmoid + gate.y * sigmoid * (1 - sigmoid))
    missing = target - (act * upper) @ consumer.mT
    change = textbook(gate.x, slope, missing, consumer, steps)
    hidden = nn.functional.silu(gate.x @ (rows["gate"] + change).mT) * upper
    lacking = target - hidden @ consumer.mT
    assert lacking.norm() < missing.norm() < (target - down.y).norm()
    rows["gate"] = rows["gate"] + change
    gram = hidden.mT @ hidden
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    rows["down"] = consumer + torch.linalg.solve(gram + ridge, hidden.mT @ lacking).mT
    for name, expected in rows.items():
        assert_rows(found.get_submodule(f"{path}.{name}_proj"), expected)


NAMES = ("gate", "up", "down")


def test_producers_are_fitted_to_so_many_tokens_and_the_consumer_to_all(
    tiny_llama, tiny_batches, monkeypatch
):
    dense, batches = tiny_llama(), tiny_batches(count=6)
    tokens = batches[0].numel()
    monkeypatch.setattr(producer_refit, "TOKENS", 3 * tokens)
    plain, _ = compressed(dense, batches, **ALONE)
    found, _ = compressed(dense, batches, **ALONE, refit_producers=1)
    # Half of the batches, and half of those with a sequence that a run may hold out, 2 and 4.
    spread = [batches[number] for number in (0, 2, 3)]
    path = "model.layers.0.mlp"
    consumer = plain.get_submodule(f"{path}.down_proj").weight.double()
    target, lacked = (seen(each, f"{path}.down_proj", spread).y for each in (dense, plain))
    gate, up = (seen(plain, f"{path}.{name}_proj", spread) for name in ("gate", "up"))
    act = nn.functional.silu(gate.y)
    rows = plain.get_submodule(f"{path}.up_proj").weight.double()
    rows = rows + textbook(up.x, act, target - lacked, consumer, 1)
    assert_rows(found.get_submodule(f"{path}.up_proj"), rows)
    hidden, whole = (
        seen(found, f"{path}.down_proj", batches),
        seen(dense, f"{path}.down_proj", batches),
    )
    gram = hidden.x.mT @ hidden.x
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    change = torch.linalg.solve(gram + ridge, hidden.x.mT @ (whole.y - hidden.x @ consumer.mT)).mT
    assert_rows(found.get_submodule(f"{path}.down_proj"), consumer + change)


def test_all_guard_text_judges_producers(tiny_llama, tiny_batches, monkeypatch):
    batches = tiny_batches(count=8)
    monkeypatch.setattr(producer_refit, "TOKENS", batches[0].numel())
    chosen = []
    fitted = producer_refit._fitted
    monkeypatch.setattr(
        producer_refit, "_fitted", lambda stream: chosen.append(fitted(stream)) or chosen[-1]
    )
    compressed(tiny_llama(), batches[:6], refit_producers=1, guard=batches[6:])
    # One of the batches without a held-out sequence, one of the others, and the guard's two.
    assert {6, 7} < set(chosen[-1])
    assert len(chosen[-1]) == 4


def test_another_function_is_linearised_where_it_is(tiny_model, tiny_batches):
    dense, batches = tiny_model("opt"), tiny_batches(count=5)
    settings = {**ALONE, "keep": {"mlp": [0.5, 1.0]}}
    plain, _ = compressed(dense, batches, **settings)
    found, _ = compressed(dense, batches, **settings, refit_producers=2)
    path = "model.decoder.layers.0"
    target = seen(dense, f"{path}.fc2", batches).y
    upper, down = (seen(plain, f"{path}.{name}", batches) for name in ("fc1", "fc2"))
    layer, consumer = plain.get_submodule(f"{path}.fc1"), plain.get_submodule(f"{path}.fc2")
    slope = (upper.y > 0).double()
    change = textbook(upper.x, slope, target - down.y, consumer.weight.double(), 2)
    assert_rows(found.get_submodule(f"{path}.fc1"), layer.weight.double() + change)
    assert torch.equal(found.get_submodule(f"{path}.fc1").bias, layer.bias)


@pytest.mark.parametrize("factor", [0.0, -3.0], ids=["nothing", "the wrong way"])
def test_a_change_that_does_not_help_is_taken_back(factor, monkeypatch, tiny_llama, tiny_batches):
    fit = producer_refit.conjugate_gradients

    def wrong(*args, **settings):
        found = fit(*args, **settings)
        return type(found)(factor * found.change, found.steps, found.errors)

    monkeypatch.setattr(producer_refit, "conjugate_gradients", wrong)
    model, batches = tiny_llama(), tiny_batches(count=5)
    expected, report = compressed(model, batches)
    found, others = compressed(model, batches, refit_producers=2)
    assert [row.error for row in report.sites] == [row.error for row in others.sites]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_half_of_a_change_is_tried(monkeypatch, tiny_model, tiny_batches):
    fit, tried = producer_refit.conjugate_gradients, []

    def too_far(*args, **settings):
        found = fit(*args, **settings)
        tried.append(3 * found.change)
        return type(found)(tried[-1], found.steps, found.errors)

    monkeypatch.setattr(producer_refit, "conjugate_gradients", too_far)
    monkeypatch.setattr("grail.run.peak_memory.predict", lambda *_, **__: None)
    dense, batches = tiny_model("opt"), tiny_batches(count=5)
    plain, _ = compressed(dense, batches, **ALONE)
    found, _ = compressed(dense, batches, **ALONE, refit_producers=2)
    (change,) = tried
    before, after = (m.get_submodule("model.decoder.layers.0.fc1").weight for m in (plain, found))
    torch.testing.assert_close(after, before + change / 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"sites": ("heads", "mlp")}, {"quantize": "q8_0"}, {"selector": "wanda++"}],
    ids=str,
)
def test_a_run_does_not_depend_on_where_things_wait(
    settings, monkeypatch, tiny_llama, tiny_batches
):
    """With and without the block's output in two parts, and the outputs of attention."""
    model, batches = tiny_llama(hidden_size=96, head_dim=16), tiny_batches(count=5)
    found, report = compressed(model, batches, refit_producers=2, **settings)
    finisher = "grail.run.finishing.BlockFinisher.split"
    monkeypatch.setattr(finisher, lambda *_: None)
    monkeypatch.setattr(OutputCache, "replaying", lambda *_: nullcontext())
    other, others = compressed(model, batches, refit_producers=2, **settings)
    for row, expected in zip(report.sites, others.sites, strict=True):
        assert row.error == pytest.approx(expected.error, rel=1e-3)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=2e-2, atol=2e-3)


def test_sites_of_other_kinds_keep_their_producers(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=5)
    keep, sites = {"mlp": 0.5, "heads": 0.7}, ("mlp", "heads")
    report = compressed(model, batches, keep, sites, refit_producers=1)[1]
    (note,) = [note for note in report.notes if "not refitted" in note]
    assert "self_attn: its producers were not refitted: its heads are no single channels" in note


class Mixed(nn.Module):
    """An activation whose channels are mixed, or not, between producer and consumer."""

    def __init__(self, function):
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 22), nn.Linear(22, 5), function

    def forward(self, x):
        return self.down(self.function(self.up(x)))


def between(function) -> tuple[nn.Module, list[Tensor], list[grail.Site]]:
    model = randomised(Mixed(function))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bias in (model.up.bias, model.down.bias):  # as drawn it depends on the tests before
            bias.copy_(torch.randn(bias.shape, generator=generator, dtype=torch.float32))
    batches = [torch.randn(40, 6, generator=generator) for _ in range(6)]
    return model, batches, [grail.Site(["up"], ["down"])]


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()


def test_a_function_without_a_slope_is_left_alone():
    model, batches, sites = between(Undifferentiable.apply)
    report = compressed(model, batches, 0.5, sites, refit_producers=1)[1]
    assert any("not refitted: up has no slope" in note for note in report.notes)


FUNCTIONS = {
    "tanh": torch.tanh,
    "sine": lambda h: 2 * h.sin(),
    "square": torch.square,
    "a kink": lambda h: torch.where(h > 0.3, h, 0.3 * h + 0.21),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_any_function_of_single_channels_is_followed(function):
    model, batches, sites = between(function)
    settings = {"alpha": 1e-3, "drift_correction": 0}  # nothing is held out
    reports = [
        compressed(model, batches, 0.5, sites, refit_producers=steps, **settings)[1]
        for steps in (0, 2)
    ]
    before, after = (report.sites[0].error for report in reports)
    assert after < before
    assert not any("not refitted" in note for note in reports[1].notes)


def test_a_run_without_a_site_to_refit_is_refused(tiny_llama, tiny_model, tiny_batches):
    runs = {
        "its layers are convolutions": (convnet("torchvision-basic"), images(), None),
        "its heads are no single channels": (tiny_llama(), tiny_batches(), ("heads",)),
        "a router chose": (tiny_model("mixtral"), tiny_batches(), ("experts",)),
    }
    for reason, (model, batches, sites) in runs.items():
        with pytest.raises(InputError, match=f"refit_producers is for sites of linear.*{reason}"):
            compressed(model, batches, 0.5, sites, refit_producers=1)


@pytest.mark.parametrize(
    ("settings", "clash"),
    [
        ({"closed_loop": False}, "closed_loop=False"),
        ({"compensate": False}, "compensate=False"),
        ({"fit_bias": True}, "fit_bias=True"),
        ({"token_weights": True}, "token_weights=True"),
        ({"non_finite": "drop"}, "non_finite='drop'"),
        ({"dense_share": 0.5}, r"dense_share=0\.5"),
        ({"selector": "folding"}, "selector='folding', which folds"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_it_are_refused(settings, clash):
    with pytest.raises(InputError, match=f"refit_producers=3 does not go with {clash}; choose"):
        grail.Recipe(refit_producers=3, **settings)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "3", None])
def test_steps_are_a_whole_number(steps):
    with pytest.raises(InputError, match="refit_producers"):
        grail.Recipe(refit_producers=steps)


def test_a_selector_of_ones_own_that_folds_is_refused(tiny_llama, tiny_batches):
    def folds(view):
        return grail.Folding([h % view.width.kept for h in range(view.width.channels)])

    with pytest.raises(InputError, match="refit_producers is for selectors that keep channels"):
        compressed(tiny_llama(), tiny_batches(), selector=folds, refit_producers=1)
