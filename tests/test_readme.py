"""README.md runs as typed, and its numbers are those of the committed results."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("    grail ")
]


def test_its_python_runs(tiny_llama, tiny_batches, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {
        "torch": torch,
        "model": tiny_llama(),
        "batches": tiny_batches(),
        "hidden": torch.randn(3, 50, 12),
        "mask": torch.rand(3, 50) > 0.2,
        "keep_index": [0, 3, 4, 9],
        "down_proj": torch.nn.Linear(12, 5),
    }
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        exec(block, names)
    assert names["down_proj"].weight.shape == (5, 4)
    assert Path("out/model.safetensors").is_file()
    assert "→" in capsys.readouterr().out


def test_its_commands_run(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail.commands import app

    monkeypatch.chdir(tmp_path)
    words = " ".join(f"w{3 + 7 * i % 94}" for i in range(3000))
    for name in ("text.txt", "heldout.txt"):
        Path(name).write_text(words, encoding="utf-8")
    assert [command.split()[1] for command in COMMANDS] == ["compress", "evaluate", "inspect"]
    for command in COMMANDS:
        arguments = shlex.split(command.replace("MODEL", str(tiny_folder)))[1:]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert {"model.safetensors", "report.json"} <= {p.name for p in Path("out").iterdir()}


def test_its_table_is_the_committed_csv():
    from bench import endtoend

    rows = endtoend.Table(endtoend.RESULTS / "smollm2_table.csv", ()).rows
    assert endtoend.markdown(rows) in README


def test_its_files_exist_and_it_stays_short():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 120
