"""Gram energy: the second moment of a channel, Σ x_h². Sees the data and no weights."""

from torch import Tensor

from grail.select import View, scores


@scores("gram")
def gram_energy(view: View) -> Tensor:
    """G_hh [H]."""
    return view.gram.energy
