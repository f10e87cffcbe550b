"""Measured speeds as a table, a CSV file and a figure."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grail.errors import InputError, ModelError
from grail.serving import speed_report
from grail.serving.speed import SpeedRow
from grail.serving.speed_report import conditions, draw, require_writable, save_table, tables


def row(file="dense.gguf", **changes):
    """A row with 100 tokens in rounds of 1, 1.25 and 1.5 seconds."""
    usual = {
        "runtime": "llama-cpp-python 1",
        "form": "F32",
        "bytes": 2_000_000,
        "batch": 1,
        "phase": "prefill",
        "prompt": 64,
        "new": 8,
        "threads": 1,
        "count": 100,
        "wall": (1.0, 1.25, 1.5),
        "cpu": (1.0, 1.0, 1.0),
        "against": "dense.gguf",
        "wall_ratio": 1.0,
        "cpu_ratio": 1.0,
    }
    return SpeedRow(file=file, **usual | changes)


def rows(*files, **changes):
    return [
        row(file, batch=batch, phase=phase, **changes)
        for file in files
        for batch in (1, 8)
        for phase in ("prefill", "decode")
    ]


def test_a_table_for_each_batch_size_has_a_line_for_each_file():
    found = rows("dense.gguf") + rows("x/small.gguf", cpu_ratio=1.436, form="Q8_0")
    (header, lines), (other, _) = tables(found)
    assert header == ["batch 1", "weights", "size", "prefill t/s", "×", "decode t/s", "×"]
    assert other[0] == "batch 8"
    assert lines == [
        ["dense.gguf", "F32", "2.00 MB", "80.0 ±20%", "1.00", "80.0 ±20%", "1.00"],
        ["small.gguf", "Q8_0", "2.00 MB", "80.0 ±20%", "1.44", "80.0 ±20%", "1.44"],
    ]


def test_the_runtime_stands_in_the_table_if_there_are_several():
    found = rows("dense.gguf") + rows("out", runtime="transformers 5.1", form="float32")
    _, lines = tables(found)[0]
    assert [line[1] for line in lines] == ["llama.cpp F32", "transformers float32"]
    assert conditions(found).startswith("llama-cpp-python 1, transformers 5.1, 64 prompt")


def test_vision_networks_are_in_images():
    ((header, _),) = tables([row(phase="forward")])
    assert header == ["batch 1", "weights", "size", "forward img/s", "×"]
    assert "prompt" not in conditions([row(phase="forward")])


def test_files_of_one_name_are_told_apart_by_their_folders():
    _, lines = tables(rows("a/small.gguf", "b/small.gguf", "c/out"))[0]
    assert [line[0] for line in lines] == ["a/small.gguf", "b/small.gguf", "out"]


def test_the_conditions_are_said():
    assert conditions(rows("dense.gguf")) == (
        "llama-cpp-python 1, 64 prompt and 8 new tokens, 1 thread; medians of 3 rounds, "
        "files in turn; ± half the range; × by CPU time, dense.gguf = 1"
    )
    said = conditions(rows("dense.gguf", threads=4), one_by_one=True)
    assert "4 threads; medians of 3 rounds, one file after the other" in said
    assert "× by wall time" in said
    assert "1 thread; one round, files in turn" in conditions([row(wall=(1.0,), cpu=(1.0,))])


def test_a_csv_file_holds_every_round(tmp_path):
    path = tmp_path / "speed.csv"
    save_table(rows("dense.gguf"), path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4
    assert found[3]["phase"] == "decode"
    assert found[0]["wall"] == "1.000000 1.250000 1.500000"
    assert (found[0]["per_second"], found[0]["spread"]) == ("80", "0.2")


@pytest.mark.parametrize("suffix", speed_report.FIGURES)
def test_a_figure_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed{suffix}"
    draw(rows("dense.gguf") + rows("small.gguf", cpu_ratio=1.436), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        said = path.read_text()
        for text in ("decode, batch 8: t/s", "1.44×", "small.gguf (F32)"):
            assert f">{text}<" in said


def test_what_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(InputError, match=r"a.csv exists already; name a new file"):
        require_writable(tmp_path / "a.csv", None)
    with pytest.raises(InputError, match=r"a figure ends in .svg, .png, .pdf; got .*a.jpg"):
        require_writable(None, tmp_path / "a.jpg")
    with pytest.raises(InputError, match="nowhere is no folder"):
        require_writable(None, tmp_path / "nowhere" / "a.svg")
    monkeypatch.setattr(speed_report, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"drawing needs matplotlib: pip install 'grail-kernels"):
        require_writable(None, Path(tmp_path / "a.svg"))
    require_writable(None, None)
