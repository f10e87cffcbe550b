"""The derivative of a site, against the Jacobian of its layers in fp64."""

import copy

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.algebra.kinds import as_matrix, tokens_read
from grail.calibrate.stream import Stream
from grail.networks import find
from grail.runtime.transaction import eval_no_grad
from grail.statistics.derivative import differentiate, reason_against, signs
from grail.statistics.slopes import Part
from tests.convnets import randomised


class Between(nn.Module):
    """A producer, layers of any kind, and a consumer; something runs before and after."""

    def __init__(self, producer: nn.Module, between: nn.Module, consumer: nn.Module):
        super().__init__()
        self.up, self.between, self.down = producer, between, consumer

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x.tanh()))).sin()


class Gated(nn.Module):
    """Squeeze-and-excite after a depthwise convolution: positions mix, and so do channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.depthwise(x))
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def relu() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace=True))


LAYERS = {
    "padding": lambda: (nn.Conv2d(3, 6, 3, padding=1), relu(), nn.Conv2d(6, 4, 3, padding=1)),
    "strides": lambda: (nn.Conv2d(3, 6, 3, 2, 1), relu(), nn.Conv2d(6, 4, 3, stride=2)),
    "dilation": lambda: (
        nn.Conv2d(3, 6, (1, 3), dilation=(1, 2), bias=False),
        relu(),
        nn.Conv2d(6, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
    ),
    "depthwise": lambda: (nn.Conv2d(3, 6, 1), Gated(6), nn.Conv2d(6, 4, 1)),
    "transposed": lambda: (
        nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1),
        relu(),
        nn.ConvTranspose2d(6, 4, 2),
    ),
    "one axis": lambda: (nn.Conv1d(3, 6, 3), nn.GELU(), nn.Conv1d(6, 4, 3, padding=1)),
    "pooled": lambda: (
        nn.Conv2d(3, 6, 3),
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(6, 4),
    ),
}


def made(name: str) -> tuple[Between, Tensor]:
    torch.manual_seed(0)
    model = randomised(Between(*LAYERS[name]()))
    size = (3, 3, 9) if name == "one axis" else (3, 3, 7, 7)
    return model, torch.randn(size, dtype=torch.float32)


def jacobian(model: Between, x: Tensor) -> Tensor:
    """[outputs, K·D] of the consumer's output by the producer's weight as [K, D], in fp64."""
    model, x = copy.deepcopy(model).double(), x.double()
    producer = model.up
    rows = as_matrix(producer, producer.weight.detach()).flatten(1)
    values = model.up(x.tanh()).detach()

    def output(change: Tensor) -> Tensor:
        along = tokens_read(producer, x.tanh()) @ change.mT
        return model.down(model.between(values + along.movedim(-1, 1).reshape(values.shape)))

    found: Tensor = torch.autograd.functional.jacobian(output, torch.zeros_like(rows))
    return found.flatten(-2).flatten(0, -2)


def site_of(model: Between, x: Tensor) -> tuple[Stream, grail.networks.BoundSite]:
    architecture = find(model, [grail.Site(["up"], ["down"])])
    ((site,),) = architecture.sites(architecture.kinds)
    return Stream(model, architecture.blocks, [x]), site


@pytest.mark.parametrize("name", LAYERS)
def test_both_modes_are_those_of_the_jacobian(name):
    model, x = made(name)
    expected = jacobian(model, x)
    rows = as_matrix(model.up, model.up.weight.detach()).flatten(1)
    change = torch.randn(rows.shape, dtype=torch.float32)
    with eval_no_grad(model):
        stream, site = site_of(model, x)
        assert reason_against(stream, site) == ""
        part = Part(site.producers[0])
        found = differentiate(stream, site, 0, part, lambda own, _: own @ change.mT)
        along = expected @ change.double().flatten()
        torch.testing.assert_close(found.along.double().flatten(), along, **CLOSE)
        y = torch.randn(found.along.shape, dtype=torch.float32)
        back = found.back(y)
        assert not torch.is_grad_enabled()
    got = back.double().flatten(0, -2).mT @ found.x.double().flatten(0, -2)
    torch.testing.assert_close(got.flatten(), expected.mT @ y.double().flatten(), **CLOSE)
    assert all(p.grad is None for p in model.parameters())


def test_a_pass_changes_no_output_and_keeps_the_mode():
    model, x = made("padding")
    with eval_no_grad(model):
        expected = model(x)
        stream, site = site_of(model, x)
        with torch.enable_grad():
            found = differentiate(stream, site, 0, Part(site.producers[0]), signs(0))
            assert torch.is_grad_enabled()
        assert torch.equal(model(x), expected)
        hidden = model.between(model.up(x.tanh()))
    torch.testing.assert_close(found.hidden, hidden)


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REFUSED = {
    "up has no derivative": Undifferentiable.apply,
    "does not depend on up": lambda x: x.detach(),
    "not finite": lambda x: (x * 0).sqrt() + x,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_function_without_a_derivative_is_refused(reason):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), Function(REFUSED[reason]), nn.Conv2d(6, 4, 1)
    model, x = Between(*layers).eval(), torch.randn(2, 3, 6, 6, dtype=torch.float32)
    with eval_no_grad(model):
        assert reason in reason_against(*site_of(model, x))
