"""bench/kernels/gram.py: what it measures is checked first, and what it writes can be read."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import grail_kernels as gk
from bench.kernels import gram
from bench.tools import model
from bench.tools.commandline import DTYPES


def run(*arguments: str) -> int:
    return gram.main(["--device", "cpu", "--repeats", "2", "--shape", "70,33", *arguments])


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "measure_roof", lambda dtype, device: gram.Roof(1e11, 1e10))


def test_predictions_have_a_file_of_their_own() -> None:
    """In one folder with measured rows, and in bench/results, neither replaces the other."""
    for given, name in (([], "gram_cpu.csv"), (["--predict", "h100"], "gram_predicted.csv")):
        options = gram.parse(["--device", "cpu", "--output", "new", *given])
        assert options.output == Path("new", name)


def test_every_number_is_written_with_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "gram.csv"
    assert run("--dtype", "fp32", "--output", str(path)) == 0
    rows = list(csv.DictReader(path.open()))
    ours = {row["metric"]: row for row in rows if row["provider"] == "grail"}
    assert ours.keys() == {"first call", "time", "limit", "error", "model", "executed", "moved"}
    assert float(ours["first call"]["p50"]) > 0
    assert float(ours["time"]["p20"]) <= float(ours["time"]["p50"]) <= float(ours["time"]["p80"])
    assert float(ours["error"]["p50"]) < 16
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert {row["metric"] for row in rows if row["kernel"] == "roof"} == {"product", "copy"}


def test_the_model_of_time_stands_beside_every_row_of_grail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = model.Gpu("a GPU", "sm_90", 132, 1e11, 1e10)
    monkeypatch.setattr(gram, "modelled", lambda dtype, device, roofs: gpu)
    path = tmp_path / "gram.csv"
    assert run("--dtype", "fp32", "--output", str(path)) == 0
    expected = gpu.predict([70], 33, torch.float32)
    found = {
        row["metric"]: float(row["p50"])
        for row in csv.DictReader(path.open())
        if row["provider"] == "grail"
    }
    for metric, _, value in expected.numbers():
        assert found[metric] == pytest.approx(value, rel=1e-5)
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("grail"))
    assert printed.split()[-2:] == [f"{1e3 * expected.seconds:.2f}", f"{expected.waves:.2f}"]


def test_the_model_takes_a_gpu_as_it_is_with_the_rate_of_its_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(multi_processor_count=78)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    roofs = {"fp32": gram.Roof(1e13, 1e12), "bf16": gram.Roof(1e14, 2e12)}
    for dtype in roofs:
        found = gram.modelled(dtype, "cuda", roofs)
        assert found == model.Gpu("a GPU", "sm_90", 78, 1e14, 2e12)
    assert gram.modelled("bf16", "cpu", roofs) == model.Cpu(1e13, 1e12)


def test_a_prediction_is_labelled_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gram, "measure_roof", None)
    path = tmp_path / "predicted.csv"
    assert run("--predict", "h200", "--dtype", "bf16", "--output", str(path)) == 0
    assert "H200, predicted, not measured" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert {(row["provider"], row["device"]) for row in rows} == {("model", "H200 (predicted)")}
    values = {row["metric"]: float(row["p50"]) for row in rows}
    assert values["TF-eq"] == pytest.approx(2 * 70 * 33**2 / values["model"] / 1e12, rel=1e-5)
    # 70 x 33 bf16 activations, and G in fp32 to and fro.
    full = (2 * 70 * 33 + 8 * 33**2) / 4.8e12
    assert values["speed"] == pytest.approx(full / values["model"], rel=1e-5)


def test_a_prediction_is_of_every_model_unless_one_is_named() -> None:
    options = gram.parse(["--predict", "h100"])
    every = {*gram.MODELS, *gram.HEADS, *gram.EXPERTS}
    assert set(options.shapes) == {s for name in every for s in gram.shapes_of(name, "cuda")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_measured(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dtype", dtype) == 0
    assert "\ngrail " in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gk.gram_
    monkeypatch.setattr(gk, "gram_", lambda out, x: right(out, x).mul_(1.0001))
    path = tmp_path / "gram.csv"
    assert run("--dtype", "fp32", "--output", str(path)) == 1
    assert "grail is off by" in capsys.readouterr().out
    assert all(row["kernel"] == "roof" for row in csv.DictReader(path.open()))


def test_a_product_in_bf16_shows_its_rounding() -> None:
    shape = gram.Shape(300, 33)
    x = gram.activations(shape, torch.bfloat16, "cpu")
    found = gram.errors(gram.providers(shape, torch.bfloat16, "cpu"), x, shape)
    assert found["grail"][0] < 16 < found["mm"][0]


@pytest.mark.parametrize(
    ("option", "kernel"), [("--heads", "gram_batched"), ("--experts", "gram_ragged")]
)
def test_batches_are_measured_against_a_loop_and_bmm(
    option: str, kernel: str, tmp_path: Path
) -> None:
    path = tmp_path / "gram.csv"
    case = [option, "60,5,20", "--dtype", "bf16", "--output", str(path)]
    assert gram.main(["--device", "cpu", "--repeats", "2", *case]) == 0
    rows = [row for row in csv.DictReader(path.open()) if row["metric"] == "error"]
    assert {(row["kernel"], row["provider"]) for row in rows} == {
        (kernel, provider) for provider in ("grail", "loop", "bmm")
    }
    assert all(float(row["p50"]) < 16 and row["matrices"] == "5" for row in rows)


def test_calls_are_measured_with_their_readout(tmp_path: Path) -> None:
    path = tmp_path / "gram.csv"
    case = ["--calls", "70,30,33", "--dtype", "bf16", "--output", str(path)]
    assert gram.main(["--device", "cpu", "--repeats", "2", *case]) == 0
    rows = [row for row in csv.DictReader(path.open()) if row["metric"] == "error"]
    assert {(row["kernel"], row["provider"], row["call"]) for row in rows} == {
        ("gram_readout", provider, "30") for provider in ("grail", "addmm")
    }
    assert all(float(row["p50"]) < 16 and row["openblas"] for row in rows)
    shape = gram.Shape(70, 33, call=30)
    x = gram.activations(shape, torch.bfloat16, "cpu")
    exact = x.double().T @ x.double()
    for call in gram.providers(shape, torch.bfloat16, "cpu").values():
        torch.testing.assert_close(call(x).double(), exact, rtol=1e-5, atol=1e-4)


def test_calls_of_every_size_are_measured_on_a_cpu_unless_a_case_is_named() -> None:
    calls = {gram.Shape(tokens, channels, call=call) for tokens, call, channels in gram.CALLS}
    assert calls <= set(gram.parse(["--device", "cpu"]).shapes)
    for named in (["--model", "llama-3-8b"], ["--shape", "70,33"], ["--predict", "h100"]):
        assert not calls & set(gram.parse(["--device", "cpu", *named]).shapes)


def test_a_wrong_matrix_of_a_batch_is_found() -> None:
    shape = gram.Shape(60, 20, matrices=5)
    calls = gram.providers(shape, torch.float32, "cpu")
    right = calls["grail"]

    def wrong(x: torch.Tensor) -> torch.Tensor:
        result = right(x).clone()
        result[-1] *= 1.0001
        return result

    x = gram.activations(shape, torch.float32, "cpu")
    assert gram.errors(calls | {"grail": wrong}, x, shape)["grail"][0] > 16


def test_experts_share_all_tokens_and_one_has_none() -> None:
    shape = gram.Shape(1000, 20, matrices=7, ragged=True)
    x = gram.activations(shape, torch.float32, "cpu")
    sizes = [len(part) for part in gram.matrices_of(x, shape)]
    assert sum(sizes) == 1000
    assert len(sizes) == 7
    assert sizes[-1] == 0 < min(sizes[:-1])


def test_published_kernels_join_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = ModuleType("flash_muon")
    theirs.matmul_transpose = lambda rows: rows @ rows.T  # type: ignore[attr-defined]
    interface = ModuleType("quack.gemm_interface")
    interface.gemm_symmetric = (  # type: ignore[attr-defined]
        lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype)
    )
    assert gram.published() == {}
    for module in (theirs, ModuleType("quack"), interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    x = torch.randn(50, 8)
    found = gram.published()
    assert found.keys() == {"flash-muon", "quack"}
    for call in found.values():
        torch.testing.assert_close(call(x), x.T @ x)


def test_no_case_starts_when_the_seconds_are_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dtype", "fp32", "--seconds", "1e-9") == 0
    output = capsys.readouterr().out
    assert "left out, --seconds are over" in output
    assert "grail" not in output


def test_the_limit_is_the_slower_of_products_and_memory() -> None:
    shape = gram.Shape(tokens=1000, channels=99)
    assert gram.Roof(1e6, 1e30).limit(shape, 4) == pytest.approx(1000 * 99 * 100 / 1e6)
    moved = 1000 * 99 * 4 + 4 * 99 * 100
    assert gram.Roof(1e30, 1e6).limit(shape, 4) == pytest.approx(moved / 1e6)
    heads = gram.Shape(tokens=1000, channels=99, matrices=3)
    assert gram.Roof(1e30, 1e6).limit(heads, 4) == pytest.approx(3 * moved / 1e6)
    experts = gram.Shape(tokens=1000, channels=99, matrices=3, ragged=True)
    assert gram.Roof(1e6, 1e30).limit(experts, 4) == pytest.approx(1000 * 99 * 100 / 1e6)


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


@pytest.mark.parametrize("text", ["8192", "0,5", "a,b"])
def test_a_bad_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gram.main(["--shape", text])
    assert text in capsys.readouterr().err
