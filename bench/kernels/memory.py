"""Memory of one site's statistics against its channels: grail's accumulator beside a dense fp32 G.

    python -m bench.kernels.memory --csv bench/results/memory_cpu.csv

Bytes that torch allocates, so they are exact and the same on every machine of a kind.

Providers
  grail            grail.Gram: the packed lower triangle, sums, counts
  grail, buffered  the same, which collects 8192 tokens before it touches G, as it does on a GPU
  dense            G [H, H] fp32, to which every batch is added in place, upcast
Metrics
  accumulator  what is held between batches, once there are tokens
  peak         the most while batches of 512 bf16 tokens come in, beside the batch itself
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import grail
from bench.tools.allocations import peak_bytes
from bench.tools.measuring import Row, command_line, machine, write_rows
from grail_kernels.tuning import BUFFER_TOKENS

CHANNELS = (576, 1536, 2560, 4096, 8192, 11_008)
BATCH_TOKENS = 512
# As many batches as fill the buffer, and one that empties it.
BATCHES = BUFFER_TOKENS // BATCH_TOKENS + 1


def _grail(buffer: int, batches: int, x: Tensor) -> object:
    gram = grail.Gram(x.shape[1], device=x.device, buffer=buffer)
    for _ in range(batches):
        gram.update(x)
    return gram


def _dense(batches: int, x: Tensor) -> object:
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for _ in range(batches):
        copy = x.float()
        total.addmm_(copy.T, copy)
    return total


PROVIDERS: dict[str, Callable[[int, Tensor], object]] = {
    "grail": partial(_grail, 0),
    "grail, buffered": partial(_grail, BUFFER_TOKENS),
    "dense": _dense,
}


def formula(provider: str, channels: int) -> int:
    """Bytes that `provider` holds between batches, as documented."""
    if provider == "dense":
        return 4 * channels**2
    buffer = 2 * BUFFER_TOKENS * channels if provider == "grail, buffered" else 0
    return 2 * channels * (channels + 256) + buffer


def measure(channels: int, device: str) -> list[Row]:
    """The rows of one width."""
    x = torch.randn(BATCH_TOKENS, channels, device=device).bfloat16()
    rows = []
    for name, call in PROVIDERS.items():
        held: list[object] = []
        few = 1 if name == "grail, buffered" else 0  # the buffer comes with the first batch
        found = {
            "accumulator": peak_bytes(lambda c=call, n=few, h=held: h.append(c(n, x)), device),
            "peak": peak_bytes(partial(call, BATCHES, x), device),
            "formula": formula(name, channels),
        }
        rows += [
            {"kernel": "memory", "provider": name, "metric": metric, "unit": "B"}
            | {"dtype": "bf16", "channels": str(channels), "p50": str(value)}
            for metric, value in found.items()
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = command_line(
        __doc__,
        writes="a table to the screen; a CSV with --csv",
        takes="minutes on 2 cores",
    )
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--csv", type=Path, help="write every number here, in long format")
    options = parser.parse_args(arguments)
    conditions = machine(options.device)
    rows = []
    for channels in options.channels:
        for row in measure(channels, options.device):
            share = int(row["p50"]) / (4 * channels**2)
            print(f"{channels:7} {row['provider']:16} {row['metric']:12} {share:6.3f} of 4H²")
            rows.append(row | conditions)
    if options.csv:
        write_rows(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
