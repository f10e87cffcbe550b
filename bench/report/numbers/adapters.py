"""Numbers of the adapters in the libraries that they attach to."""

import statistics

from bench.report.numbers.rows import Rows
from bench.tools.adapters import LIBRARIES
from bench.tools.tables import markdown

WAYS = {
    "dense": "dense",
    "alone": "Torch-Pruning alone",
    "alone, batch norms reset": "alone, batch norms measured again",
    "compensate": "`compensate`",
    "prune": "`prune`",
}


class Adapters:
    """Numbers of the pages below docs/adapters."""

    def __init__(self) -> None:
        self._llmcompressor = Rows("adapters_llmcompressor.csv")
        self._torch_pruning = Rows("adapters_torch_pruning.csv")

    def version(self, library: str) -> str:
        """Returns the version of a library with which its adapter is tested."""
        return LIBRARIES[library].version

    def perplexity(self, metric: str) -> float:
        """Returns a result of SmolLM2 in llm-compressor, such as the perplexity "restored"."""
        return self._llmcompressor.value("p50", case="e2e", metric=metric)

    def cpu_speeds(self) -> list[float]:
        """Returns llm-compressor's CPU time of a Hessian over the adapter's, in rising order."""
        cases = {row["case"] for row in self._llmcompressor.where(metric="cpu")} - {"oneshot"}
        return sorted(
            self._ratio("cpu", case=case, dtype=dtype)
            for case in cases
            for dtype in ("fp32", "bf16")
        )

    def memory(self, metric: str) -> float:
        """Returns the adapter's bytes over llm-compressor's: "held", or at the peak "readout"."""
        return 1 / self._ratio(metric, case="oneshot", dtype="fp32")

    def _ratio(self, metric: str, **columns: str) -> float:
        library, ours = (
            self._llmcompressor.value("p50", provider=name, metric=metric, **columns)
            for name in ("llmcompressor", "grail")
        )
        return library / ours

    def torch_pruning(self) -> str:
        """Returns the table of ways to prune ResNet-18; means of the draws."""
        rows = []
        for way, name in WAYS.items():
            accuracy, returned, parameters = (
                statistics.mean(self._torch_pruning.values(column, way=way))
                for column in ("accuracy", "returned", "parameters")
            )
            share = f"{returned:.0%}" if returned else "–"
            rows.append([name, f"{parameters / 1e6:.2f} M", f"{accuracy:.2%}", share])
        return markdown(["", "parameters", "test accuracy", "share of the loss recovered"], rows)
