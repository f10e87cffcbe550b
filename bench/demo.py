"""What `make demo` runs: a real language model, halved and restored by the command line.

SmolLM2-135M-Instruct (Apache-2.0) loses half of its MLP channels. Calibration and held-out text are
disjoint halves of the Python language reference, which every CPython brings along (PSF licence).
Everything else, the table and the report included, is `grail compress`.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from bench.assets import python_reference, smollm2, split_topics, write_texts
from grail.commands import app

# On 2 cores SmolLM2 reads about 760 tokens a second. 24k calibration tokens cost one compression of
# 1.5 forward passes (plain) and one of 2.5, 12k held-out tokens three: 4 minutes.
CALIBRATION_TOKENS = 24 * 1024
HELDOUT_TOKENS = 12 * 1024


def main() -> None:
    """Writes the two texts, and runs `grail compress` on them."""
    parser = argparse.ArgumentParser(description="Halves and restores SmolLM2-135M.")
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="replaced if there")
    parser.add_argument("--texts", type=Path, default=Path(".assets"), help="folder for the texts")
    folders = parser.parse_args()
    halves = split_topics(python_reference())
    calibration, heldout = write_texts("python", halves, folders.texts)
    if (folders.output / "report.json").is_file():  # only what an earlier run wrote
        shutil.rmtree(folders.output)
    folders.output.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["compress", str(smollm2()), "--keep", "0.5", "--sites", "mlp"]
    arguments += ["--calibration", str(calibration), "--tokens", str(CALIBRATION_TOKENS)]
    arguments += ["--evaluate", str(heldout), "--evaluate-tokens", str(HELDOUT_TOKENS)]
    arguments += ["--output", str(folders.output)]
    print(f"$ grail {shlex.join(arguments)}", file=sys.stderr)
    app(arguments)


if __name__ == "__main__":
    main()
