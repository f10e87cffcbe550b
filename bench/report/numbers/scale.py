"""Numbers of the page on large models: simulated, and measured at one small size."""

from bench.quality import simulate
from bench.report.numbers.rows import Rows


class Scale:
    """Numbers of the page on large models."""

    def __init__(self) -> None:
        self._simulated = Rows("simulated.csv")

    def table(self) -> str:
        """Returns the table of models that were simulated."""
        return simulate.markdown(self._simulated.all)

    def tokens(self) -> int:
        """Returns the calibration tokens of the simulated models."""
        rows = self._simulated.where(**{"simulated on": "assumed H100 rates"})
        (count,) = {int(row["tokens"]) for row in rows}
        return count

    def accuracy(self) -> float:
        """Returns the simulated time over the measured one, of SmolLM2-135M."""
        row = self._simulated.one(model="smollm2-135m")
        return float(row["total_s"]) / float(row["measured_total_s"])
