import pytest
import torch
from torch import nn

from grail.calibrate.recorder import Recorder
from grail.errors import ModelError

CPU = torch.device("cpu")


class Block(nn.Module):
    """Adds what it is called with; may return a tuple."""

    def __init__(self, returns_tuple=False):
        super().__init__()
        self.scale, self.returns_tuple = nn.Parameter(torch.ones(1)), returns_tuple

    def forward(self, x, table=None):
        x = self.scale * x + table
        return (x, None, None) if self.returns_tuple else x


class Chain(nn.Module):
    """Two blocks with a table made anew for each batch."""

    def __init__(self, between=lambda x: x, by_name=False, returns_tuple=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(returns_tuple) for _ in range(2))
        self.between, self.by_name, self.returns_tuple = between, by_name, returns_tuple

    def forward(self, x):
        table = torch.arange(3.0)
        for block in self.blocks:
            x = block(x=x, table=table) if self.by_name else block(x, table)
            x = x[0] if self.returns_tuple else self.between(x)
        return x


def record(model, *batches):
    recorder, kept = Recorder(model, model.blocks, CPU), []
    keep = lambda hidden: kept.append(hidden.clone())  # noqa: E731
    return recorder, [recorder.record((batch,), {}, keep) for batch in batches], kept


def test_calls_hold_all_arguments_but_the_hidden_states():
    x = torch.ones(2, 3)
    _, (calls,), (kept,) = record(Chain(), x)
    assert torch.equal(kept, x)
    assert [call.key for call in calls] == [None, None]
    assert all(torch.equal(call.args[0], torch.arange(3.0)) for call in calls)
    assert all(not call.kwargs for call in calls)


def test_hidden_states_that_are_passed_by_name_keep_it():
    _, (calls,), (kept,) = record(Chain(by_name=True), torch.ones(2, 3))
    assert [call.key for call in calls] == ["x", "x"]
    assert [set(call.kwargs) for call in calls] == [{"table"}, {"table"}]
    assert kept.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_equal_calls_of_later_batches_are_those_of_the_first():
    _, (first, second), _ = record(Chain(), torch.ones(2, 3), torch.zeros(4, 3))
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_blocks_have_their_own_forward_again():
    model = Chain()
    record(model, torch.ones(2, 3))
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_change_in_place_between_blocks_is_refused():
    with pytest.raises(ModelError, match="something runs between block 1 and the one before it"):
        record(Chain(between=lambda x: x.add_(1)), torch.ones(2, 3))


def test_blocks_that_return_tuples_are_learned_from_a_whole_pass():
    model, x = Chain(returns_tuple=True), torch.ones(2, 3)
    recorder = Recorder(model, model.blocks, CPU)
    with pytest.raises(ModelError):
        recorder.record((x,), {}, lambda hidden: None)
    assert recorder.learn_tuples((x,), {})
    assert recorder.tuple_lengths == {0: 3, 1: 3}
    assert len(recorder.record((x,), {}, lambda hidden: None)) == 2
