import pytest
import torch
from torch import nn

from grail.calibrate.samples import Order, find_orders
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks.layers import Consumer
from grail.statistics.token_order import token_orders


class Reads(nn.Module):
    """A layer that reads a rearrangement of [B, L, C]."""

    def __init__(self, rearrange):
        super().__init__()
        self.layer, self.rearrange = nn.Linear(3, 2), rearrange

    def forward(self, x):
        return self.layer(self.rearrange(x))


def order_of(rearrange, needs_gradient=False):
    model = Reads(rearrange)
    stream = Stream(model, [model], [torch.randn(4, 5, 3)])
    consumer = Consumer("layer", model.layer)
    return token_orders(stream, 0, [consumer], needs_gradient)[consumer]


@torch.no_grad()
@pytest.mark.parametrize(
    ("rearrange", "first"),
    [
        (lambda x: x, True),
        (lambda x: x.flatten(0, 1), True),
        (lambda x: x.mean(1), True),
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.transpose(0, 1).flatten(0, 1), False),
    ],
    ids=["[B, L]", "[B·L]", "[B]", "[L, B]", "[L·B]"],
)
def test_the_order_of_tokens_is_found(rearrange, first):
    assert order_of(rearrange) == Order(samples_first=first)


@torch.no_grad()
def test_tokens_that_mix_samples_are_refused():
    with pytest.raises(ModelError, match="layer: which sample each of its tokens belongs to"):
        order_of(lambda x: x + x.mean(0))


@torch.no_grad()
def test_gradients_ask_for_samples_first():
    with pytest.raises(ModelError, match="takes gradients sample by sample"):
        order_of(lambda x: x.transpose(0, 1), needs_gradient=True)


def test_no_order_is_found_where_no_token_changes():
    constant = torch.ones(4, 2, 3)
    assert find_orders(lambda change: {"layer": constant}, 4) == {"layer": None}
