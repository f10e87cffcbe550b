"""One site as tensors: Gram matrices, reductions, drift, and the ridge fit of its consumers."""

__all__ = [
    "drift",
    "expert_grams",
    "gram",
    "guard",
    "heldout",
    "kinds",
    "problem",
    "reduction",
    "reductions",
    "ridge",
    "rounding",
    "sums",
    "weights",
    "width",
]
