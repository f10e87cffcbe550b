"""The ridge and calibrate benches, and the command lines of all benches."""

import csv
import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grail
from bench.kernels import ridge
from bench.quality import calibrate
from bench.tools import measuring
from bench.tools.allocations import peak_bytes

ROOT = Path(__file__).parents[2]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ridge_writes_every_number_with_its_conditions(tmp_path):
    out = tmp_path / "ridge.csv"
    arguments = ["--shape", "8,24", "--device", "cpu", "--repeats", "2", "--output", str(out)]
    assert ridge.main(arguments) == 0
    rows = rows_of(out)
    names = ["grail", "grail auto", "64 experts", "grail solve", "reference"]
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert (row["outputs"], row["channels"], row["kept"]) == ("8", "24", "12")
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["torch"] == torch.__version__
        assert row["threads"] == str(torch.get_num_threads())


def test_ridge_reports_no_time_for_a_wrong_result(tmp_path, monkeypatch):
    solve = ridge.ridge.solve

    def inexact(*args, **settings):
        solution = solve(*args, **settings)
        solution.x.mul_(1.01)
        return solution

    monkeypatch.setattr(ridge.ridge, "solve", inexact)
    out = tmp_path / "ridge.csv"
    arguments = ["--shape", "8,24", "--device", "cpu", "--repeats", "2", "--output", str(out)]
    assert ridge.main(arguments) == 1
    assert not out.exists()


@pytest.fixture
def tiny_shape(monkeypatch):
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 50,
    }
    monkeypatch.setitem(calibrate.MODELS, "smollm2-135m", shape)
    return ["--device", "cpu", "--tokens", "64", "--sequence-length", "32", "--repeats", "2"]


def test_calibrate_writes_every_phase_and_the_peaks_of_every_design(tiny_shape, tmp_path):
    out = tmp_path / "calibrate.csv"
    assert calibrate.main([*tiny_shape, "--designs", "paper,default", "--output", str(out)]) == 0
    rows = {(row["design"], row["metric"]): row for row in rows_of(out)}
    metrics = (*calibrate.PHASES, "predicted_peak", "measured_peak")
    of_designs = {(design, metric) for design in ("paper", "default") for metric in metrics}
    assert rows.keys() == {("", calibrate.BARE), *of_designs}
    for design in ("paper", "default"):
        parts = sum(float(rows[design, phase]["p50"]) for phase in calibrate.PHASES[:-1])
        total = float(rows[design, "total"]["p50"])
        assert parts == pytest.approx(total, rel=0.2)  # medians of two rounds
    assert rows["paper", "total"]["tokens"] == "64"


def test_calibrate_reports_nothing_when_compensation_hurts(tiny_shape, tmp_path, monkeypatch):
    compress = grail.compress

    def harmful(*args, **settings):
        report = compress(*args, **settings)
        report.sites[1].error = 2.0
        return report

    monkeypatch.setattr(grail, "compress", harmful)
    out = tmp_path / "calibrate.csv"
    assert calibrate.main([*tiny_shape, "--designs", "default", "--output", str(out)]) == 1
    assert not out.exists()


def test_peak_bytes_sees_memory_that_is_gone_by_the_end():
    def call():
        torch.empty(1000, dtype=torch.uint8)
        torch.empty(3000, dtype=torch.uint8)

    assert peak_bytes(call) == 3000


SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "bench").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def committed() -> dict[str, tuple[int, int, str]]:
    """When each file of the benches' results and of the pages was written, and what it holds."""
    files = [ROOT / "README.md", ROOT / "grail_kernels" / "launches.json"]
    files += [p for f in ("bench/results", "docs") for p in (ROOT / f).rglob("*") if p.is_file()]
    return {
        str(p): (p.stat().st_mtime_ns, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in files
    }


def test_every_script_is_found():
    assert len(SCRIPTS) > 20
    assert {"bench.gram", "bench.report.comparison", "bench.reliability.ranks"} <= set(SCRIPTS)


def printed_help(name: str, flag: str, monkeypatch, capsys) -> str:
    """Returns what a script prints when it is asked for its help."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", flag])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # imported before
@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_is_written_and_touches_nothing(name, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = committed()
    printed = printed_help(name, flag, monkeypatch, capsys)
    assert printed.startswith("usage: ")
    assert "\nwrites: " in printed
    assert "\ntakes: " in printed
    assert committed() == before
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_runs_nothing_either(tmp_path):
    before = committed()
    command = [sys.executable, "-m", "bench.report.comparison", "--halp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --halp" in done.stderr
    assert committed() == before


@pytest.mark.parametrize("name", ["gram", "on_gpu"])
def test_a_script_runs_as_typed_from_any_folder(name, tmp_path):
    script = str(ROOT / "bench" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {name}.py")


@pytest.mark.parametrize(
    ("vendor", "family", "number", "expected"),
    [
        ("AuthenticAMD", "26", "2", "a chip (Zen 5)"),
        ("AuthenticAMD", "25", "17", "a chip (Zen 4)"),
        ("AuthenticAMD", "23", "49", "a chip (Zen 2)"),
        ("GenuineIntel", "6", "143", "a chip (Sapphire Rapids)"),
        ("GenuineIntel", "6", "151", "a chip"),
        ("GenuineIntel", "6", "60", "a chip"),
        ("ARM", "", "", "a chip"),
    ],
)
def test_a_processor_is_named_with_its_microarchitecture(vendor, family, number, expected):
    fields = {"vendor_id": vendor, "cpu family": family, "model": number, "model name": "a chip"}
    assert measuring.describe_processor(fields) == expected
