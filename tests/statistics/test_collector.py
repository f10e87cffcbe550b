import pytest
import torch
from torch import nn

from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks import CalibrationPoint, ResidualProbe
from grail.networks.layers import Consumer
from grail.recipe import Recipe
from grail.runtime.clock import Clock
from grail.statistics.collector import Collector, ignore
from grail.statistics.observing import watch
from tests.hooks import hooks_of

PLAIN = Recipe(alpha=1e-3, drift_correction=0)


class Block(nn.Module):
    """An MLP beside a residual stream, and a layer after it."""

    def __init__(self, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.after, self.times, self.ran = nn.Linear(4, 4), times, 0

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.down(self.up(x).relu())
        x = self.after(x)
        self.ran += 1
        return x


def point_of(block, output=False):
    probe = ResidualProbe(None if output else block.after)
    return CalibrationPoint(
        name="mlp", block=0, consumers=(Consumer("down", block.down),), probe=probe
    )


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 4, generator=generator) for _ in range(count)]


def states(tensors):
    held = HiddenStates(torch.device("cpu"))
    for batch, tensor in enumerate(tensors):
        held.put(batch, tensor)
    return held


def passes(block, given, recipe=PLAIN):
    stream = Stream(block, [block], given)
    return stream, Collector(recipe, stream, Clock(stream.device))


@torch.no_grad()
def test_statistics_are_those_of_what_the_consumer_reads():
    block = Block()
    stream, collector = passes(block, batches())
    done = []
    point = point_of(block)
    ((part,),) = collector.collect(0, [point], {}, done.append, finish=False).values()
    tokens = torch.cat([block.up(x).relu().flatten(0, 1) for x in batches()]).double()
    # Sums of fp32 products, in any order.
    bound = 16 * torch.finfo(torch.float32).eps * (tokens.abs().T @ tokens.abs())
    assert ((part.train.matrix().double() - tokens.T @ tokens).abs() <= bound).all()
    assert part.tokens == 30
    assert done == [10, 10, 10]
    assert all(map(torch.equal, stream.hidden, batches()))


@torch.no_grad()
def test_only_the_first_batch_runs_to_its_end_unless_the_stream_moves():
    block = Block()
    stream, collector = passes(block, batches())
    block.ran = 0
    collector.collect(0, [point_of(block)], {}, ignore, finish=False)
    assert block.ran == 1
    collector.collect(0, [point_of(block)], {}, ignore, finish=True)
    assert block.ran == 4
    assert all(torch.equal(h, block(x)) for h, x in zip(stream.hidden, batches(), strict=True))


@torch.no_grad()
def test_a_target_gives_the_drift_that_the_consumer_lacks():
    block, dense = Block(), Block()
    _, collector = passes(block, batches())
    point = point_of(block)
    targets = {point: states(x + dense.down(dense.up(x).relu()) + 0.5 for x in batches())}
    ((part,),) = collector.collect(0, [point], targets, ignore, finish=False).values()
    # 0.5 for each of 30 tokens and 4 outputs.
    assert part.train.drift.energy == pytest.approx(30 * 4 * 0.25, rel=1e-5)


@torch.no_grad()
def test_a_consumer_that_runs_twice_is_refused_in_every_mode():
    block = Block(times=2)
    _, collector = passes(block, batches())
    point = point_of(block)
    for targets in ({}, {point: states(batches())}):
        with pytest.raises(ModelError, match="down runs more than once for a batch"):
            collector.collect(0, [point], targets, ignore, finish=False)
    assert not hooks_of(block.down)


@torch.no_grad()
def test_a_followed_stream_holds_what_its_probes_showed_and_moves_on():
    block = Block()
    stream, collector = passes(block, batches(), Recipe())
    dense = stream.fork()
    inside, at_output = point_of(block), point_of(block, output=True)
    held = collector.follow(dense, 0, [inside, at_output], ignore)
    for number, x in enumerate(batches()):
        assert torch.equal(held[inside][number], x + block.down(block.up(x).relu()))
        assert torch.equal(held[at_output][number], block(x))
    assert held[at_output] is dense.hidden
    assert all(map(torch.equal, stream.hidden, batches()))


@torch.no_grad()
def test_the_next_block_uses_the_memory_of_the_one_before():
    block = Block()
    stream, collector = passes(block, batches(), Recipe())
    dense, point = stream.fork(), point_of(block)
    first, second = (collector.follow(dense, 0, [point], ignore)[point] for _ in range(2))
    assert first is second
    assert collector.follow(dense.fork(), 0, [point], ignore)[point] is not first


@torch.no_grad()
def test_a_probe_is_observed_only_after_the_consumer_has_run():
    block, shown = Block(), []
    point = CalibrationPoint(
        name="mlp",
        block=0,
        consumers=(Consumer("down", block.down),),
        probe=ResidualProbe(block.up),  # runs before
    )
    with watch(point, block, None, shown.append):
        block(batches()[0])
    assert not shown


@torch.no_grad()
def test_experts_are_observed_even_if_they_get_no_token():
    block, shown = Block(), []
    block.down.forward = lambda x: torch.zeros(*x.shape[:-1], 4)
    point = CalibrationPoint(
        name="experts.0",
        block=0,
        consumers=(Consumer("absent", nn.Linear(6, 4)),),
        probe=ResidualProbe(block.after),
        group=block,
    )
    for read, times in ((None, 1), (ignore, 1)):
        with watch(point, block, read, shown.append):
            block(batches()[0])
        assert len(shown) == times
