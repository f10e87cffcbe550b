"""A block's output in two parts, and the target that a consumer which returns zeros leaves."""

import pytest
import torch
from torch import nn

from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.networks import CalibrationPoint, ResidualProbe
from grail.networks.layers import Consumer
from grail.recipe import Recipe
from grail.runtime.clock import Clock
from grail.statistics.collector import Collector, ignore
from grail.statistics.residual_split import ResidualSplit

CPU = torch.device("cpu")


class Block(nn.Module):
    """An MLP beside a residual stream."""

    def __init__(self, flattens, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.flattens, self.in_place = flattens, in_place

    def forward(self, x):
        y = self.up(x.flatten(0, 1) if self.flattens else x).relu()
        y = self.down(input=y).reshape(x.shape)
        return y.add_(x) if self.in_place else x + y


@pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=str)
def block(request):
    return Block(*request.param)


def collected(block, batches, targets=None, recipe=None):
    """The statistics and the split of one pass."""
    stream = Stream(block, [block], batches)
    collector = Collector(recipe or Recipe(alpha=1e-3), stream, Clock(CPU))
    consumer = Consumer("down", block.down)
    point = CalibrationPoint(name="mlp", block=0, consumers=(consumer,), probe=ResidualProbe())
    held = {} if targets is None else {point: HiddenStates(CPU)}
    for batch, target in enumerate(targets or ()):
        held[point].put(batch, target)
    split = ResidualSplit(consumer, HiddenStates(CPU), HiddenStates(CPU))
    ((part,),) = collector.collect(0, [point], held, ignore, finish=False, split=split).values()
    return part, split


def batches(count=10):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, generator=generator) for _ in range(count)]


@torch.no_grad()
def test_both_parts_add_up_to_the_output_with_any_consumer(block):
    _, split = collected(block, batches())
    assert "forward" not in vars(block.down)
    for number, x in enumerate(batches()):
        assert torch.equal(split.rests[number], x)
        assert torch.equal(split.output(number, torch.arange(6)), block(x))
        assert torch.equal(split.whole(number, x), block(x))
    block.down = nn.Linear(3, 4)
    split = ResidualSplit(Consumer("down", block.down), split.inputs, split.rests)
    kept = torch.tensor([0, 2, 5])
    for number, x in enumerate(batches()):
        expected = x + block.down(block.up(x).relu()[..., kept])
        torch.testing.assert_close(split.output(number, kept), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_target_gives_the_drift_that_the_consumer_lacks(block):
    targets = [block(x) + torch.randn(x.shape) for x in batches()]
    part, _ = collected(block, batches(), targets)
    drift = part.train.drift
    assert drift.of_target
    assert int(drift.tokens) == 80 == part.train.tokens
    cross, total = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for x, target in zip(batches(), targets, strict=True):
        read, lacks = block.up(x).relu().double(), (target - block(x)).double()
        cross += lacks.flatten(0, 1).T @ read.flatten(0, 1)
        total += lacks.flatten(0, 1).sum(0)
    held, weight = part.held_out.drift, block.down.weight.double()
    gram = part.train.matrix().double() + part.held_out.matrix().double()
    sums = part.train.sum.double() + part.held_out.sum.double()
    found = drift.cross.double() + held.cross.double() - weight @ gram
    torch.testing.assert_close(found, cross, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(drift.sum + held.sum - weight @ sums, total, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_tokens_without_a_target_are_weighted_by_the_whole_stream(block):
    point = ResidualProbe(normalised=True)
    stream = Stream(block, [block], batches())
    collector = Collector(Recipe(token_weights=True), stream, Clock(CPU))
    consumer = Consumer("down", block.down)
    site = CalibrationPoint(name="mlp", block=0, consumers=(consumer,), probe=point)
    split = ResidualSplit(consumer, HiddenStates(CPU), HiddenStates(CPU))
    parts = [
        collector.collect(0, [site], {}, ignore, finish=False, split=given)[site][0]
        for given in (None, split)
    ]
    whole, silent = (part.train.matrix() for part in parts)
    torch.testing.assert_close(silent, whole, rtol=1e-5, atol=1e-6)
    assert parts[1].train.drift is None
