"""The static launch table: which row a call gets, and which tables are refused."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import GrailError, gram_serve, tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_call import GramCall


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    tuning.read_table.cache_clear()
    gram_serve.forget_forms()


def launch(**row: object) -> tuning.GramConfig:
    """A launch of odd values for every call, or what `row` says."""
    return tuning.GramConfig(**{**OWN, **row})


OWN: dict[str, Any] = {
    "kernel": "pointers",
    "block_tokens": 32,
    "block_channels": 64,
    "group": 4,
    "warps": 4,
    "stages": 4,
}


def test_an_architecture_without_a_row_takes_the_default(own_table: Path) -> None:
    edit(own_table, lambda table: table.update(sm_90={"gram": {"16-bit": {"wide": [OWN]}}}))
    found = {
        architecture: tuning.gram_launches(torch.bfloat16, 4096, architecture=architecture)
        for architecture in ("sm_90", "sm_80")
    }
    assert found["sm_90"] == (launch(),)
    assert found["sm_80"] == tuning.gram_launches(torch.bfloat16, 4096)
    assert tuning.gram_launches(torch.bfloat16, 64, architecture="sm_90") == tuning.gram_launches(
        torch.bfloat16, 64
    )


def test_a_call_takes_the_first_kernel_that_can_serve_it(own_table: Path) -> None:
    gram_launch = pytest.importorskip("grail_kernels.gram_launch")
    rows = [{**OWN, "kernel": "tma"}, {**OWN, "group": 9}]
    edit(
        own_table, lambda table: table.update(interpreter={"gram": {"split": {"scattered": rows}}})
    )
    x, out = torch.zeros(1, 1, 5, 40), torch.zeros(1, gk.packed_numel(40))
    part = GramCall(out, x, None, None, None, None)
    takes = {"plain": part, "weighted": part._replace(weights=torch.zeros(5))}
    found = {name: gram_launch.config_of(part) for name, part in takes.items()}
    engine = gram_launch.gram_tma.runs_on(torch.device("cpu"))
    assert found == {
        "plain": launch(kernel="tma") if engine else launch(group=9),
        "weighted": launch(group=9),
    }


@pytest.mark.parametrize(
    ("operands", "dtype", "channels"),
    [
        ("16-bit", torch.bfloat16, 64),
        ("split", torch.float32, 64),
        ("split", torch.float32, 128),
        ("split", torch.float32, 1024),
    ],
    ids=lambda value: str(value),
)
def test_an_h100_takes_the_kernel_that_was_faster_on_it(
    operands: str, dtype: torch.dtype, channels: int
) -> None:
    """By the fastest launch of either, where both were timed at one shape."""
    best = {"gram": math.inf, "gram_tma": math.inf}
    for row in csv.DictReader(TIMED.open()):
        kernel, of, _ = row["row"].split("/")
        if row["p50"] and of == operands and row["shape"].endswith(f" {channels} channels"):
            best[kernel] = min(best[kernel], float(row["p50"]))
    assert max(best.values()) < 1
    faster = "tma" if best["gram_tma"] < best["gram"] else tuning.EVERY_CALL
    launches = tuning.gram_launches(dtype, channels, architecture="sm_90")
    assert launches[0].kernel == faster


TIMED = Path(__file__).parents[2] / "bench/results/gpu/tuning.csv"


@pytest.mark.parametrize(
    ("key", "call"),
    [
        (("16-bit", "narrow"), {"channels": 64}),
        (("16-bit", "middle"), {"channels": 65}),
        (("16-bit", "wide"), {"channels": 2049}),
        (("16-bit", "gated"), {"channels": 4096, "gated": True}),
        (("16-bit", "scattered"), {"channels": 4096, "aligned": False, "gated": True}),
        (("split", "wide"), {"channels": 4096, "weighted": True}),
        (("split", "scattered"), {"channels": 4096, "weighted": True, "aligned": False}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_call_gets_the_row_of_its_class(
    key: tuple[str, str], call: dict[str, Any], own_table: Path
) -> None:
    operands, shape = key
    edit(own_table, lambda table: table["default"]["gram"][operands][shape][-1].update(group=77))
    assert tuning.gram_launches(torch.float16, **call)[-1].group == 77


def test_a_correction_gets_the_row_of_its_class(own_table: Path) -> None:
    edit(own_table, lambda table: table["default"]["absorb"]["bf16"]["wide"].update(group=77))
    groups = {
        (dtype, channels): tuning.absorb_config(dtype, channels).group
        for dtype in (torch.bfloat16, torch.float32)
        for channels in (2048, 2049)
    }
    assert [case for case, group in groups.items() if group == 77] == [(torch.bfloat16, 2049)]


def test_a_written_table_is_read_again(own_table: Path) -> None:
    table = dict(tuning.read_table(own_table))
    key = ("absorb", "split", "wide")
    row = tuning.absorb_config(torch.float32)
    table["gfx942", key] = replace(row, method="gathered", stages=1)
    tuning.write_table(own_table, table)
    assert tuning.read_table(own_table) == table
    assert tuning.absorb_config(torch.float32, architecture="gfx942").method == "gathered"


def _row(table: dict[str, Any]) -> dict[str, Any]:
    row = table["default"]["gram"]["16-bit"]["wide"][-1]
    assert isinstance(row, dict)
    return row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: _row(table).update(block_channels=96), "divisor of 256; it is 96"),
        (lambda table: _row(table).update(block_tokens=8), "16 or more"),
        (lambda table: _row(table).update(warps=3), "warps must be"),
        (lambda table: _row(table).update(stages=True), "stages must be an integer"),
        (lambda table: _row(table).update(group=0), "group must be 1 or more"),
        (lambda table: _row(table).update(colour=1), "must have block_channels"),
        (lambda table: _row(table).pop("warps"), "must have block_channels"),
        (
            lambda table: table["default"]["absorb"]["bf16"]["wide"].update(method="guess"),
            "fused or gathered",
        ),
        (lambda table: _row(table).update(kernel="tma"), "must end with a launch of 'pointers'"),
        (lambda table: _row(table).update(kernel="guess"), "kernel must be pointers or tma or"),
        (
            lambda table: table["default"]["gram"]["16-bit"].update(wide=_row(table)),
            "must list launches",
        ),
        (lambda table: table["default"]["gram"]["16-bit"].pop("wide"), "lacks gram/16-bit/wide"),
        (lambda table: table.update(sm_90={"gram": {"8-bit": {"wide": {}}}}), "8-bit/wide is no"),
        (lambda table: table.update(sm_90=[]), "no names under sm_90"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_table_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], message: str, own_table: Path
) -> None:
    edit(own_table, change)
    with pytest.raises(tuning.LaunchTableError, match=message) as refused:
        tuning.gram_launches(torch.bfloat16, 4096)
    assert isinstance(refused.value, GrailError)


@pytest.mark.parametrize("content", ["{", None], ids=["no JSON", "no file"])
def test_an_unreadable_table_is_refused_by_name(content: str | None, own_table: Path) -> None:
    own_table.unlink()
    if content is not None:
        own_table.write_text(content)
    tuning.read_table.cache_clear()
    with pytest.raises(tuning.LaunchTableError, match="cannot be read"):
        tuning.gram_launches(torch.bfloat16, 4096)


def test_the_interpreter_has_an_architecture_of_its_own() -> None:
    assert tuning.architecture_of(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize(("method", "backend"), [("fused", "triton"), ("gathered", "torch")])
def test_a_correction_takes_the_method_of_its_row(
    method: str, backend: str, own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(own_table, lambda table: table["default"]["absorb"]["bf16"]["wide"].update(method=method))
    edit(
        own_table, lambda table: table["default"]["absorb"]["bf16"]["middle"].update(method="fused")
    )
    # As on a GPU, where "auto" means Triton.
    absorb = importlib.import_module("grail_kernels._absorb")
    monkeypatch.setattr(absorb, "resolve_backend", lambda x, backend: "triton")
    launched: list[int] = []

    def noted(weight: Tensor, gram: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        launched.append(len(kept) + len(dropped))
        return gram.new_zeros(len(weight), len(kept))

    absorb_triton = pytest.importorskip("grail_kernels.absorb_triton")
    monkeypatch.setattr(absorb_triton, "launch_absorb", noted)
    for channels, asked, taken in (
        (4096, "auto", backend),
        (4096, "triton", "triton"),
        (2048, "auto", "triton"),
    ):
        del launched[:]
        weight = torch.zeros(3, channels, dtype=torch.bfloat16)
        gk.absorb(weight, torch.zeros(gk.packed_numel(channels)), [0], backend=asked)
        assert launched == ([channels] if taken == "triton" else [])


def test_triton_launches_with_the_row_of_its_own_architecture(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuning.GramConfig] = []
    gram_blocks = pytest.importorskip("grail_kernels.gram_blocks")
    monkeypatch.setattr(
        gram_blocks.Launch, "add", lambda launch, *_, **__: launched.append(launch.config)
    )
    row = {**OWN, "group": 3}
    rows = {"16-bit": {"narrow": [row], "scattered": [row]}}
    edit(own_table, lambda table: table.update(interpreter={"gram": rows}))
    x = torch.zeros(5, 40, dtype=torch.float16)
    out = torch.zeros(1, gk.packed_numel(40))
    monkeypatch.setattr("grail_kernels.gram_serve.resolve_backend", lambda x, backend: "triton")
    gk.gram_batched_(out, x[None])
    gk.gram_ragged_(out, x, torch.tensor([0, 5]))
    assert launched == 2 * [launch(group=3)]


@pytest.mark.skipif(interpreting(), reason="interpreted kernels do not compile")
def test_the_gate_compiles_the_rows_of_each_architecture(own_table: Path) -> None:
    aot = pytest.importorskip("bench.tools.aot")
    rows = {"16-bit": {"wide": [OWN], "middle": [{**OWN, "group": 5}]}}
    before = {case.name for case in aot.cases()}
    edit(own_table, lambda table: table.update(sm_80={"gram": rows}))
    configs = {case.name: case.config for case in aot.cases()}
    assert configs["gram/sm_80/bf16/aligned/wide/plain"] == launch()
    assert configs["gram/sm_90/bf16/aligned/wide/plain"] != launch()
    assert {*configs} - before == {
        f"gram/sm_80/{dtype}/aligned/middle/plain" for dtype in ("fp16", "bf16")
    }
