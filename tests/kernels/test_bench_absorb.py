"""bench/absorb.py: what it measures is checked first, and what it writes can be read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from torch import Tensor

import grail_kernels as gk
from bench import absorb

ARGUMENTS = ["--device", "cpu", "--repeats", "2", "--shape", "20,300"]


def test_every_provider_gives_the_answer() -> None:
    found = absorb.errors(absorb.problem(20, 300, 0.4, "cpu"))
    assert len(found) == 4
    assert max(found.values()) < 16


def test_every_provider_is_written_with_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "absorb.csv"
    assert absorb.main([*ARGUMENTS, "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert {row["provider"] for row in rows} == {"grail packed", "grail dense", "gather", "full"}
    assert all(float(row["p50"]) > 0 and row["torch"] and row["kept"] == "150" for row in rows)


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gk.absorb

    def wrong(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
        return right(weight, gram, keep) * 1.0001

    monkeypatch.setattr(gk, "absorb", wrong)
    assert absorb.main(ARGUMENTS) == 1
    output = capsys.readouterr().out
    assert "off by" in output
    assert "GFLOP" not in output
