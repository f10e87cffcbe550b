"""Folding of Ward's clusters of the producers' rows, without data.

`grail.select.folding` in weight space: channels with similar producer rows are merged, not those
with similar activations.
"""

from grail.algebra.reduction import Folding, Reduction
from grail.select import View, register
from grail.select.folding import foldable, ward


def _peak_bytes(view: View) -> int:
    """Returns the peak memory of the choice: the rows [H, D], and their products in fp64."""
    values, h = sum(producer.numel() for producer in view.producers), view.width.channels
    return max(12 * values, 8 * values + 8 * h * h)


@register("folding-agglomerative", peak_bytes=_peak_bytes, folds=True)
def folding_agglomerative(view: View) -> Reduction:
    """Folds Ward's clusters of the producer rows."""
    rows = view.rows.double()
    return Folding(ward(rows @ rows.T, foldable(view).kept))
