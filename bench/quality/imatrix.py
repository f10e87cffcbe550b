"""The importance matrix of `grail export --imatrix` beside that of stock `llama-imatrix`.

    python -m bench.quality.imatrix --tools LLAMA/build/bin --work .imatrix --output bench/results

SmolLM2-135M with half of each MLP, even and uneven, calibrated on half of the Brown corpus. Each
file is quantised by stock `llama-quantize` without an importance matrix, with GRAIL's and with that
of `llama-imatrix` of as many tokens of the same text. Perplexity is that of `llama-perplexity` on
the other half, in windows of 512 tokens. Rows that the CSV has are not measured again.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.tools import assets
from bench.tools.commandline import CommandLine
from bench.tools.measuring import ROOT, Row, Table
from bench.tools.tables import aligned

MODELS: dict[str, list[str]] = {"even": [], "uneven": ["--uneven"]}
FORMATS = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_1")
MATRICES = ("none", "grail", "llama.cpp")
KEY = ("model", "format", "matrix")
CALIBRATION = ROOT / ".assets" / "brown-calibration.txt"
HELDOUT = ROOT / ".assets" / "brown-heldout.txt"
WINDOW = 512


def run(command: list[str | Path]) -> str:
    """Runs a program and returns what it printed.

    Raises:
        RuntimeError: it fails, with the end of what it printed.
    """
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout[-2000:]}")
    return done.stdout


def folder(model: str, options: argparse.Namespace) -> Path:
    """Returns a folder with a compressed model, its file and both matrices; made if missing."""
    made: Path = options.work / model
    grail = [sys.executable, "-m", "grail"]
    if not made.is_dir():
        calibration = ["--calibration", CALIBRATION, "--tokens", options.tokens]
        command = [*grail, "compress", assets.smollm2(), "--keep", "0.5", *calibration]
        run([*command, "--no-progress", *MODELS[model], "--output", made])
    if not (file := made / "f32.gguf").is_file():
        run([*grail, "export", made, "--gguf", file])
    if not (own := made / "grail.gguf").is_file():
        run([*grail, "export", made, "--imatrix", own])
    if not (stock := made / "llama.cpp.gguf").is_file():
        model_and_text = ["-m", file, "-f", CALIBRATION, "-t", options.threads or 1]
        chunks = ["-c", WINDOW, "--chunks", options.tokens // WINDOW, "--no-ppl"]
        run([options.tools / "llama-imatrix", *model_and_text, "-o", stock, *chunks])
    return made


def sums(path: Path) -> dict[str, np.ndarray]:
    """Returns the mean square of each channel by the name of the matrix."""
    import gguf

    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): values.ravel()
        / stored[f"{name.removesuffix('.in_sum2')}.counts"].ravel()
        for name, values in stored.items()
        if name.endswith(".in_sum2")
    }


def difference(own: Path, stock: Path) -> str:
    """Describes how two importance matrices of the same model differ."""
    one, other = sums(own), sums(stock)
    if one.keys() != other.keys():
        return f"other names: {sorted(one.keys() ^ other.keys())[:4]}"
    pairs = [(one[name], other[name]) for name in one if one[name].shape == other[name].shape]
    alike = [float(np.corrcoef(np.log(a[a > 0]), np.log(b[a > 0]))[0, 1]) for a, b in pairs]
    scale = [float(np.median(a[b > 0] / b[b > 0])) for a, b in pairs]
    zeros = all(((a == 0) == (b == 0)).all() for a, b in pairs)
    return (
        f"{len(one)} matrices, {len(pairs)} of the same shape; correlation of the logarithms "
        f"{min(alike):.4f} to {max(alike):.4f}; median ratio {min(scale):.3f} to {max(scale):.3f}; "
        f"zeros {'in the same' if zeros else 'in other'} channels"
    )


def perplexity(file: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Returns perplexity of the held-out text in llama.cpp, and its standard error."""
    command = [options.tools / "llama-perplexity", "-m", file, "-f", HELDOUT, "-c", WINDOW]
    said = run([*command, "--chunks", options.chunks, "-t", options.threads or 1])
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", said)
    if found is None:
        raise RuntimeError(f"llama-perplexity names no perplexity: {said[-500:]}")
    return float(found[1]), float(found[2])


def rows(options: argparse.Namespace, table: Table) -> Iterator[Row]:
    """Yields the rows that the table has not."""
    cases = [("F32", "none"), *((f, m) for f in FORMATS for m in MATRICES)]
    for model in MODELS:
        made = folder(model, options)
        print(model, difference(made / "grail.gguf", made / "llama.cpp.gguf"), flush=True)
        for form, matrix in cases:
            if table.measured(model, form, matrix):
                continue
            file = made / ("f32.gguf" if form == "F32" else "quantised.gguf")
            if form != "F32":
                given = [] if matrix == "none" else ["--imatrix", made / f"{matrix}.gguf"]
                command = [options.tools / "llama-quantize", *given, made / "f32.gguf", file, form]
                run([*command, options.threads or 1])
            found, error = perplexity(file, options)
            yield {
                "model": model,
                "format": form,
                "matrix": matrix,
                "perplexity": f"{found:.4f}",
                "standard_error": f"{error:.4f}",
                "bytes": file.stat().st_size,
                "heldout_tokens": options.chunks * WINDOW,
                "calibration_tokens": options.tokens,
            }


def main() -> None:
    """Measures what is missing and prints a table."""
    parser = CommandLine(__doc__, "threads", takes="about 20 minutes on one CPU", rows="imatrix")
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--work", type=Path, required=True, help="folder for models; kept")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 held-out tokens")
    options = parser.read()
    table = Table(options.output, KEY)
    for row in rows(options, table):
        table.add(row)
    by = {tuple(row[key] for key in KEY): row["perplexity"] for row in table.rows}
    lines = [
        [model, form, *(by.get((model, form, matrix), "") for matrix in MATRICES)]
        for model, form in dict.fromkeys(key[:2] for key in by)
    ]
    print(aligned(("model", "format", *MATRICES), lines, words=2))


if __name__ == "__main__":
    main()
