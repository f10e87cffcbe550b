"""Benchmarks of the adapters; each runs in the environment of its library."""
