"""Wanda, structured: weight magnitude times input norm, summed over the outputs of a channel.

Source: Sun et al., "A simple and effective pruning approach for large language models" (ICLR 2024),
score |W_oh|·‖x_h‖₂; summed over o for whole channels as in FLAP's Wanda-sp baseline (An et al.,
AAAI 2024).
"""

from torch import Tensor

from grail.select import View, register


@register("wanda")
def wanda(view: View) -> Tensor:
    """Returns Σ_o |W_oh| · ‖x_h‖₂ [H]."""
    weight = view.consumer.abs().sum(0, dtype=view.gram.energy.dtype)
    return weight * view.gram.energy.sqrt().to(weight.device)
