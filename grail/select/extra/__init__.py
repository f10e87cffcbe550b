"""Selectors that rank below another one of the same kind in the benchmarks."""

__all__ = ["agglomerative", "kmeans", "magnitude_variants"]
