"""Compares an ONNX file with its network: ONNX Runtime and OpenVINO, in processes of their own."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grail.errors import ExportError, InputError, ModelError, one_line
from grail.runtime.transaction import eval_no_grad
from grail.serving.child_process import environment, program, reason

# By module: the name, and its package.
RUNTIMES = {"onnxruntime": ("ONNX Runtime", "onnxruntime"), "openvino": ("OpenVINO", "openvino")}
# Largest difference of an output's values, as a share of the largest of them, in fp32.
TOLERANCE = 1e-4
_QUOTED = 500  # characters of a runtime's message


@dataclass(frozen=True)
class Call:
    """A batch: the arguments of the network, and their tensors by the names of parameters."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[str, Tensor]  # in the order of the file's inputs
    samples: int
    dynamic: Any  # by parameter, as `torch.export` takes it: which axes are of samples


@dataclass(frozen=True)
class Comparison:
    """The outputs of a file in a runtime, beside those of the network in torch."""

    runtime: str  # name and version
    batches: tuple[int, ...]  # samples of each batch that was compared
    output: str  # the one that differs most
    difference: float  # the largest between two of its values
    largest: float  # of the network's values of that output, by size

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.difference / self.largest if self.difference else 0.0

    @property
    def is_close(self) -> bool:
        """Whether the difference is small enough for rounding."""
        return self.share <= TOLERANCE

    def require_close(self, output: Path) -> None:
        """Raises ExportError if the difference is more than rounding."""
        if not self.is_close:
            raise ExportError(
                f"{output} is not the network: {self}; {TOLERANCE:.0e} is allowed; please report "
                "it if the file was written by grail from this network"
            )

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        return (
            f"largest difference {self.share:.1e} of the largest value of {self.output}, batches "
            f"of {sizes} ({self.runtime})"
        )


def runtimes() -> dict[str, str]:
    """Returns the installed runtimes: by module, name and version."""
    return {
        module: f"{name} {metadata.version(package)}"
        for module, (name, package) in RUNTIMES.items()
        if find_spec(module) is not None
    }


def compare(model: nn.Module, path: Path, calls: Sequence[Call]) -> tuple[Comparison, ...]:
    """Runs a file in every runtime that is installed, each in a process of its own.

    Args:
        model: the network, in fp32.
        path: the file.
        calls: batches of different sizes.

    Returns:
        A comparison for each runtime; none if none is installed.

    Raises:
        InputError: the network takes no such batch, or the file has other outputs.
        ExportError: a runtime does not load or run the file, with its own message.
    """
    known = runtimes()
    if not known:
        return ()
    expected = [computed(model, call) for call in calls]
    return tuple(
        _compared(name, path, calls, expected, _found(module, path, calls))
        for module, name in known.items()
    )


def computed(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Returns the network's outputs by name, on the CPU.

    Raises:
        ModelError: it does not run on the batch, or returns what is no tensor.
    """
    try:
        with eval_no_grad(model), torch.inference_mode():
            value = model(*call.args, **call.kwargs)
    except Exception as error:  # a network can raise anything
        raise ModelError(
            f"{type(model).__name__} does not run on a batch of {call.samples}: {one_line(error)}",
            page="docs/serving/onnx.md#what-is-refused",
        ) from error
    found = named_tensors(value, "", "output")
    if odd := [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
        raise ModelError(
            f"{type(model).__name__} returns {odd[0]}, a {type(found[odd[0]]).__name__}, and ONNX "
            "has tensors alone; return tensors, or a tuple or mapping of them",
            page="docs/serving/onnx.md#what-is-refused",
        )
    return {name: tensor.cpu() for name, tensor in found.items()}


def named_tensors(value: Any, name: str = "", alone: str = "") -> dict[str, Any]:
    """Returns the leaves of mappings and sequences in order, without None, named by their keys.

    Args:
        value: a tensor, a mapping or sequence, or anything else, which is a leaf.
        name: of the value itself; "" of none.
        alone: the name of a leaf without one.
    """
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, part in value.items():
            found |= named_tensors(part, f"{name}_{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            found |= named_tensors(part, f"{name or alone}_{number}")
    elif value is not None:
        found[name or alone] = value
    return found


def _found(module: str, path: Path, calls: Sequence[Call]) -> list[list[np.ndarray]]:
    """Returns the outputs of a file in a runtime, by batch."""
    with tempfile.TemporaryDirectory() as folder:
        for number, call in enumerate(calls):
            arrays = [tensor.cpu().numpy() for tensor in call.inputs.values()]
            np.savez(Path(folder, f"inputs-{number}.npz"), *arrays)
        done = subprocess.run(
            program("onnx_runtime", module, str(path.absolute()), folder),
            capture_output=True,
            env=environment(),
            cwd=folder,
        )
        results = [Path(folder, f"outputs-{number}.npz") for number in range(len(calls))]
        if done.returncode != 0 or not all(result.is_file() for result in results):
            raise ExportError(
                f"{RUNTIMES[module][0]} does not run {path.name} (exit code {done.returncode}); it "
                f"says: {reason(done.stderr)[:_QUOTED]}"
            )
        return [_read(result) for result in results]


def _read(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        return [stored[name] for name in stored.files]


def _compared(
    runtime: str,
    path: Path,
    calls: Sequence[Call],
    expected: Sequence[Mapping[str, Tensor]],
    found: Sequence[Sequence[np.ndarray]],
) -> Comparison:
    """Returns the comparison of the output that differs most."""
    worst = Comparison(runtime, tuple(call.samples for call in calls), "none", 0.0, 0.0)
    for own, others in zip(expected, found, strict=True):
        if len(own) != len(others):
            raise InputError(
                f"{path} has {len(others)} outputs, and the network {len(own)}: it is of another "
                "network"
            )
        for (name, values), other in zip(own.items(), others, strict=True):
            if values.shape != other.shape:
                raise InputError(
                    f"{path} gives {list(other.shape)} for {name}, and the network "
                    f"{list(values.shape)}: it is of another network"
                )
            difference, largest = _distance(values.double(), torch.from_numpy(other).double())
            this = Comparison(runtime, worst.batches, name, difference, largest)
            if worst.output == "none" or this.share > worst.share:
                worst = this
    return worst


def _distance(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Returns the largest difference, infinity for NaN, and the largest finite value by size."""
    apart = (own - other).abs().masked_fill(own == other, 0.0).nan_to_num(nan=torch.inf)
    difference = apart.max().item() if apart.numel() else 0.0
    finite = own[own.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return difference, largest or torch.finfo(torch.float32).tiny
