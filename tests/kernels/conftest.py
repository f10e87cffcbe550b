"""Every test of a kernel runs on each backend that can run here.

Triton needs a GPU, or its interpreter: `test_interpreter.py` runs this folder once more with that.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from grail_kernels.backend import interpreting


class Runner(NamedTuple):
    """A backend, and the device that its tensors live on."""

    backend: str
    device: str


@pytest.fixture(params=["torch", "triton"])
def runner(request: pytest.FixtureRequest) -> Runner:
    if request.param == "torch":
        return Runner("torch", "cpu")
    if interpreting():
        return Runner("triton", "cpu")
    if not torch.cuda.is_available():
        pytest.skip(
            "Triton runs on a GPU or in its interpreter; test_interpreter.py has the latter"
        )
    return Runner("triton", "cuda")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest, runner: Runner) -> torch.dtype:
    if request.param == torch.bfloat16 and runner.backend == "triton" and interpreting():
        pytest.skip("Triton's interpreter has no bfloat16 products")
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
