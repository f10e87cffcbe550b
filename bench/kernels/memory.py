"""Memory of one site's statistics against its channels: grail's accumulator and a dense fp32 G.

    python -m bench.kernels.memory --output new/     writes new/memory_cpu.csv

Columns and providers: docs/benches.md.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import grail
from bench.tools.allocations import peak_bytes
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from bench.tools.tables import aligned
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
    """Measures, prints, saves."""
    parser = CommandLine(
        __doc__,
        "device",
        takes="minutes on 2 cores",
        results="memory{device}",
        device={"default": "cpu"},
    )
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    options = parser.read(arguments)
    rows = [row for channels in options.channels for row in measure(channels, options.device)]
    shares = (f"{int(row['p50']) / (4 * int(row['channels']) ** 2):.3f}" for row in rows)
    names = ("provider", "metric", "channels")
    lines = [
        [*(row[name] for name in names), share] for row, share in zip(rows, shares, strict=True)
    ]
    print(aligned((*names, "of 4H²"), lines, words=2))
    save(options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
