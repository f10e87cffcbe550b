"""`grail bench`: its options, its output and its files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from grail.commands import bench
from tests.commands.test_cli import grail, refusal
from tests.serving.test_speed_report import rows

TURNS = rows("dense.gguf") + rows("small.gguf", cpu_ratio=1.436, runtime="transformers 5")


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for; it gets two files."""
    found = []

    def measured(files, **settings):
        found.append((files, settings))
        return TURNS

    monkeypatch.setattr(bench, "measure_speed", measured)
    return found


def test_prints_a_table_for_each_batch_size_and_how_it_was_measured(asked):
    result = grail("bench", "out", "small.gguf", "--against", "dense.gguf")
    assert result.exit_code == 0, result.output
    assert asked == [(["out", "small.gguf"], {"against": "dense.gguf"})]
    for text in ("batch 1", "batch 8", "80.0 ±20%   1.44", "medians of 3 rounds", "by CPU time"):
        assert text in result.stdout
    assert "note    the runtimes differ" in result.stderr


def test_options_are_those_of_the_call(asked):
    sizes = ["--prompt", 8, "--new", 4, "--batch", "1,2, 16", "--rounds", 2, "--threads", 4]
    grail("bench", "out", *sizes, "--one-by-one", "--trust-remote-code")
    ((_, settings),) = asked
    assert settings == {
        "prompt": 8,
        "new": 4,
        "batches": [1, 2, 16],
        "rounds": 2,
        "threads": 4,
        "one_by_one": True,
        "trust_remote_code": True,
    }


def test_json_has_every_round(asked):
    found = json.loads(grail("bench", "out", "--json").stdout)
    assert len(found) == len(TURNS)
    assert found[0]["wall"] == [1.0, 1.25, 1.5]
    assert found[-1]["ratio"] == 1.436


def test_writes_a_csv_file_and_a_figure(asked, tmp_path):
    pytest.importorskip("matplotlib")
    table, figure = tmp_path / "a.csv", tmp_path / "a.svg"
    assert grail("bench", "out", "--csv", table, "--plot", figure).exit_code == 0
    assert table.read_text().startswith("file,runtime,form,bytes,batch,phase,")
    assert "<svg" in figure.read_text()
    assert "exists already" in refusal(grail("bench", "out", "--csv", table))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "missing argument 'FILES'"),
        (["nowhere.gguf"], "nowhere.gguf: no such file or folder"),
        (["out", "--batch", "0"], "'0' is no list of sizes; give whole numbers of at least 1"),
        (["out", "--batch", "1,x"], "'1,x' is no list of sizes"),
        (["out", "--batch", "-8"], "'-8' is no list of sizes"),
        (["out", "--batch", "1,1"], "batches must be one or more different sizes"),
        (["out", "--rounds", "0"], "greater than or equal to 1"),
        (["out", "--plot", "a.jpg"], "a figure ends in .svg, .png, .pdf; got a.jpg"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(grail("bench", *options))
    assert list(tmp_path.iterdir()) == []


def test_the_page_s_commands_run_as_typed(asked, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "serving" / "speed.md").read_text(encoding="utf-8")
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("    grail ")]
    assert len(lines) == 2
    for _, *words in lines:
        done = grail(*words)
        assert done.exit_code == 0, done.output
    assert asked[0] == (["out/"], {"against": "dense/"})
    assert asked[1] == (["small.gguf"], {"against": "dense.gguf", "batches": [1, 8]})
    assert {path.name for path in tmp_path.iterdir()} == {"speed.csv", "speed.svg"}


def test_the_page_lists_every_option_with_its_default(asked):
    page = (Path(__file__).parents[2] / "docs" / "serving" / "speed.md").read_text(encoding="utf-8")
    table = page.split("## Options")[1].split("## Limits")[0]
    shown = " ".join(grail("bench", "--help").stdout.split())
    for option in ("--against", "--prompt", "--batch", "--rounds", "--threads", "--csv", "--plot"):
        assert f"`{option}" in table
        assert option in shown
    fields = bench.BenchOptions.__dataclass_fields__
    assert f"| {fields['prompt'].default}, {fields['new'].default} |" in table
    assert f"| {fields['rounds'].default} |" in table
