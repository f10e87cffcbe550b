"""Continuous work through every path of the library, and the memory that it holds.

    python -m bench.reliability.soak --minutes 30 --output bench/results     bench/results/soak.csv

One process updates, merges, saves and loads Grams, fits and compresses small networks, over and
over. A row a minute: rounds done, resident set, live tensors. Exits with 1 if the last third of the
rows holds more than 5% above the first, after a warm-up.
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
from bench.tools.commandline import CommandLine, write
from bench.tools.measuring import Row
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
            settings = {"alpha": "auto", "drift_correction": "auto", "toward": "baseline"}
            grail.fit(loaded, reduction, weight, fit_bias=affine, held_out=grams[1], **settings)
    network = ResNet(channels=1, width=4)
    images = [torch.randn(8, 1, 28, 28, generator=generator) for _ in range(2)]
    for selector in ("greedy", "folding-kmeans"):
        grail.compress(network, images, 0.7, selector=selector, progress=False)
    mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))
    rows = [torch.randn(64, 24, generator=generator) for _ in range(2)]
    grail.compress(mlp, rows, 0.5, grail.trace(mlp), fit_bias=True, progress=False)


def tensors() -> int:
    """The number of live tensors."""
    gc.collect()
    return sum(issubclass(type(found), (torch.Tensor, Drift)) for found in gc.get_objects())


def main() -> None:
    """Works, prints and writes a row a minute."""
    parser = CommandLine(__doc__, takes="--minutes", results="soak")
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.read()
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    start, rounds = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < options.minutes:
            one_round(generator, Path(folder))
            rounds += 1
            minutes = (time.monotonic() - start) / 60
            if minutes < len(rows) + 1:
                continue
            resident = memory.in_use(torch.device("cpu"))
            row = {"minute": round(minutes, 1), "rounds": rounds, "resident_bytes": resident}
            rows.append({k: str(v) for k, v in (row | {"tensors": tensors()}).items()})
            print(", ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
            write(options, rows)
    if flat := growth([int(row["resident_bytes"]) for row in rows]):
        print(f"memory of the last third over the first: {flat:.3f}")
        sys.exit(flat > LIMIT)


def growth(resident: list[int]) -> float | None:
    """The last third's median over the first's, after the warm-up; None for too few rows."""
    kept = resident[WARM_UP:]
    third = len(kept) // 3
    return statistics.median(kept[-third:]) / statistics.median(kept[:third]) if third else None


if __name__ == "__main__":
    main()
