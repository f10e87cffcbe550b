"""Computes the outputs of an ONNX file in a runtime; a program for a process of its own.

`python -m grail.serving.onnx_runtime RUNTIME FILE FOLDER` reads inputs-0.npz, inputs-1.npz … of the
folder, whose arrays are the file's inputs in order, and writes outputs-0.npz …. RUNTIME is
onnxruntime or openvino. A crash of the runtime ends this process alone.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def onnxruntime(path: str) -> Run:
    """Loads a file in ONNX Runtime on the CPU, with its default optimisations."""
    library: Any = importlib.import_module("onnxruntime")
    session = library.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(session.run(None, dict(zip(names, arrays, strict=True))))

    return run


def openvino(path: str) -> Run:
    """Loads a file in OpenVINO on the CPU, in fp32: its default may be 16 bits."""
    library: Any = importlib.import_module("openvino")
    core = library.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        found = model(list(arrays))
        return [found[output] for output in model.outputs]

    return run


LOADERS: dict[str, Callable[[str], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def main(runtime: str, path: str, folder: str) -> None:
    """Writes the outputs of every batch."""
    try:
        run = LOADERS[runtime](path)
        for number in range(len(list(Path(folder).glob("inputs-*.npz")))):
            with np.load(Path(folder, f"inputs-{number}.npz")) as stored:
                found = run([stored[name] for name in stored.files])
            np.savez(Path(folder, f"outputs-{number}.npz"), *found)
    except Exception as error:  # a runtime can raise anything
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main(*sys.argv[1:])
