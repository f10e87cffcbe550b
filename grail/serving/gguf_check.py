"""Compares a GGUF file with the network it was made of: llama.cpp in a process of its own."""

import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grail.errors import ExportError
from grail.files.load import positions
from grail.runtime.transaction import eval_no_grad
from grail.serving.child_process import environment, program, reason

# Sequences and tokens of the comparison; fewer tokens if the model has no positions for them.
_PROBE = (4, 64)
# By the dtype of a file's matrices: largest difference as a share of the largest logit, and share
# of positions with the same best token. llama.cpp rounds the inputs of 16-bit matrices as well.
TOLERANCES = {"float32": (1e-4, 0.999), "float16": (1e-2, 0.95), "bfloat16": (5e-2, 0.9)}


@dataclass(frozen=True)
class Comparison:
    """Logits of a file in llama.cpp, beside those of the network in fp32."""

    runtime: str  # name and version
    dtype: str  # of the file's matrices; another name for one that is quantised
    tokens: int
    difference: float  # the largest between two logits
    largest: float  # logit of the network, by size
    agreement: float  # share of positions with the same best token

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.difference / self.largest

    @property
    def is_close(self) -> bool:
        """Whether the difference is small enough for rounding; True for quantised files."""
        most, least = TOLERANCES.get(self.dtype, (float("inf"), 0.0))
        return self.share <= most and self.agreement >= least

    def require_close(self, output: Path) -> None:
        """Raises ExportError if the difference is more than rounding."""
        if not self.is_close:
            raise ExportError(
                f"{output} is not the network of the folder: {self}; please report it "
                "(--no-verify, verify=False, writes a file all the same)"
            )

    def __str__(self) -> str:
        judged = "" if self.dtype in TOLERANCES else ", reported and not judged: it is quantised"
        return (
            f"largest logit difference {self.share:.1e} of the largest logit, the same best token "
            f"at {self.agreement:.1%} of {self.tokens} positions ({self.runtime}){judged}"
        )


def runtime() -> str | None:
    """Returns name and version of the installed runtime; None if there is none."""
    if find_spec("llama_cpp") is None:
        return None
    return f"llama-cpp-python {metadata.version('llama_cpp_python')}"


def compare(model: Any, path: Path, dtype: str) -> Comparison | None:
    """Runs a file in llama.cpp on random tokens, in a process of its own.

    Args:
        model: the network; it is converted to fp32.
        path: the file.
        dtype: of the file's matrices.

    Returns:
        The comparison, or None if no runtime is installed.

    Raises:
        ExportError: llama.cpp does not load or run the file, with its own message.
    """
    name = runtime()
    if name is None:
        return None
    model = model.float()
    rows, length = _PROBE
    length = min(length, positions(model) or length)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (rows, length), generator=draw)
    difference = largest = 0.0
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        found = _logits(path, tokens, vocabulary, Path(folder))
        for row, stored in zip(tokens, found, strict=True):
            own = _reference(model, row)
            other = torch.from_numpy(np.array(stored))
            apart = (own - other).abs().max().item()
            difference = max(difference, apart if apart == apart else float("inf"))
            largest = max(largest, own.abs().max().item())
            equal += int((own.argmax(1) == other.argmax(1)).sum())
    return Comparison(name, dtype, tokens.numel(), difference, largest, equal / tokens.numel())


@torch.inference_mode()
def _reference(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Returns the logits [tokens, vocabulary] of one sequence."""
    with eval_no_grad(model):
        return model(row[None].to(model.device), use_cache=False).logits[0].float().cpu()


def _logits(path: Path, tokens: torch.Tensor, vocabulary: int, folder: Path) -> np.ndarray:
    """Returns the logits [sequences, tokens, vocabulary] that llama.cpp computes."""
    given, result = folder / "tokens.npy", folder / "logits.npy"
    np.save(given, tokens.numpy())
    done = subprocess.run(
        program("gguf_runtime", str(path), str(given), str(result)),
        capture_output=True,
        env=environment(),
        cwd=folder,
    )
    if done.returncode != 0 or not result.is_file():
        raise ExportError(
            f"llama.cpp does not run {path.name} (exit code {done.returncode}); it says: "
            f"{reason(done.stderr)}"
        )
    logits: np.ndarray = np.load(result, mmap_mode="r")
    if logits.shape != (*tokens.shape, vocabulary):
        raise ExportError(
            f"llama.cpp computes logits of shape {logits.shape} from {path.name}, and the folder "
            f"{(*tokens.shape, vocabulary)}; please report it"
        )
    return logits
