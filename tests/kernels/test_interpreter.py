"""The tests of the kernels, their search and their model once more, in Triton's interpreter.

Triton reads TRITON_INTERPRET when it decorates a kernel, so this takes a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grail_kernels.backend import interpreting

FOLDER = Path(__file__).parent
BENCHES = [str(FOLDER.parent / "bench" / f"test_{name}.py") for name in ("tune", "model")]


@pytest.mark.skipif(interpreting(), reason="this process interprets already")
def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER),
        *BENCHES,
        "-q",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
    ]
    finished = subprocess.run(
        command,
        cwd=FOLDER.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
