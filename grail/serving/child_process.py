"""Programs of GRAIL in processes of their own, in which a runtime may crash."""

import os
import sys
from collections.abc import Sequence

from grail.files.provenance import PACKAGE


def program(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of GRAIL by this interpreter."""
    return [sys.executable, "-m", f"grail.serving.{module}", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of this process, with the folder of this package to import from."""
    above = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, above))} | more


def reason(stderr: bytes) -> str:
    """Returns the line by which a runtime explains why it failed: the first error, or the last."""
    said = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    told: Sequence[str] = [line for line in said if "error" in line.lower()] or said[-1:]
    return " ".join(told[0].split()) if told else "nothing"
