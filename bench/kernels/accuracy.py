"""Error and bias of a Gram matrix against the number of tokens, on activations with a mean.

    python -m bench.kernels.accuracy --output new/     writes new/accuracy_cpu.csv

Columns and providers: docs/benches.md.
"""

import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import grail_kernels as gk
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from bench.tools.tables import aligned
from grail_kernels import reference, tuning

CHANNELS = 128
MOST_TOKENS = 2**20
FEWEST_TOKENS = 2**8
BIAS_LIMIT = 1e-5
CHAINS = (tuning.CHAIN_TOKENS, 1024, 8192, 65_536, 2**30)
# Tokens that are taken to fp64 at a time.
_STEP = 2**16

Provider = tuple[str, str, torch.dtype, Callable[[Tensor], Tensor]]  # name, chain, of x, dense G


def providers(device: str, channels: int) -> Iterator[Provider]:
    """Every way from x [T, H] to its dense Gram matrix [H, H]."""

    def grail(chain: int) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            out = torch.zeros(gk.packed_numel(channels), device=device)
            with (
                mock.patch.object(tuning, "CHAIN_TOKENS", chain),
                mock.patch.object(tuning, "LAUNCHED_TOKENS", max(chain, tuning.LAUNCHED_TOKENS)),
                mock.patch.object(tuning, "token_splits", return_value=1),
            ):
                return gk.unpack(gk.gram_(out, x), channels)

        return call

    def addmm(x: Tensor) -> Tensor:
        zero = torch.zeros(channels, channels, device=device)
        if device == "cuda" and x.dtype != torch.float32:
            return torch.addmm(zero, x.T, x, out_dtype=torch.float32)
        return torch.addmm(zero, x.T, x)

    for dtype in (torch.float32, torch.bfloat16):
        # fp32 is multiplied in parts, a step at a time, whatever the chain.
        varies = device == "cuda" and dtype != torch.float32
        for chain in CHAINS if varies else (tuning.CHAIN_TOKENS,):
            yield "grail", str(chain) if varies else "", dtype, grail(chain)
        if device == "cuda" or dtype == torch.float32:
            yield "addmm", "", dtype, addmm
    yield "mm", "", torch.bfloat16, lambda x: x.T @ x


def measure(
    device: str, most: int, channels: int = CHANNELS, deadline: float = float("inf")
) -> list[Row]:
    """A row for each provider and power of two of tokens, up to `most`, until `deadline`."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(most, channels, generator=generator, device=device).add_(0.5)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        few = given[:FEWEST_TOKENS]
        ours = [p for p in providers(device, channels) if p[2] == dtype and _works(p, few)]
        for tokens, exact, magnitude in _exact(given):
            for name, chain, _, call in ours:
                if time.monotonic() > deadline:
                    return rows
                result = call(given[:tokens])
                bias = (result.diagonal() - exact.diagonal()) / exact.diagonal()
                rows.append(
                    {"kernel": "accuracy", "provider": name, "chain": chain}
                    | {"dtype": str(dtype).removeprefix("torch."), "tokens": str(tokens)}
                    | {"channels": str(channels), "diagonal_bias": f"{bias.mean().item():.4g}"}
                    | {"error": f"{reference.error_ratio(result.float(), exact, magnitude):.4g}"}
                )
    return rows


def _works(provider: Provider, x: Tensor) -> bool:
    """Tries the call of a library, which may be absent here; grail has to make it."""
    name, _, dtype, call = provider
    try:
        call(x)
    except (RuntimeError, TypeError) as problem:
        if name == "grail":
            raise
        print(f"{name} in {dtype} left out: {str(problem).splitlines()[0]}")
        return False
    return True


def _exact(x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """X^T X and |X|^T|X| in fp64 of the first 2^k tokens of x, for every k; tokens beside them."""
    exact = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    magnitude = torch.zeros_like(exact)
    done, tokens = 0, FEWEST_TOKENS
    while tokens <= x.shape[0]:
        for part in x[done:tokens].split(_STEP):
            exact += reference.gram(part)
            magnitude += reference.gram(part.abs())
        done = tokens
        yield tokens, exact, magnitude
        tokens *= 2


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if grail's sums are biased."""
    parser = CommandLine(
        __doc__,
        *("device", "threads"),
        takes="minutes on 2 cores; fewer --tokens, less time",
        results="accuracy{device}",
        device={"default": "cpu"},
    )
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="the most (default 2^20)")
    parser.add_argument("--channels", type=int, default=CHANNELS, help="default %(default)s")
    options = parser.read(arguments)
    rows = measure(options.device, options.tokens, options.channels)
    names = ("provider", "dtype", "chain", "tokens", "error", "diagonal_bias")
    print(aligned(names, [[row[name] for name in names] for row in rows], words=3))
    save(options, rows, ("error", "diagonal_bias"))
    return int(bool(biased(rows)))


def biased(rows: list[Row]) -> list[Row]:
    """The rows in which grail, with shipped settings, has a bias beyond the target."""
    shipped = ("", str(tuning.CHAIN_TOKENS))
    return [
        row
        for row in rows
        if row["provider"] == "grail"
        and row["chain"] in shipped
        and not abs(float(row["diagonal_bias"])) < BIAS_LIMIT
    ]


if __name__ == "__main__":
    raise SystemExit(main())
