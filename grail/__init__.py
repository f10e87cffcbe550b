"""GRAIL: rebuild what structured compression lost, in closed form, without labels."""

from grail.collect import Collected, collect
from grail.compress import compress
from grail.fit import Fit, fit
from grail.gram import Gram
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
    "fit",
    "inspect",
    "load",
    "save",
    "sensitivity",
    "trace",
]
