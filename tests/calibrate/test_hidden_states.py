import torch
from torch import nn

from grail.calibrate.hidden_states import HiddenStates, OutputCache, created_hidden_states

CPU = torch.device("cpu")


class Pair(nn.Module):
    """Returns its input times the number of its call, and something else."""

    def __init__(self, other=None):
        super().__init__()
        self.other, self.calls = other, 0

    def forward(self, x):
        self.calls += 1
        return self.calls * x, self.other, None


def test_each_batch_stays_in_the_memory_of_its_first_tensor():
    states, source = HiddenStates(CPU), torch.ones(3)
    states.put(0, source)
    place = states[0].data_ptr()
    assert place != source.data_ptr()
    states.put(0, 2 * source)
    assert states[0].tolist() == [2, 2, 2]
    assert states[0].data_ptr() == place


def test_a_tensor_of_another_shape_gets_memory_of_its_own():
    states = HiddenStates(CPU)
    states.put(0, torch.ones(3))
    states.put(0, torch.ones(2, 2))
    assert states[0].shape == (2, 2)


def test_a_copy_changes_on_its_own_and_may_wait_elsewhere():
    states = HiddenStates(CPU)
    states.put(0, torch.ones(3))
    other = states.copy()
    other.put(0, torch.zeros(3))
    assert states[0].tolist() == [1, 1, 1]
    assert states.copy(torch.device("meta"))[0].device.type == "meta"


def test_outputs_are_replayed_batch_by_batch_in_the_form_of_a_tuple():
    module, x = Pair(), torch.ones(2)
    cache = OutputCache(CPU, CPU)
    with cache.recording([module]):
        expected = [module(x)[0] for _ in range(3)]
    with cache.replaying():
        replayed = [module(x) for _ in range(3)]
    assert module.calls == 3
    assert [output[1:] for output in replayed] == [(None, None)] * 3
    assert all(torch.equal(a, b) for a, (b, *_) in zip(expected, replayed, strict=True))


def test_a_module_that_returns_more_than_its_first_output_runs_again():
    module, x = Pair(other=torch.ones(1)), torch.ones(2)
    cache = OutputCache(CPU, CPU)
    with cache.recording([module]):
        module(x)
        module(x)
    with cache.replaying():
        assert module(x)[1] is module.other
    assert module.calls == 3


def test_a_second_recording_replaces_the_first_in_its_memory():
    first, second, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    cache = OutputCache(CPU, CPU)
    with torch.no_grad(), created_hidden_states() as created:
        with cache.recording([first]):
            first(x)
        (outputs,) = created
        place = outputs[0].data_ptr()
        with cache.recording([second]):
            expected = second(x)
        assert list(created) == [outputs]
        assert outputs[0].data_ptr() == place
        with cache.replaying():
            assert torch.equal(second(0 * x), expected)
            assert torch.equal(first(0 * x), first.bias[None])  # runs again


def test_a_replayed_output_may_be_written_over():
    module, x = nn.Identity(), torch.ones(2)
    cache = OutputCache(CPU, CPU)
    with cache.recording([module]):
        module(x)
    for _ in range(2):
        with cache.replaying():
            output = module(x)
        assert output.tolist() == [1, 1]
        output.zero_()
