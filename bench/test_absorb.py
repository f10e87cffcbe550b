"""The cases of bench/kernels/absorb.py under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels import absorb

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = absorb.CPU_MODELS if DEVICE == "cpu" else tuple(absorb.MODELS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("provider", ["fused", "gathered", "permuted", "full"])
def test_absorb(provider: str, model: str, benchmark: Any) -> None:
    """One provider on the MLP site of one model, half of its channels kept."""
    case = absorb.problem(*absorb.MODELS[model], keep=0.5, device=DEVICE)
    calls = absorb.providers(case)
    if provider not in calls:
        pytest.skip("no GPU to run the kernel on")
    call = calls[provider]

    def run() -> None:
        call(case.weight)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = model
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
