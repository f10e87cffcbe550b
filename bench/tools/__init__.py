"""Shared parts of the benches, and the tools that compile, search and measure the code itself."""
