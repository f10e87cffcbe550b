"""bench/on_gpu.py, dry: on a GPU it must not fail for a reason that a CPU could have told."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import grail_kernels as gk
from bench import on_gpu


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    roof = on_gpu.gram_bench.Roof(1e11, 1e10)
    monkeypatch.setattr(on_gpu.gram_bench, "measure_roof", lambda dtype, device: roof)


def test_every_step_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0, capsys.readouterr()
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"tests", "checks", "accuracy", "gram", "absorb", "tuning"}
    accuracy = list(csv.DictReader((tmp_path / "accuracy.csv").open()))
    assert all(float(row["error"]) < 16 and row["torch"] for row in accuracy)


def test_a_failing_step_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x, **_: right(out, x).mul_(1.0001))
    arguments = ["--dry-run", "--output", str(tmp_path), "--steps", "checks", "accuracy"]
    assert on_gpu.main(arguments) == 1
    assert "failed: checks" in capsys.readouterr().out
    assert (tmp_path / "accuracy.csv").exists()


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_no_measurement_starts_after_the_deadline(tmp_path: Path) -> None:
    run = on_gpu.Run("cpu", True, tmp_path, deadline=0.0)
    assert on_gpu.run_tuning(run) == []
    assert on_gpu.run_accuracy(run) == []
