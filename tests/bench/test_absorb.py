"""bench/kernels/absorb.py: what it measures is checked first, and what it writes can be read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from torch import Tensor

import grail_kernels as gk
from bench.kernels import absorb
from grail_kernels.backend import interpreting

ARGUMENTS = ["--device", "cpu", "--repeats", "2", "--shape", "20,300"]
PROVIDERS = {"gathered", "gathered fp64", "permuted", "full"}
PROVIDERS |= {"fused"} if interpreting() else set()


def test_every_provider_gives_the_answer() -> None:
    found = absorb.errors(absorb.problem(20, 300, 0.4, "cpu"))
    assert found.keys() == PROVIDERS
    assert max(found.values()) < 16


def test_every_provider_is_written_with_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "absorb.csv"
    assert absorb.main([*ARGUMENTS, "--output", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert {row["provider"] for row in rows} == PROVIDERS
    assert all(float(row["p50"]) > 0 and row["torch"] and row["kept"] == "150" for row in rows)


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gk.absorb

    def wrong(*given: Tensor, **named: Tensor) -> Tensor:
        return right(*given, **named) * 1.0001

    monkeypatch.setattr(gk, "absorb", wrong)
    assert absorb.main(ARGUMENTS) == 1
    output = capsys.readouterr().out
    assert "off by" in output
    assert "GFLOP" not in output


def test_the_cheaper_order_is_that_of_fewer_right_hand_sides() -> None:
    # O right-hand sides against D = H - K; equal where they are as many.
    for outputs, cheaper in ((50, "absorb then solve"), (70, "solve then absorb")):
        counted = absorb.ways(outputs, channels=160, kept=100)
        assert min(counted, key=lambda way: counted[way]) == cheaper
    assert len(set(absorb.ways(60, 160, 100).values())) == 1


def test_the_counted_choice_and_the_taken_method_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert absorb.main(ARGUMENTS) == 0
    output = capsys.readouterr().out
    assert "gk.absorb takes: gathered" in output
    assert output.rstrip().endswith(": absorb then solve")  # 20 right-hand sides against 150
