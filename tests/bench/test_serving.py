"""The bench of served files: its rows, its commands, and perplexity in llama.cpp."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import grail
from bench.quality import serving
from bench.quality.serving import FORMATS, MODELS, Bench, Model
from bench.report import figures
from grail.files.load import load_model
from grail.serving.speed import SpeedRow

ROOT = Path(serving.__file__).parents[2]
DENSE, EVEN, UNEVEN = MODELS[:3]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_at_once_and_keep_what_they_have(tmp_path):
    path = tmp_path / "serving.csv"
    bench = Bench(path, 1, 64)
    bench.put(UNEVEN, "Q8_0", {"perplexity": 3.5, "bytes": 8})
    bench.put(DENSE, "Q8_0", {"perplexity": 3.0})
    bench.put(DENSE, "F32", {"perplexity": 2.0})
    again = Bench(path, 1, 64)
    again.put(UNEVEN, "Q8_0", {"decode_1": 7.5})
    found = [(row["model"], row["format"], row["perplexity"]) for row in rows(path)]
    assert found == [
        ("dense", "F32", "2.0"),
        ("dense", "Q8_0", "3.0"),
        (UNEVEN.name, "Q8_0", "3.5"),
    ]
    assert rows(path)[-1]["decode_1"] == "7.5"
    assert rows(path)[0]["decode_1"] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["serving.csv"]
    assert again.row(EVEN, "Q8_0") is None


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of models, in which the files of two formats seem to be."""
    monkeypatch.setattr(serving, "HOME", tmp_path)
    for model in MODELS:
        for kind in ("F32", "Q8_0"):
            model.file(kind).write_bytes(bytes(10))
    return tmp_path


def test_files_of_a_format_are_timed_together_once(home, monkeypatch):
    calls = []

    def measure_speed(files, against, **settings):
        calls.append((files, against, settings["threads"]))
        return [
            speed_row(file, batch, phase, (3.0, 2.0, 9.0) if file == against else (1.5, 1.0, 9.0))
            for file in files
            for batch in settings["batches"]
            for phase in ("prefill", "decode")
        ]

    def speed_row(file, batch, phase, cpu):
        about = {"runtime": "llama.cpp", "form": "F32", "bytes": 10, "prompt": 4, "new": 2}
        return SpeedRow(
            file=file,
            **about,
            batch=batch,
            phase=phase,
            threads=1,
            count=batch * 6,
            wall=cpu,
            cpu=cpu,
            against="dense",
            wall_ratio=2.5,
            cpu_ratio=2.0,
        )

    monkeypatch.setattr(grail, "measure_speed", measure_speed)
    bench = Bench(home / "serving.csv", 1, 64)
    wanted = [DENSE, EVEN]
    EVEN.file("Q8_0 by grail").write_bytes(bytes(10))
    kinds = ("F32", "Q8_0", "Q4_1", "Q8_0 by grail")
    serving.speed(bench, wanted, kinds[:2], False, 3, 4)
    assert [(len(files), against) for files, against, _ in calls] == [
        (2, str(DENSE.file("F32"))),
        (3, str(DENSE.file("Q8_0"))),
    ]
    assert bench.row(EVEN, "Q8_0 by grail")["decode_8_ratio"] == "2.000"
    row = bench.row(EVEN, "Q8_0")
    assert (row["decode_1"], row["decode_8"], row["decode_8_ratio"]) == ("4", "32", "2.000")
    assert bench.row(DENSE, "F32")["prefill_1"] == "2"
    assert row["speed_threads"] == "1"
    serving.speed(bench, wanted, kinds, False, 3, 4)
    assert len(calls) == 2  # nothing is measured twice; of Q4_1 there are no files
    serving.speed(bench, [*wanted, UNEVEN], ("F32",), False, 3, 4)
    assert len(calls[-1][0]) == 3  # in turns with the others
    serving.speed(bench, wanted, ("F32",), True, 3, 4)
    assert len(calls) == 4


