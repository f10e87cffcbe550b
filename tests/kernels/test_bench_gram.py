"""bench/gram.py: what it measures is checked first, and what it writes can be read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import grail_kernels as gk
from bench import gram


def run(*arguments: str) -> int:
    return gram.main(["--device", "cpu", "--repeats", "2", "--shape", "70,33", *arguments])


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "measure_roof", lambda dtype, device: gram.Roof(1e11, 1e10))


def test_every_number_is_written_with_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "gram.csv"
    assert run("--dtype", "fp32", "--csv", str(path)) == 0
    rows = list(csv.DictReader(path.open()))
    ours = {row["metric"]: row for row in rows if row["provider"] == "grail"}
    assert ours.keys() == {"time", "limit", "error"}
    assert float(ours["time"]["p20"]) <= float(ours["time"]["p50"]) <= float(ours["time"]["p80"])
    assert float(ours["error"]["p50"]) < 16
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert {row["metric"] for row in rows if row["kernel"] == "roof"} == {"product", "copy"}


@pytest.mark.parametrize("dtype", gram.DTYPES)
def test_every_dtype_is_measured(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dtype", dtype) == 0
    assert "\ngrail " in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x: right(out, x).mul_(1.0001))
    path = tmp_path / "gram.csv"
    assert run("--dtype", "fp32", "--csv", str(path)) == 1
    assert "grail is off by" in capsys.readouterr().out
    assert all(row["kernel"] == "roof" for row in csv.DictReader(path.open()))


def test_a_product_in_bf16_shows_its_rounding() -> None:
    x = (torch.randn(300, 33) + 0.5).bfloat16()
    found = gram.errors(gram.providers(33, torch.bfloat16, "cpu"), x)
    assert found["grail"] < 16 < found["mm"]


def test_the_limit_is_the_slower_of_products_and_memory() -> None:
    shape = gram.Shape(tokens=1000, channels=99)
    assert gram.Roof(1e6, 1e30).limit(shape, 4) == pytest.approx(1000 * 99 * 100 / 1e6)
    moved = 1000 * 99 * 4 + 4 * 99 * 100
    assert gram.Roof(1e30, 1e6).limit(shape, 4) == pytest.approx(moved / 1e6)


def test_a_library_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this machine")

    right = gram.providers
    monkeypatch.setattr(gram, "providers", lambda *case: right(*case) | {"addmm": fail})
    assert run("--dtype", "fp32") == 0
    output = capsys.readouterr().out
    assert "addmm left out: not on this machine" in output
    assert "\naddmm  " not in output
    assert "\ngrail " in output


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "gram.png"
    assert run("--dtype", "fp32", "--plot", str(path)) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("text", ["8192", "0,5", "a,b"])
def test_a_bad_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gram.main(["--shape", text])
    assert text in capsys.readouterr().err
