"""Numbers of README.md."""

import re
from typing import Any

from bench.quality import levers
from bench.report.domains import Page
from bench.report.networks import HALF, networks, number
from bench.report.numbers.rows import Rows
from bench.tools.measuring import ROOT
from bench.tools.tables import markdown

# Of the table: calibration, its sequences, sites, keep ratio, and the text read.
QUALITY: tuple[tuple[str, int, str, float, str], ...] = (
    ("passages", 64, "mlp", 0.75, "passages"),
    ("passages", 64, "mlp", 0.5, "passages"),
    ("passages", 64, "mlp", 0.5, "brown"),
    ("general", 64, "mlp", 0.5, "brown"),
    ("brown", 32, "mlp", 0.5, "brown"),
    ("brown", 32, "mlp,heads", 0.7, "brown"),
)


class Readme:
    """Numbers of the sections "Results", "Serve it" and "Supported models"."""

    def __init__(self, domains: Page) -> None:
        self._domains, self._files = domains, Rows("serving.csv")

    def results(self) -> str:
        """Returns the table: a line for each cell of `QUALITY`."""
        lines = []
        for calibration, sequences, sites, keep, text in QUALITY:
            pruned, paper, grail, best = (
                self._domains.row(calibration, sequences, lever, text, sites, keep)
                for lever in (levers.PRUNED, "paper", levers.DEFAULTS, levers.BEST)
            )
            near = ("–", "–")
            if grail is not None:
                near = f"{grail['kl'].value:.2f}", f"{grail['top1'].value:.0%}"
            lines.append(
                [
                    *(f"{calibration}, {sequences}k", sites, f"{keep:g}", text),
                    self._domains.dense(text),
                    *(*map(_with_share, (pruned, paper, grail)), *near, _with_share(best)),
                ]
            )
        header = ["calibrated on", "sites", "keep", "read on", "dense", "pruned"]
        header += ["the paper's way", "grail", "KL", "top-1", "uneven, producers"]
        return markdown(header, lines)

    def file(self, form: str, column: str, model: str = "uneven 0.5") -> float:
        """Returns a number of a GGUF file."""
        return self._files.value(column, model=model, format=form)

    def resnet(self, variant: str) -> str:
        """Returns the accuracy of ResNet-18 with half of its channels, by magnitude."""
        network = networks()["resnet18"]
        return number(network.score, network.values["magnitude", HALF, variant])

    def resnet_dense(self) -> str:
        """Returns the accuracy of the dense ResNet-18."""
        return networks()["resnet18"].dense

    def families(self) -> int:
        """Returns the count of model types on docs/families.md that can be compressed."""
        page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
        return len(re.findall("^\\| `", page.split("| model type | reason")[0], re.MULTILINE))


def _with_share(row: dict[str, Any] | None) -> str:
    """Returns the perplexity of a cell, and in brackets the share that it recovers."""
    if row is None:  # not measured
        return "–"
    shown, back = f"{float(row['perplexity']):.1f}", row["share"]
    return shown if back is None or back.value == 0 else f"{shown} ({back.value:.0%})"