def test_quality_is_measured_once_also_of_rows_that_have_a_speed(home, monkeypatch):
    calls = []

    def measured(bench, model, kind, tokens):
        calls.append((model.name, kind, np.load(tokens).shape))
        return {"perplexity": 3.5}

    class Texts:
        def batches(self, text, half, tokens):
            return [torch.zeros(1, 4, dtype=torch.int64)] * (tokens // 4)

    monkeypatch.setattr(serving, "measured", measured)
    monkeypatch.setattr(Bench, "subject", Texts())
    path = home / "serving.csv"
    Bench(path, 1, 64).put(DENSE, "Q8_0", {"perplexity": 3.5})
    Bench(path, 1, 64).put(EVEN, "Q8_0", {"decode_1": 7})
    for again in (False, False, True):
        serving.quality(Bench(path, 1, 64, 8), [DENSE, EVEN], ("Q8_0",), again)
    names = [name for name, _, _ in calls]
    assert names == [EVEN.name, DENSE.name, EVEN.name]
    assert {shape for _, _, shape in calls} == {(2, 4)}


def test_a_tool_that_fails_ends_the_run_and_leaves_no_file(home, monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\necho "$1" > "$2"\n[ "$3" = Q4_1 ] || { echo no such type >&2; exit 3; }\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tool.with_name("python")))
    bench = Bench(home / "serving.csv", 1, 64)
    serving.quantise(bench, EVEN, "Q4_1", Path("dense.gguf"))
    assert EVEN.file("Q4_1").read_text().strip() == str(EVEN.file("F32"))
    with pytest.raises(SystemExit, match="no such type"):
        serving.quantise(bench, EVEN, "Q4_K_M", Path("dense.gguf"))
    assert not EVEN.file("Q4_K_M").exists()


def test_every_model_and_format_has_a_file_of_its_own():
    files = {model.file(kind) for model in MODELS for kind in FORMATS}
    assert len(files) == len(MODELS) * len(FORMATS)
    assert len({model.folder for model in MODELS}) == len(MODELS)


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama-cpp-python is here")
def test_without_llama_cpp_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as ended:
        serving.read([])
    assert ended.value.code == 2
    assert "make serving, then .serving/env/bin/python" in capsys.readouterr().err


def test_each_format_is_a_point_of_the_figure():
    pytest.importorskip("matplotlib")
    made = [
        {"model": name, "format": kind, "perplexity": "20", "decode_1": "30", "text": "brown"}
        | {"speed_threads": "1"}
        for name in ("dense", "even 0.5")
        for kind in FORMATS
    ]
    not_timed = {"model": "dense", "format": "F32", "perplexity": "20", "decode_1": ""}
    figure = figures.serving([*made, not_timed], "")
    panel = figure.axes[0]
    points = [line for line in panel.lines if len(line.get_xdata()) == 1]
    assert len(points) == len(made)
    assert len({line.get_marker() for line in points}) == len(FORMATS)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*FORMATS]
    assert {"dense", "even 0.5"} <= {text.get_text() for text in panel.texts}


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_perplexity_in_llama_cpp_is_that_of_the_folder(tiny_llama, tiny_batches, tmp_path):
    files = pytest.importorskip("tests.serving.gguf_files")
    model = tiny_llama()
    folder = files.compressed(model, tiny_batches(), tmp_path / "out", keep={"mlp": [0.9, 0.4]})
    like = files.dense_file(model, tmp_path / "dense.gguf")
    file = grail.export_gguf(folder, tmp_path / "small.gguf", like).path
    tokens = torch.cat(list(tiny_batches()))
    np.save(tmp_path / "tokens.npy", tokens.int().numpy())
    command = [sys.executable, "-m", "bench.quality.llama_perplexity", str(file)]
    command += [str(tmp_path / "tokens.npy"), "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    network = load_model(folder)[0]
    with torch.inference_mode():
        logits = network(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    found = json.loads(done.stdout)
    assert found["tokens"] == tokens[:, 1:].numel()
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_says_what_is_kept():
    assert Model("x").folder.name == "x"
    kept = {(model.keep, model.heads < 1, model.uneven) for model in MODELS}
    assert len(kept) == len(MODELS)


def test_every_committed_file_in_float32_computes_what_the_folder_does():
    committed = [row for row in rows(ROOT / "bench/results/serving.csv") if row["format"] == "F32"]
    assert {"dense", EVEN.name, UNEVEN.name} <= {row["model"] for row in committed}
    for row in committed:
        assert float(row["difference"]) <= 1e-4
        assert float(row["agreement"]) >= 0.999
