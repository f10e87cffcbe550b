"""The cases of bench/gram.py under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gram

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {shape for model in gram.DEFAULT_MODELS for shape in gram.shapes_of(model, DEVICE)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", sorted(SHAPES, key=lambda shape: shape.channels), ids=lambda shape: str(shape.channels)
)
@pytest.mark.parametrize("provider", ["grail", "addmm"])
def test_gram(provider: str, shape: gram.Shape, dtype: str, benchmark: Any) -> None:
    """One provider on one case; a few seconds each on a CPU."""
    x = torch.randn(shape.tokens, shape.channels, device=DEVICE).to(gram.DTYPES[dtype])
    call = gram.providers(shape.channels, x.dtype, DEVICE)[provider]

    def run() -> None:
        call(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{dtype} {shape.channels} channels"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
