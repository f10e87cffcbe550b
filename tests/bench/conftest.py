"""Benches of kernels are tested as kernels are: seeded, and on a launch table of the test's own."""

from tests.kernels.conftest import own_table, seed

__all__ = ["own_table", "seed"]
