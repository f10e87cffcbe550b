"""bench/on_gpu.py, dry: on a GPU it must not fail for a reason that a CPU could have told."""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import pytest
import torch

import grail_kernels as gk
from bench import on_gpu
from grail_kernels import tuning

WRITTEN = {
    "tests": {"tests.csv"},
    "checks": {"checks.csv"},
    "accuracy": {"accuracy.csv"},
    "tuning": {"tuning.csv", "launches.json"},
    "bench": {"gram.csv", "absorb.csv", "ridge.csv"},
    "calibrate": {"calibrate.csv"},
}


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    roof = on_gpu.gram_bench.Roof(1e11, 1e10)
    monkeypatch.setattr(on_gpu.gram_bench, "measure_roof", lambda dtype, device: roof)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("step", on_gpu.STEPS)
def test_every_step_runs_and_writes(
    step: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shipped = tuning.TABLE.read_bytes()
    arguments = ["--dry-run", "--output", str(tmp_path), "--steps", step]
    assert on_gpu.main(arguments) == 0, capfd.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN[step]
    for path in tmp_path.glob("*.csv"):
        rows = rows_of(path)
        assert rows
        assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert tuning.TABLE.read_bytes() == shipped


def test_every_kernel_has_to_repeat(tmp_path: Path) -> None:
    run = on_gpu.Run("cpu", True, tmp_path, deadline=float("inf"))
    kernels = {name.split()[0] for name, _ in on_gpu.launches(run)}
    assert kernels == {"gram", "batched", "ragged", "swiglu", "absorb"}


def test_steps_run_apart_and_a_failing_one_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "accuracy.csv").mkdir()  # so that this step cannot write
    arguments = ["--dry-run", "--output", str(tmp_path), "--steps", "accuracy", "tuning"]
    assert on_gpu.main(arguments) == 1
    assert re.search(r"^failed: accuracy$", capfd.readouterr().out, re.MULTILINE)
    assert rows_of(tmp_path / "tuning.csv")


def test_a_step_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "GRACE", 0.0)
    options = argparse.Namespace(output=tmp_path, dry_run=True)
    assert not on_gpu.run_apart("accuracy", options, 0.1)  # no Python starts that fast
    assert "accuracy: stopped" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_fails_its_step_and_what_was_found_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x, **_: right(out, x).mul_(1.0001))
    monkeypatch.setattr(on_gpu, "repeats", lambda run: [{"check": "repeats", "result": "yes"}])
    run = on_gpu.Run("cpu", True, tmp_path, deadline=float("inf"))
    assert not on_gpu.run_step("checks", run)
    assert "off by" in capfd.readouterr().err
    assert [row["check"] for row in rows_of(tmp_path / "checks.csv")] == ["repeats"]


def test_a_bias_fails_the_accuracy_step_and_its_rows_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x: right(out, x).mul_(1.0001))
    run = on_gpu.Run("cpu", True, tmp_path, deadline=float("inf"))
    assert not on_gpu.run_step("accuracy", run)
    assert rows_of(tmp_path / "accuracy.csv")


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_no_measurement_starts_after_the_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = on_gpu.Run("cpu", True, tmp_path, deadline=0.0)
    on_gpu.run_tuning(run)
    on_gpu.run_accuracy(run)
    on_gpu.run_bench(run)
    assert not rows_of(tmp_path / "tuning.csv")
    assert not rows_of(tmp_path / "accuracy.csv")
    assert "p50" not in capsys.readouterr().out


def test_steps_fit_into_ten_minutes_and_the_help_lists_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_once = {name: on_gpu.STEPS[name].seconds for name in on_gpu.UNTIMED}
    every = {name: step.seconds for name, step in on_gpu.STEPS.items()}
    one_by_one = sum(every.values()) - sum(at_once.values())
    assert max(at_once.values()) + one_by_one + 4 * on_gpu.GRACE <= 600
    with pytest.raises(SystemExit):
        on_gpu.main(["--help"])
    told = re.findall(r"^  (\w+) +(\d+)  \w", capsys.readouterr().out, re.MULTILINE)
    assert told == [(name, f"{step.seconds:.0f}") for name, step in on_gpu.STEPS.items()]
