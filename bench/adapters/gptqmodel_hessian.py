"""GPTQModel's `GPTQ`: calls of add_batch and one materialize_global_hessian, alone and with grail.

    python -m bench.adapters.gptqmodel_hessian --output new/     in an environment with gptqmodel

Columns of the table: milliseconds of both, theirs over ours; and ours over theirs of the memory of
the sums between calls (held), and of what torch allocates at the peak of all calls, with fp32
copies of the input (calls), and of materialising as well, with the dense H (peak). The CSV has
bytes. Where an H differs by more than 1e-6 of its
norm, its case gets no times and the exit code is 1.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.tools.allocations import peak_bytes
from bench.tools.commandline import DTYPES, CommandLine, save
from bench.tools.measuring import Row, percentiles, time_in_turns
from bench.tools.tables import aligned
from grail_kernels import cpu_blas

CHANNELS = (576, 1536, 4096)
TOKENS = (256, 512, 2048)  # of a call
CALLS = 4
LARGEST_ERROR = 1e-6

Context = Callable[[], AbstractContextManager[None]]


def _task(channels: int, dtype: torch.dtype) -> Any:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(channels, 8, bias=False, dtype=dtype)
    return GPTQ(layer, QuantizeConfig(offload_to_disk=False))


def _added(task: Any, context: Context, x: Tensor) -> None:
    task.H = None  # each layer has its own
    with context():
        for _ in range(CALLS):
            task.add_batch(x, None)


def _hessian(task: Any, context: Context, x: Tensor) -> Tensor:
    task.H = None
    with context():
        for _ in range(CALLS):
            task.add_batch(x, None)
        H: Tensor = task.finalize_hessian()
    return H


def _forget(task: Any) -> None:
    """Frees what a call before has left: H, and the fp32 copy of 16-bit inputs that grail keeps."""
    task.H = None
    cpu_blas._copies.clear()


def _memory(task: Any, context: Context, x: Tensor) -> Iterator[tuple[str, int]]:
    """Bytes, by metric. The adapter stays installed: when it is removed, sums become dense."""
    with context():
        _forget(task)
        peak = peak_bytes(lambda: _added(task, nullcontext, x))
        sums = task._device_hessian_partials.values()
        held = [s if isinstance(s, Tensor) else list(s.parts().values()) for s in sums]
        parts = [part for each in held for part in (each if isinstance(each, list) else [each])]
        yield "held", sum(part.nbytes for part in parts)
        yield "calls", peak
        del sums, held, parts
        task.finalize_hessian()
        _forget(task)
        yield "peak", peak_bytes(lambda: _hessian(task, nullcontext, x))


def _case(
    providers: dict[str, Context], channels: int, tokens: int, dtype: str, repeats: int
) -> list[Row]:
    """The rows of one case; none where the H of grail is wrong."""
    task = _task(channels, DTYPES[dtype])
    inputs = [torch.randn(tokens, channels).to(DTYPES[dtype]) for _ in range(2)]
    found = [_hessian(task, context, inputs[0]) for context in providers.values()]
    if (found[0] - found[1]).norm() > LARGEST_ERROR * found[1].norm():
        return []
    del found
    shape = {"dtype": dtype, "channels": str(channels), "tokens": str(tokens), "calls": str(CALLS)}
    rows: list[Row] = []
    for name, context in providers.items():
        memory = dict(_memory(task, context, inputs[0]))
        rows += [
            {"provider": name, "metric": metric, "unit": "B", **shape, "p50": str(value)}
            for metric, value in memory.items()
        ]
    calls = {name: lambda x, c=context: _hessian(task, c, x) for name, context in providers.items()}
    for name, seconds in time_in_turns(calls, inputs, repeats).items():
        rows.append({"provider": name, "metric": "time", "unit": "s", **shape})
        rows[-1] |= percentiles(seconds)
    return rows


def _line(rows: list[Row]) -> list[str]:
    values = {(row["provider"], row["metric"]): float(row["p50"]) for row in rows}
    theirs, ours = values["gptqmodel", "time"], values["grail", "time"]
    shares = [
        values["grail", metric] / values["gptqmodel", metric]
        for metric in ("held", "calls", "peak")
    ]
    return [
        *(rows[0][name] for name in ("dtype", "channels", "tokens")),
        *(f"{1e3 * theirs:.1f}", f"{1e3 * ours:.1f}", f"{theirs / ours:.2f}"),
        *(f"{share:.2f}" for share in shares),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves."""
    parser = CommandLine(
        __doc__,
        *("threads", "repeats", "dtype"),
        takes="3 minutes on 2 cores",
        results="adapters_gptqmodel",
        repeats={"default": 5},
    )
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of a call")
    options = parser.read(arguments)
    from grail.adapters import gptqmodel

    providers: dict[str, Context] = {"gptqmodel": nullcontext, "grail": gptqmodel.installed}
    cases = [
        _case(providers, channels, tokens, dtype, options.repeats)
        for channels in options.channels
        for tokens in options.tokens
        for dtype in options.dtype or ("fp32", "bf16")
    ]
    header = ("dtype", "channels", "tokens", "theirs", "ours", "x", "held", "calls", "peak")
    print(aligned(header, [_line(rows) for rows in cases if rows]))
    version = {"gptqmodel": gptqmodel.LIBRARY.version}
    save(options, [row | version for rows in cases for row in rows])
    return int(not all(cases))


if __name__ == "__main__":
    raise SystemExit(main())
