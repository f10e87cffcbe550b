"""Continuous work through every path of the library, with the memory that it holds.

    python -m bench.reliability.soak --minutes 30 --csv bench/results/soak.csv

One process updates, merges, saves and loads Grams, fits and compresses small networks, over and
over. Once a minute a row says how many rounds were done, the resident set, and how many tensors
are alive. Exits with 1 if the last third of the rows holds more than 5% above the first, after a
warm-up.
"""

import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import grail
from bench.quality.networks import ResNet
from bench.tools.measuring import Row, command_line, machine, write_rows
from grail.algebra.drift import Drift
from grail.runtime import memory

WARM_UP = 3  # rows that count for nothing
LIMIT = 1.05


def one_round(generator: torch.Generator, folder: Path) -> None:
    """Every path once."""
    grams = []
    for dtype in (torch.float32, torch.bfloat16):
        gram = grail.Gram(192, name="soak")
        for tokens in (1, 63, 300):
            x = torch.randn(tokens, 192, generator=generator).to(dtype)
            mask = torch.rand(tokens, generator=generator) > 0.2
            mask[0] = True
            gram.update(x, mask, torch.randn(tokens, 40, generator=generator))
        gram.update(torch.randn(192, 50, generator=generator).to(dtype).T)
        grams.append(gram)
    grams[0].merge(grams[1])
    grams[0].save(folder / "gram.state")
    loaded = grail.Gram.load(folder / "gram.state")
    weight = torch.randn(40, 192, generator=generator)
    for reduction in (grail.Selection(range(0, 192, 2), 192), grail.Folding([*range(96)] * 2)):
        for affine in (False, True):
            grail.fit(
                loaded,
                reduction,
                weight,
                alpha="auto",
                drift_correction="auto",
                toward="baseline",
                fit_bias=affine,
                held_out=grams[1],
            )
    network = ResNet(channels=1, width=4)
    images = [torch.randn(8, 1, 28, 28, generator=generator) for _ in range(2)]
    for selector in ("greedy", "folding-kmeans"):
        grail.compress(network, images, 0.7, selector=selector, progress=False)
    mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))
    rows = [torch.randn(64, 24, generator=generator) for _ in range(2)]
    grail.compress(mlp, rows, 0.5, grail.trace(mlp), fit_bias=True, progress=False)


def tensors() -> int:
    """How many are alive."""
    gc.collect()
    return sum(issubclass(type(found), (torch.Tensor, Drift)) for found in gc.get_objects())


def main() -> None:
    """Command line of this file."""
    parser = command_line(
        __doc__,
        writes="rows to the screen; a CSV with --csv",
        takes="--minutes",
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--csv", type=Path, help="file for the rows; default: only shown")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    start, rounds = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < arguments.minutes:
            one_round(generator, Path(folder))
            rounds += 1
            if time.monotonic() - start < 60 * (len(rows) + 1):
                continue
            rows.append(
                {
                    "minute": round((time.monotonic() - start) / 60, 1),
                    "rounds": rounds,
                    "resident_bytes": memory.in_use(torch.device("cpu")),
                    "tensors": tensors(),
                    **machine("cpu"),
                }
            )
            print(", ".join(f"{k}={v}" for k, v in list(rows[-1].items())[:4]), flush=True)
            if arguments.csv:
                write_rows(arguments.csv, rows)
    if flat := growth([int(str(row["resident_bytes"])) for row in rows]):
        print(f"memory of the last third over the first: {flat:.3f}")
        sys.exit(flat > LIMIT)


def growth(resident: list[int]) -> float | None:
    """The last third's median over the first's, after the warm-up; None for too few rows."""
    kept = resident[WARM_UP:]
    third = len(kept) // 3
    return statistics.median(kept[-third:]) / statistics.median(kept[:third]) if third else None


if __name__ == "__main__":
    main()
