import pytest
import torch
from torch import nn

from grail.runtime.hooks import replaced_forward


def test_a_replaced_forward_runs_until_the_end_of_the_block():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    before = layer(x)
    with replaced_forward(layer, lambda x: x + 1):
        assert torch.equal(layer(x), x + 1)
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x), before)


def test_a_forward_of_the_modules_own_comes_back_after_an_error():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: 2 * x
    with pytest.raises(RuntimeError, match="inside"), replaced_forward(layer, lambda x: x):
        raise RuntimeError("inside")
    assert layer.forward is own
