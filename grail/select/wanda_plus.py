"""Wanda++'s regional gradient score: Wanda's, plus the gradient of the block's output by a weight.

Summed over the outputs of a channel, as in `grail.select.wanda`. The authors' regional optimiser,
which updates a block's weights by RMSprop between rounds of scoring, is not part of the score.

Source: Yang et al., "Wanda++: pruning large language models via regional gradients" (Findings of
ACL 2025): (α·√(1/N Σ_n (∂‖f(X_n)‖₂/∂W_oh)²) + ‖x_h‖₂)·|W_oh|, α = 100, N sequences X_n.
"""

from torch import Tensor

from grail.errors import InputError
from grail.select import View, register

ALPHA = 100.0


@register("wanda++", needs_gradient=True)
def wanda_plus(view: View) -> Tensor:
    """Returns Σ_o (100·gradient_oh + ‖x_h‖₂)·|W_oh| [H].

    Raises:
        InputError: a gradient of another shape than the consumer's.
    """
    assert view.gradient is not None
    if view.gradient.shape != view.consumer.shape:
        raise InputError(
            f"the gradient must be {list(view.consumer.shape)}, as the consumer; got "
            f"{list(view.gradient.shape)}"
        )
    weight = view.consumer.float().abs()
    # The mean input of one consumer: its size relative to the gradient matters.
    norm = (view.gram.energy / view.consumers).sqrt().to(weight)
    slope = view.gradient.to(weight)
    return ((ALPHA * slope + norm) * weight).sum(0)
