"""GRAIL removes channels from trained networks and recovers accuracy in closed form.

Names and modules are imported when they are first asked for, and torch with them: the command line
answers `grail --help` without.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from grail.version import __version__ as __version__

if TYPE_CHECKING:
    from grail.algebra._fit import Fit, fit
    from grail.algebra.gram import Gram
    from grail.algebra.reduction import Folding, Reduction, Selection
    from grail.errors import GrailError
    from grail.files._export import export
    from grail.files.load import load_model
    from grail.files.mixture import Mixture
    from grail.files.packing import token_batches
    from grail.files.pretrained import Pretrained
    from grail.files.saving import load, save
    from grail.files.text import Text
    from grail.networks import Fused, Part, Site, trace
    from grail.recipe import Recipe
    from grail.report._evaluate import DenseReference, evaluate
    from grail.report.report import Report
    from grail.run._accumulate import accumulate
    from grail.run._collect import Collected, collect, merge
    from grail.run._compress import compress
    from grail.run._inspect import Inspection, inspect
    from grail.run._quantize import quantize
    from grail.run._sensitivity import Sensitivity, sensitivity
    from grail.run.generation import generate_calibration
    from grail.run.workflow import compress_checkpoint
    from grail.runtime.settings import Runtime
    from grail.serving.gguf_writing import export_gguf
    from grail.serving.imatrix import export_imatrix
    from grail.serving.onnx_writing import export_onnx
    from grail.serving.speed import measure_speed

__all__ = [
    "Collected",
    "DenseReference",
    "Fit",
    "Folding",
    "Fused",
    "GrailError",
    "Gram",
    "Inspection",
    "Mixture",
    "Part",
    "Pretrained",
    "Recipe",
    "Reduction",
    "Report",
    "Runtime",
    "Selection",
    "Sensitivity",
    "Site",
    "Text",
    "accumulate",
    "collect",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "export",
    "export_gguf",
    "export_imatrix",
    "export_onnx",
    "fit",
    "generate_calibration",
    "inspect",
    "load",
    "load_model",
    "measure_speed",
    "merge",
    "quantize",
    "save",
    "sensitivity",
    "token_batches",
    "trace",
]

# The module of each.
_MODULES = {
    "Collected": "grail.run._collect",
    "DenseReference": "grail.report._evaluate",
    "Fit": "grail.algebra._fit",
    "Folding": "grail.algebra.reduction",
    "Fused": "grail.networks",
    "GrailError": "grail.errors",
    "Gram": "grail.algebra.gram",
    "Inspection": "grail.run._inspect",
    "Mixture": "grail.files.mixture",
    "Part": "grail.networks",
    "Pretrained": "grail.files.pretrained",
    "Recipe": "grail.recipe",
    "Reduction": "grail.algebra.reduction",
    "Report": "grail.report.report",
    "Runtime": "grail.runtime.settings",
    "Selection": "grail.algebra.reduction",
    "Sensitivity": "grail.run._sensitivity",
    "Site": "grail.networks",
    "Text": "grail.files.text",
    "accumulate": "grail.run._accumulate",
    "collect": "grail.run._collect",
    "compress": "grail.run._compress",
    "compress_checkpoint": "grail.run.workflow",
    "evaluate": "grail.report._evaluate",
    "export": "grail.files._export",
    "export_gguf": "grail.serving.gguf_writing",
    "export_imatrix": "grail.serving.imatrix",
    "export_onnx": "grail.serving.onnx_writing",
    "fit": "grail.algebra._fit",
    "generate_calibration": "grail.run.generation",
    "inspect": "grail.run._inspect",
    "load": "grail.files.saving",
    "load_model": "grail.files.load",
    "measure_speed": "grail.serving.speed",
    "merge": "grail.run._collect",
    "quantize": "grail.run._quantize",
    "save": "grail.files.saving",
    "sensitivity": "grail.run._sensitivity",
    "token_batches": "grail.files.packing",
    "trace": "grail.networks",
}


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of the package, as PEP 562 has it."""
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    if name.isidentifier() and not name.startswith("__") and find_spec(f"grail.{name}") is not None:
        return importlib.import_module(f"grail.{name}")
    raise AttributeError(f"module 'grail' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names; rooms and private modules are found by import."""
    return [*__all__, "__version__"]
