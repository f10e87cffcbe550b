"""The cases of the kernel benches under pytest-benchmark: pytest bench --benchmark-only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import absorb, cases, gram, ridge
from bench.tools.commandline import DTYPES
from bench.tools.measuring import Call, settle

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {shape for model in gram.DEFAULT_MODELS for shape in gram.shapes_of(model, DEVICE)}


def run(benchmark: Any, group: str, call: Call, x: Tensor) -> None:
    """Five rounds of a call."""
    benchmark.group = group
    benchmark.pedantic(lambda: (call(x), settle(DEVICE)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", sorted(SHAPES, key=lambda shape: shape.flops), ids=gram.Shape.describe
)
@pytest.mark.parametrize("provider", ["grail", "library"])
def test_gram(provider: str, shape: gram.Shape, dtype: str, benchmark: Any) -> None:
    """One provider on one case; a few seconds each on a CPU."""
    x = gram.activations(shape, DTYPES[dtype], DEVICE)
    calls = gram.providers(shape, x.dtype, DEVICE)
    library = next(name for name in gram.LIBRARY if name in calls)
    call = calls[library if provider == "library" else provider]
    run(benchmark, f"{dtype} {shape.describe()}", call, x)


@pytest.mark.parametrize("model", absorb.CPU_MODELS if DEVICE == "cpu" else cases.GPU_MODELS)
@pytest.mark.parametrize("provider", ["fused", "gathered", "permuted", "full"])
def test_absorb(provider: str, model: str, benchmark: Any) -> None:
    """One provider on the MLP site of one model, half of its channels kept."""
    case = absorb.problem(*cases.MLP_SITES[model], keep=0.5, device=DEVICE)
    calls = absorb.providers(case)
    if provider not in calls:
        pytest.skip("no GPU to run the kernel on")
    run(benchmark, model, calls[provider], case.weight)


@pytest.mark.parametrize("provider", ["grail", "grail solve", "reference"])
@pytest.mark.parametrize("model", ridge.CPU_MODELS if DEVICE == "cpu" else cases.GPU_MODELS)
def test_ridge(model: str, provider: str, benchmark: Any) -> None:
    """One provider on one case; seconds each on a CPU."""
    case = ridge.site(*cases.MLP_SITES[model], 0.5, DEVICE)
    run(benchmark, model, ridge.providers(case)[provider], case.weight)
