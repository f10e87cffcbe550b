"""A block's output in two parts, r + c(x), kept for every batch.

x is what the block's last consumer c reads, and r what the block returns while c returns zeros.
Where a block adds c(x) to its residual stream and does nothing more, its output is their sum. Once
c is rewritten to c' and its producers are narrowed to the channels P, it is r + c'(x[…, P]): the
same operations as the block's own, and no other part of the block runs again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grail.algebra.kinds import plain_output
from grail.calibrate.hidden_states import HiddenStates
from grail.networks.layers import Consumer
from grail.runtime.hooks import replaced_forward


@dataclass(frozen=True)
class ResidualSplit:
    """The two parts of one block's output.

    Args:
        consumer: c, a linear layer.
        inputs: x [..., H] of each batch, on the device of the block.
        rests: r [..., O] of each batch, there too.
    """

    consumer: Consumer
    inputs: HiddenStates
    rests: HiddenStates

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Lets the consumer return zeros."""
        outputs = self.consumer.outputs

        def zeros(*args: Tensor, **kwargs: Any) -> Tensor:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            return x.new_zeros(*x.shape[:-1], outputs)

        with replaced_forward(self.consumer.module, zeros):
            yield

    def whole(self, batch: int, rest: Tensor) -> Tensor:
        """Returns r + c(x) of one batch, also while the consumer returns zeros."""
        return rest + plain_output(self.consumer.module, self.inputs[batch]).reshape(rest.shape)

    def without_bias(self, output: Tensor) -> Tensor:
        """Returns what the consumer's weight should return, for what the consumer should."""
        bias: Any = getattr(self.consumer.module, "bias", None)
        return output if bias is None else output - bias.to(output)

    def read(self, batch: int, kept: Tensor) -> Tensor:
        """Returns x[…, P] of one batch, for the channels P as indices [K] on the device of x."""
        return self.inputs[batch][..., kept]  # a third of the time of index_select

    def output(self, batch: int, kept: Tensor) -> Tensor:
        """Returns r + c'(x[…, P]) of one batch, c' being the consumer as it is now."""
        own: Tensor = self.consumer.module(self.read(batch, kept))
        rest = self.rests[batch]
        return rest + own.reshape(rest.shape)  # a consumer may read all tokens in one row
