"""Damages files of state at random, and counts the damages that the reader finds.

    python -m bench.reliability.flipping --trials 1000 --output new/

Beside it: safetensors' own reader, which checks sizes and no content.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load

import grail
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from bench.tools.tables import aligned
from grail.errors import StateError

PAGE = 4096
DAMAGES = ("flipped bit", "truncation", "zeroed page", "bytes behind")


def flipped(data: bytes, place: int) -> bytes:
    """The data with one bit, the `place`-th, flipped."""
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes:
    """The data with one damage of `DAMAGES`, which changes at least one byte."""
    if kind == "flipped bit":
        return flipped(data, draw.randrange(8 * len(data)))
    if kind == "truncation":
        return data[: draw.randrange(len(data))]
    if kind == "bytes behind":
        return data + draw.randbytes(draw.randrange(1, PAGE))
    start = draw.randrange((len(data) + PAGE - 1) // PAGE) * PAGE
    end = min(start + PAGE, len(data))
    changed = data[:start] + bytes(end - start) + data[end:]
    return changed if changed != data else damaged(data, kind, draw)


def main() -> None:
    """Prints and writes a row for each kind of damage."""
    parser = CommandLine(
        __doc__,
        "trials",
        takes="minutes on one core",
        results="flipping",
        trials={"default": 1000, "help": "of each kind of damage (default 1000)"},
    )
    parser.add_argument("--channels", type=int, default=300)
    options = parser.read()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gram.state"
        gram = grail.Gram(options.channels, name="model.layers.3.mlp")
        gram.update(torch.randn(4096, options.channels))
        gram.save(path)
        rows = [_row(path, kind, options.trials) for kind in DAMAGES]
    print(aligned(list(rows[0]), [list(row.values()) for row in rows]))
    save(options, rows, ("found", "found by safetensors alone"))


def _row(path: Path, kind: str, trials: int) -> Row:
    data, draw = path.read_bytes(), random.Random(kind)
    found = Counter(dict.fromkeys(("grail", "safetensors"), 0))
    for _ in range(trials):
        path.write_bytes(changed := damaged(data, kind, draw))
        found["grail"] += _refuses(lambda: grail.Gram.load(path), StateError)
        found["safetensors"] += _refuses(lambda: load(changed), safetensors.SafetensorError)
    path.write_bytes(data)
    assert not _refuses(lambda: grail.Gram.load(path), StateError)
    return {
        "damage": kind,
        "bytes": str(len(data)),
        "trials": str(trials),
        "found": str(found["grail"]),
        "found by safetensors alone": str(found["safetensors"]),
    }


def _refuses(read: Callable[[], object], error: type[Exception]) -> bool:
    try:
        read()
    except error:
        return True
    return False


if __name__ == "__main__":
    main()
