"""The bench of ONNX files: its committed rows are sound, and it runs."""

import time

import pytest
import torch

from bench.quality import onnx
from bench.tools.measuring import RESULTS, read_rows


def test_every_committed_file_computes_what_torch_does():
    rows = read_rows(RESULTS / "onnx.csv")
    assert {row["network"] for row in rows} == set(onnx.NETWORKS)
    for row in rows:
        assert row["runtime"].startswith("torch") or float(row["difference"]) <= 1e-4


def test_ratios_are_of_the_same_round_and_calls_are_repeated(monkeypatch):
    counts = {"dense": 0, "small": 0}
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def run(name, seconds):
        def called(x):
            counts[name] += 1
            clock[0] += seconds

        return called

    dense, small = onnx.in_turns(run("dense", 0.01), run("small", 0.004), torch.ones(1), 3)
    assert dense == pytest.approx([0.01] * 3)
    assert small == pytest.approx([0.004] * 3)
    assert counts == {"dense": 1 + 1 + 3 * 5, "small": 1 + 3 * 5}  # of at least 0.05 s a time


def test_a_package_that_is_missing_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    onnx.main(["--network", "timm ViT-Ti/16", "--output", str(tmp_path / "onnx.csv")])
    assert "timm ViT-Ti/16: left out, timm is not installed" in capsys.readouterr().out
    assert not (tmp_path / "onnx.csv").exists()


def test_a_network_is_measured_in_every_runtime(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "_LEAST", 0.0)
    name = next(iter(onnx.NETWORKS))
    onnx.main(["--network", name, "--output", str(tmp_path / "onnx.csv"), "--repeats", "2"])
    rows = read_rows(tmp_path / "onnx.csv")
    assert [row["batch"] for row in rows] == ["1", "8"] * len({row["runtime"] for row in rows})
    assert {row["runtime"].split()[0] for row in rows} >= {"torch", "ONNX"}
    assert int(rows[0]["small_bytes"]) < 0.6 * int(rows[0]["dense_bytes"])
