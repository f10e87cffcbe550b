"""What the benchmarks share, and the tools that build, search and measure without a model."""
