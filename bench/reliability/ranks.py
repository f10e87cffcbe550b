"""One model compressed by 1, 2 and 4 processes of one machine: weights, wall time, bytes sent.

    python -m bench.reliability.ranks --output bench/results     bench/results/ranks.csv

Each process has one thread. With fewer free cores than processes the time is no measure of scaling.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from transformers import LlamaConfig, LlamaForCausalLM

import grail
from bench.quality.shapes import llama
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from bench.tools.tables import aligned

COUNTS = (1, 2, 4)


def _network() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=997, **llama(192, 512, 2, 6, 3))).eval()


def _work(number: int, count: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/meeting", rank=number, world_size=count
    )
    batches = list(torch.randint(997, (8, 4, 128), generator=torch.Generator().manual_seed(1)))
    model = _network()
    dist.barrier()
    start = time.perf_counter()
    report = grail.compress(model, batches, keep=0.5, sites=("mlp", "heads"), progress=False)
    found = {
        "seconds": time.perf_counter() - start,
        "sent": report.memory.get("sent", 0),
        "tokens": report.calibration["tokens"],
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
    }
    torch.save(found, Path(place) / str(number))
    dist.destroy_process_group()


def measure() -> list[Row]:
    """A row for each number of processes."""
    rows: list[Row] = []
    alone: dict[str, torch.Tensor] = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as place:
            start_processes(_work, (count, place), count, start_method="forkserver")
            found = [torch.load(Path(place) / str(number)) for number in range(count)]
        weights = found[0]["weights"]
        alone = alone or weights
        equal = all(
            torch.equal(f["weights"][name], weights[name]) for f in found for name in weights
        )
        apart = max(
            ((weights[name] - w).norm() / w.norm().clamp_min(1e-30)).item()
            for name, w in alone.items()
        )
        rows.append(
            {
                "processes": str(count),
                "tokens": str(found[0]["tokens"]),
                "seconds": f"{max(f['seconds'] for f in found):.2f}",
                "bytes": str(sum(f["sent"] for f in found)),
                "apart": f"{apart:.2g}",  # relative, from one process, the largest of a weight
                "all equal": str(equal),
            }
        )
    return rows


def main() -> None:
    """Measures, prints, saves."""
    options = CommandLine(__doc__, takes="a minute on 2 cores", results="ranks").read()
    multiprocessing.set_forkserver_preload(["bench.reliability.ranks"])
    rows = measure()
    print(aligned(list(rows[0]), [list(row.values()) for row in rows]))
    save(options, rows, ("seconds", "bytes", "apart", "all equal"))


if __name__ == "__main__":
    main()
