"""Gram energy: the second moment of a channel, Σ x_h². Reads the data and no weights."""

from torch import Tensor

from grail.select import View, register


@register("gram")
def gram_energy(view: View) -> Tensor:
    """Returns G_hh [H]."""
    return view.gram.energy
