"""Every test of a kernel runs on each backend that can run here.

A test that both of Triton's Gram kernels must pass takes `every_runner`.

Triton needs a GPU, or its interpreter: `test_interpreter.py` runs this folder once more with that.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from grail_kernels import gram_serve, tuning
from grail_kernels.backend import interpreting


class Runner(NamedTuple):
    """A backend, the device that its tensors live on, and how many tokens are many for it.

    Many is what takes several blocks or steps, and in the interpreter seconds and not minutes.
    """

    backend: str
    device: str
    tokens: int


BACKENDS = ["torch", "triton"] if interpreting() or torch.cuda.is_available() else ["torch"]


# The kernel for GPUs without a tensor memory accelerator, on one that has it.
POINTERS = [f"{backend} by pointers" for backend in BACKENDS if backend == "triton"]


@pytest.fixture(params=BACKENDS)
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runner:
    if request.param == "torch":
        return Runner("torch", "cpu", tokens=1300)
    if request.param in POINTERS:
        monkeypatch.setattr("grail_kernels.gram_tma.takes", lambda part: False)
    if interpreting():
        return Runner("triton", "cpu", tokens=180)
    return Runner("triton", "cuda", tokens=1300)


every_runner = pytest.mark.parametrize("runner", [*BACKENDS, *POINTERS], indirect=True)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def leave_to_fp16(dtype: torch.dtype) -> None:
    """Skips bf16 in the interpreter, where it takes the path of fp16, in minutes all told."""
    if interpreting() and dtype == torch.bfloat16:
        pytest.skip("slow in the interpreter, where fp16 takes the same path")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_forms() -> None:
    """Each test finds kernels for the forms of its calls again, by its own table and patches."""
    gram_serve.forget_forms()


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped table that launches read instead."""
    path = tmp_path / "launches.json"
    path.write_bytes(tuning.TABLE.read_bytes())
    monkeypatch.setattr(tuning, "TABLE", path)
    return path
