"""GRAIL: rebuild what structured compression lost, in closed form, without labels."""

from grail.calibration import token_batches
from grail.collect import Collected, collect
from grail.compress import compress
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.export import export
from grail.fit import Fit, fit
from grail.gram import Gram
from grail.models import load_model
from grail.options import Options
from grail.plan import Inspection, inspect
from grail.reduction import Folding, Reduction, Selection
from grail.report import Report
from grail.saving import load, save
from grail.sensitivity import Sensitivity, sensitivity
from grail.sites import Fused, Site, trace

__version__ = "0.1.0"

__all__ = [
    "Collected",
    "Fit",
    "Folding",
    "Fused",
    "GrailError",
    "Gram",
    "Inspection",
    "Options",
    "Reduction",
    "Report",
    "Selection",
    "Sensitivity",
    "Site",
    "collect",
    "compress",
    "evaluate",
    "export",
    "fit",
    "inspect",
    "load",
    "load_model",
    "save",
    "sensitivity",
    "token_batches",
    "trace",
]
