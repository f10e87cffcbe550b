"""Folding of Ward's clusters of the producers' rows, without data.

`grail.select.folding` in weight space: channels with similar producer rows are merged, not those
with similar activations.
"""

from grail.algebra.reduction import Folding, Reduction
from grail.select import View, register
from grail.select.folding import foldable, ward


@register("folding-agglomerative", folds=True)
def folding_agglomerative(view: View) -> Reduction:
    """Folds Ward's clusters of the producer rows."""
    rows = view.rows.double()
    return Folding(ward(rows @ rows.T, foldable(view).kept))
