"""The cases of bench/kernels/ridge.py under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels import ridge

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ridge.CPU_MODELS if DEVICE == "cpu" else ridge.GPU_MODELS


@pytest.mark.parametrize("provider", ["grail", "grail solve", "reference"])
@pytest.mark.parametrize("model", MODELS)
def test_ridge(model: str, provider: str, benchmark: Any) -> None:
    """One provider on one case; seconds each on a CPU."""
    case = ridge.site(*ridge.MODELS[model], 0.5, DEVICE)
    call = ridge.providers(case)[provider]

    def run() -> None:
        call(case.weight)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = model
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
