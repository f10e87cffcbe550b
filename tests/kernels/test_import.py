"""`import grail_kernels` stays light, and works without Triton."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_loads_no_triton() -> None:
    assert run("import sys, grail_kernels; print('triton' in sys.modules)") == "False"


def test_without_triton_torch_is_taken_and_asking_for_triton_is_refused() -> None:
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import torch, grail_kernels as gk\n"
        "out = gk.gram_(torch.zeros(4), torch.ones(3, 2))\n"
        "try:\n"
        "    gk.gram_(out, torch.ones(3, 2), backend='triton')\n"
        "except gk.BackendError as refusal:\n"
        "    print(refusal)\n"
        "print(gk.unpack(out, 2).tolist())\n"
    )
    refusal, result = run(code).splitlines()
    assert "triton is not installed" in refusal
    assert result == "[[3.0, 3.0], [3.0, 3.0]]"
