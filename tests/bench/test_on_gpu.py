"""bench/on_gpu.py, dry: on a GPU it must not fail for a reason that a CPU could have told."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import grail_kernels as gk
from bench import on_gpu
from bench.kernels import trials
from bench.tools import tiny
from bench.tools.measuring import write_rows
from grail_kernels import tuning

LEASE = 900.0  # seconds of a device in a task, with the starts of two calls
START = 75.0


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    roof = on_gpu.gram_bench.Roof(1e11, 1e10)
    for module in (on_gpu.gram_bench, trials):
        monkeypatch.setattr(module, "measure_roof", lambda dtype, device: roof)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def run_here(output: Path, deadline: float = float("inf")) -> on_gpu.Run:
    return on_gpu.Run("cpu", True, output, deadline)


@pytest.fixture
def tiny_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibrated model of two small blocks in place of SmolLM2, which takes a minute."""
    llama = pytest.importorskip("transformers.models.llama")

    def build(options: argparse.Namespace) -> tuple[torch.nn.Module, None]:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": tiny.VOCABULARY}
        heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
        return llama.LlamaForCausalLM(llama.LlamaConfig(**sizes, **heads)).eval(), None

    ids = torch.randint(tiny.VOCABULARY, (2, 1, 32))
    monkeypatch.setattr(on_gpu.calibrate, "build", build)
    monkeypatch.setattr(on_gpu.calibrate, "batches_of", lambda tokenizer, options: list(ids))


@pytest.mark.usefixtures("tiny_llama")
@pytest.mark.parametrize("step", on_gpu.STEPS)
def test_every_step_runs_and_writes_its_file(
    step: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shipped = tuning.TABLE.read_bytes()
    arguments = ["--dry-run", "--output", str(tmp_path), "--step", step, "--seconds", "600"]
    assert on_gpu.main(arguments) == 0, capfd.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == [on_gpu.STEPS[step].file]
    rows = rows_of(tmp_path / on_gpu.STEPS[step].file)
    assert rows
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert tuning.TABLE.read_bytes() == shipped


def test_both_calls_fit_the_lease_and_each_its_time() -> None:
    for seconds, steps in on_gpu.CALLS.values():
        assert sum(step.seconds for step in steps.values()) + on_gpu.GRACE <= seconds <= 600
        assert all(step.seconds > on_gpu.GRACE for step in steps.values())
    assert sum(seconds + START for seconds, _ in on_gpu.CALLS.values()) <= LEASE


def test_a_call_leaves_no_more_files_than_come_back() -> None:
    files = [step.file for step in on_gpu.STEPS.values()]
    assert len({*files}) == len(files)
    for _, steps in on_gpu.CALLS.values():
        assert len(steps) + len(("plan", "log")) <= on_gpu.MOST_FILES
    assert all(re.fullmatch(r"[\w.-]+", file) for file in files)


def test_the_steps_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    told = re.findall(r"^  (\w+) +(\d+)  \w.* [\w.]+$", listed, re.MULTILINE)
    assert told == [(name, f"{step.seconds:.0f}") for name, step in on_gpu.STEPS.items()]
    assert re.findall(r"^call (\d), (\d+) s$", listed, re.MULTILINE) == [("1", "480"), ("2", "240")]


def test_a_failing_step_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "accuracy.csv").mkdir()  # so that this step cannot write
    steps = {name: on_gpu.STEPS[name] for name in ("accuracy", "sizes")}
    monkeypatch.setattr(on_gpu, "CALLS", {1: (600.0, steps)})
    assert on_gpu.main(["--dry-run", "--output", str(tmp_path), "--call", "1"]) == 1
    plan = {row["step"]: row["ended"] for row in rows_of(tmp_path / "plan_1.csv")}
    assert plan == {"accuracy": "failed", "sizes": "passed"}
    assert rows_of(tmp_path / "sizes.csv")
    assert "IsADirectoryError" in (tmp_path / "log_1.txt").read_text()
    assert "IsADirectoryError" in capsys.readouterr().out


