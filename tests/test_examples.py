"""Each program of examples/ runs on a tiny model, and computes what its docstring says."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grail

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from tests.prepared import inside  # noqa: E402

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.py"))
TINY = ["--model", "MODEL", "--text", "text.txt", "--length", "64", "--tokens", "1024"]
HELD_OUT = ["--heldout", "heldout.txt"]


@pytest.fixture
def run(prepared, tmp_path, monkeypatch):
    """`run(name, *arguments)`: the module of an example, and what its `main` returns."""
    monkeypatch.setattr(grail.select, "_registry", dict(grail.select._registry))
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepared.place({"MODEL", "text.txt", "heldout.txt"}, tmp_path)

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with inside(tmp_path):
            return module, module.main(arguments)

    return run


def test_a_model_is_compressed_and_both_generate(run, tmp_path, capsys):
    run("compress_and_generate", *TINY, *HELD_OUT, "--new", "4", "--prompt", "w3 w4")
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:2]] == ["dense:", "narrow:"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {block.mlp.down_proj.in_features for block in model.model.layers} == {192}


def test_gptq_of_the_own_loop_is_better_than_rounding_to_nearest(run):
    _, rows = run("own_calibration_loop", *TINY)
    assert [name for name, *_ in rows] == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    assert all(gptq < nearest for _, nearest, gptq in rows)


def test_its_gptq_leaves_weights_of_the_grid_alone_and_has_the_error_that_it_prints(run):
    module, _ = run("own_calibration_loop", *TINY, "--count", "1")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    grid = module.Grid(weight, bits=4)
    rounded = module.gptq(weight, 2 * x.T @ x, grid)
    error = ((weight - rounded) @ x.T).norm() / (weight @ x.T).norm()
    assert module.output_error(weight, rounded, 2 * x.T @ x) == pytest.approx(float(error))
    assert all(len(row.unique()) <= 16 for row in rounded.div(grid.step[:, None]).round())
    again = module.gptq(rounded, 2 * x.T @ x, grid)
    torch.testing.assert_close(again, rounded)


def test_the_own_selector_scores_the_error_left_after_compensation(run):
    arguments = [*TINY, *HELD_OUT, "--selectors", "magnitude,one-shot"]
    module, found = run("own_selector", *arguments)
    assert list(found) == ["magnitude", "one-shot"]
    assert all(pruned != compensated for pruned, compensated in found.values())

    gram = grail.Gram(channels=6)
    gram.update(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    consumer = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    view = type("View", (), {"gram": gram, "consumer": consumer})
    damped = gram.matrix().double()
    damped += 1e-3 * damped.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    for channel, score in enumerate(module.one_shot(view).tolist()):
        others = [h for h in range(6) if h != channel]
        cross = damped[channel, others]
        # What no combination of the others gives: the Schur complement of the channel.
        explained = cross @ torch.linalg.solve(damped[others][:, others], cross)
        left = damped[channel, channel] - explained
        expected = float(consumer[:, channel].double().square().sum() * left)
        assert score == pytest.approx(expected, rel=1e-9)


def test_a_vision_network_is_restored_and_reloads(run, tmp_path):
    cache = str(ROOT / ".assets")
    _, found = run("vision_network", "--images", "128", "--test", "500", "--cache", cache)
    assert found["pruned"] < found["compensated"] - 0.3
    assert found["compensated"] > found["dense"] - 0.05
    assert (tmp_path / "out-vision" / "grail.json").is_file()


def test_a_model_is_pruned_quantised_and_written_as_gguf(run, prepared, tmp_path):
    prepared.place({"dense.gguf"}, tmp_path)
    _, file = run("quantise_to_gguf", *TINY, *HELD_OUT, "--model", "dense.gguf")
    assert (file.dtype, set(file.widths)) == ("q4_1", {768})
    assert file.path.is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_has_a_test_and_shows_its_call(path):
    assert f'"{path.stem}"' in Path(__file__).read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"    python examples/{path.name} --" in said


def test_one_answers_help_as_a_program():
    command = [sys.executable, FILES[0], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--keep" in done.stdout
