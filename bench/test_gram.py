"""The cases of bench/kernels/gram.py under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels import gram
from bench.tools.measuring import settle

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {shape for model in gram.DEFAULT_MODELS for shape in gram.shapes_of(model, DEVICE)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", sorted(SHAPES, key=lambda shape: shape.flops), ids=gram.Shape.describe
)
@pytest.mark.parametrize("provider", ["grail", "library"])
def test_gram(provider: str, shape: gram.Shape, dtype: str, benchmark: Any) -> None:
    """One provider on one case; a few seconds each on a CPU."""
    x = gram.activations(shape, gram.DTYPES[dtype], DEVICE)
    calls = gram.providers(shape, x.dtype, DEVICE)
    library = next(name for name in gram.LIBRARY if name in calls)
    call = calls[library if provider == "library" else provider]

    def run() -> None:
        call(x)
        settle(DEVICE)

    benchmark.group = f"{dtype} {shape.describe()}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
