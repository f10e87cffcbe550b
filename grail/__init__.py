"""GRAIL removes channels from trained networks and recovers accuracy in closed form."""

from grail.algebra._fit import Fit, fit
from grail.algebra.gram import Gram
from grail.algebra.reduction import Folding, Reduction, Selection
from grail.errors import GrailError
from grail.files._export import export
from grail.files.load import load_model
from grail.files.packing import token_batches
from grail.files.pretrained import Pretrained
from grail.files.saving import load, save
from grail.files.text import Text
from grail.networks import Fused, Site, trace
from grail.recipe import Recipe
from grail.report._evaluate import evaluate
from grail.report.report import Report
from grail.run._collect import Collected, collect, merge
from grail.run._compress import compress
from grail.run._inspect import Inspection, inspect
from grail.run._sensitivity import Sensitivity, sensitivity
from grail.run.workflow import compress_checkpoint
from grail.runtime.settings import Runtime
from grail.version import __version__ as __version__

__all__ = [
    "Collected",
    "Fit",
    "Folding",
    "Fused",
    "GrailError",
    "Gram",
    "Inspection",
    "Pretrained",
    "Recipe",
    "Reduction",
    "Report",
    "Runtime",
    "Selection",
    "Sensitivity",
    "Site",
    "Text",
    "collect",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "export",
    "fit",
    "inspect",
    "load",
    "load_model",
    "merge",
    "save",
    "sensitivity",
    "token_batches",
    "trace",
]


def __dir__() -> list[str]:
    """Returns the public names; rooms and private modules are found by import."""
    return [*__all__, "__version__"]
