"""FLAP's score: the fluctuation of a channel about its mean, times the weights that read it.

A channel that hardly fluctuates can be replaced by its mean, whatever its size. The adaptive budget
across sites is `grail.run.budget.flap`. The bias that FLAP adds for the removed means is not part
of the score.

Source: An et al., "Fluctuation-based adaptive structured pruning for large language models" (AAAI
2024), the metric WIFV: sample variance × squared L2 norm of the weight's column. The variance's
1/(N − 1) is left out: it is the same for all channels of a site, and drops out of standardised
scores. The released code squares the metric once more for attention heads; the paper does not, and
neither does this.
"""

from torch import Tensor

from grail.algebra.problem import ROUNDING
from grail.select import View, register


@register("flap")
def flap(view: View) -> Tensor:
    """Returns Σ (x_h − mean)² · Σ_o W_oh² [H]."""
    gram = view.gram
    energy = gram.energy.double()
    fluctuation = energy - gram.sum.double().square() / gram.tokens
    # Below this share of the energy it is the rounding of fp32 sums.
    fluctuation = fluctuation.where(fluctuation > 4 * ROUNDING * energy, 0)
    weight = view.consumer.double().square().sum(0)
    return weight * fluctuation.to(weight.device)