def test_a_step_gets_the_time_that_others_left_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = [0.0], {}

    def takes(seconds: float) -> Callable[..., str]:
        def run(name: str, options: object, limit: float, log: Path) -> str:
            given[name] = limit
            now[0] += min(seconds, limit)
            return "passed"

        return run

    step = on_gpu.Step(lambda run: None, 100.0, "none.csv")
    steps = {"quick": step, "hanging": step, "last": step}
    monkeypatch.setattr(on_gpu, "CALLS", {1: (308.0, steps)})
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: now[0])
    durations = {"quick": 10.0, "hanging": 1e9, "last": 10.0}
    monkeypatch.setattr(
        on_gpu, "run_apart", lambda name, *rest: takes(durations[name])(name, *rest)
    )
    options = argparse.Namespace(output=tmp_path, seconds=None, dry_run=True)
    assert on_gpu.run_call(1, options)
    assert given == {"quick": 100.0, "hanging": 190.0, "last": 100.0}


def test_a_step_that_hangs_is_stopped(tmp_path: Path) -> None:
    options = argparse.Namespace(output=tmp_path, dry_run=True)
    # No Python starts that fast.
    ended = on_gpu.run_apart("accuracy", options, 0.1, tmp_path / "log.txt")
    assert ended.startswith("stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.parametrize(("seconds", "whole"), [(0.5, True), (9.0, False), (7.0, False)])
def test_the_whole_model_is_calibrated_where_its_blocks_are_quick(
    seconds: float,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "calibrate_default.csv"

    def four_blocks(arguments: list[str]) -> int:
        write_rows(path, [{"metric": "total", "blocks": "4", "p20": str(seconds)}])
        return 0

    monkeypatch.setattr(on_gpu.calibrate, "main", four_blocks)
    all_blocks = [{"metric": "total", "blocks": "32", "p50": "1"}]
    monkeypatch.setattr(on_gpu, "_whole_model", lambda run, file: all_blocks)
    on_gpu.run_default(run_here(tmp_path, on_gpu.time.monotonic() + 50.0))
    assert [row["blocks"] for row in rows_of(path)] == (["4", "32"] if whole else ["4"])
    assert ("left out" in capsys.readouterr().out) == (not whole)


def test_every_kernel_has_to_repeat(tmp_path: Path) -> None:
    kernels = {name.split()[0] for name, _ in on_gpu.launches(run_here(tmp_path))}
    assert kernels == {"gram", "batched", "ragged", "swiglu", "absorb", "shipped"}


def test_other_bits_in_another_process_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "digests", lambda run: {"gram": "a", "absorb": "b"})
    monkeypatch.setattr(on_gpu, "_run_apart", lambda command, run: "gram a\nabsorb c")
    assert not on_gpu.run_step("repeats", run_here(tmp_path))
    assert "not the same bits again: absorb" in capsys.readouterr().err


def test_a_wrong_result_fails_its_step_and_what_was_found_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = trials.Candidate(lambda out, x: gk.gram_(out, x).mul_(1.0001))
    right = trials.candidates("cpu")["shipped"]
    monkeypatch.setattr(trials, "candidates", lambda device: {"right": right, "wrong": wrong})
    assert not on_gpu.run_step("sizes", run_here(tmp_path))
    assert "off by" in capfd.readouterr().err
    assert [row["check"] for row in rows_of(tmp_path / "sizes.csv")] == [
        "sizes beyond 32 bits: right"
    ]


def test_a_bias_fails_the_accuracy_step_and_its_rows_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x: right(out, x).mul_(1.0001))
    assert not on_gpu.run_step("accuracy", run_here(tmp_path))
    assert rows_of(tmp_path / "accuracy.csv")


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["--call", "1"]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--call", "1"], ["--output", "somewhere"]])
def test_nothing_runs_without_a_call_and_a_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(SystemExit):
        on_gpu.main(["--dry-run", *arguments])
    assert "$OUT" in capsys.readouterr().err


def test_no_measurement_starts_after_the_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here(tmp_path, deadline=0.0)
    on_gpu.run_accuracy(run)
    on_gpu.run_gram(run)
    assert not rows_of(tmp_path / "accuracy.csv")
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "p50" in line and "committed" not in line]
