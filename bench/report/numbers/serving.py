"""Numbers of compressed models in the runtimes that serve them."""

import math

from bench.quality import onnx, serving, vllm
from bench.report.numbers.rows import Rows
from bench.tools.measuring import Row
from bench.tools.tables import markdown

IMATRIX_FORMATS = ("Q4_1", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
WAYS = ("none", "grail", "llama.cpp")


class Serving:
    """Numbers of the pages below docs/serving."""

    def __init__(self) -> None:
        self._files, self._imatrix = Rows("serving.csv"), Rows("imatrix.csv")
        self._quantising, self._vllm = Rows("quantising.csv"), Rows("vllm.csv")
        self._onnx = Rows("onnx.csv")
        # Conditions of one compressed file whose speed was measured.
        self.conditions = self._files.one(model="even 0.5", format="Q8_0")

    def files(self) -> str:
        """Returns the table of GGUF files: size, perplexity, speed over the dense file's."""
        return markdown(*serving.table(self._files.all))

    def exact(self) -> str:
        """Returns the table of files in float32 beside the folder that they were made of."""
        rows = [
            [
                row["model"],
                row["widths"].replace("-", " to "),
                f"`{row['architecture']}`",
                f"{int(row['bytes']) / 1e6:.0f} MB",
                power(float(row["difference"])),
                f"{100 * float(row['agreement']):g}%",
            ]
            for row in self._files.where(format="F32")
        ]
        header = ["model", "widths", "architecture", "size", "difference", "same best token"]
        return markdown(header, rows)

    def imatrix(self) -> str:
        """Returns the table of importance matrices: perplexity by format."""
        rows = []
        for form in IMATRIX_FORMATS:
            ways = [self.imatrix_row(form, way) for way in WAYS]
            size = f"{int(ways[0]['bytes']) / 1e6:.0f} MB"
            rows.append([form, size, *(f"{float(row['perplexity']):.1f}" for row in ways)])
        return markdown(
            ["format", "size", "without", "`grail export --imatrix`", "`llama-imatrix`"], rows
        )

    def imatrix_row(self, form: str = "F32", way: str = "none") -> Row:
        """Returns the row of a format; of F32 there is one, without a matrix."""
        return self._imatrix.one(format=form, matrix=way)

    def imatrix_error(self) -> float:
        """Returns the largest standard error over its perplexity."""
        return max(
            float(row["standard_error"]) / float(row["perplexity"]) for row in self._imatrix.all
        )

    def quantised(self, model: str, column: str = "perplexity") -> float:
        """Returns a number of a model quantised to Q4_1, or of the dense or restored one."""
        return self._quantising.value(column, model=model, text="brown")

    def quantised_share(self, model: str) -> float:
        """Returns the share of the log-perplexity lost by rounding to nearest that is recovered."""
        exact, rounded, found = (
            math.log(self.quantised(name)) for name in ("restored", "rounded to nearest", model)
        )
        return (rounded - found) / (rounded - exact)

    def onnx(self) -> str:
        """Returns the table of vision networks in ONNX Runtime and OpenVINO."""
        return markdown(*onnx.table(self._onnx.all))

    def vllm(self) -> str:
        """Returns the table of folders in vLLM, beside transformers."""
        return vllm.page_table(self._vllm.all)

    def vllm_version(self) -> str:
        """Returns the version of vLLM that was measured, "0.32"."""
        (name,) = {row["runtime"] for row in self._vllm.all if row["runtime"]}
        return name.split()[-1].rpartition(".")[0]


def power(number: float) -> str:
    """Returns a small number in two digits, "5.7e-6"."""
    return f"{number:.1e}".replace("e-0", "e-")
