"""Runs a function in several processes of a gloo group, as `grail.runtime.processes` needs them."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import grail

# What hangs is to fail within the test.
TIMEOUT = timedelta(seconds=30)

# Imports this module once for all processes, which are then forked from there.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.processes"])


def run(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(number, *arguments)` returned in each of the processes.

    An exception is returned as "Name: message". A process that ended without a word gives None.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        workers = [
            _CONTEXT.Process(target=_work, args=(place, number, count, function, arguments))
            for number in range(count)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(2 * TIMEOUT.total_seconds())
        hung = [worker for worker in workers if worker.is_alive()]
        for worker in hung:
            worker.kill()
        assert not hung, f"{len(hung)} of {count} processes hung"
        found = [place / str(number) for number in range(count)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def _work(
    place: Path,
    number: int,
    count: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/meeting",
        rank=number,
        world_size=count,
        timeout=TIMEOUT,
    )
    try:
        result = function(number, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        if not type(error).__module__.startswith("grail"):
            result += "\n" + traceback.format_exc()
    torch.save(result, place / str(number))
    dist.destroy_process_group()


def compressed(number: int, kind: str, batches: list[Any], options: dict[str, Any]) -> Any:
    """Compresses a network of `networks` in this process; its weights, and the report's rows."""
    model = network(kind)
    report = grail.compress(model, batches, progress=False, **options)
    rows = [vars(row) for row in report.sites]
    return {"weights": model.state_dict(), "rows": rows, "calibration": report.calibration}


def network(kind: str) -> Any:
    """A tiny Llama, or a mixture of experts, the same in every process."""
    shared = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared)).eval()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**shared, **experts)).eval()
