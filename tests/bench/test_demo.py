"""What `make demo` does."""

import dataclasses
import json
import random
import re
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from bench.report import demo
from grail.report.report import Report


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """The demo writes into a folder of the test."""
    folders = ["--output", str(tmp_path / "out"), "--texts", str(tmp_path / "texts")]
    monkeypatch.setattr(sys, "argv", ["demo", *folders])


def paragraphs(path):
    text = path.read_text(encoding="utf-8")
    return {part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()}


def test_calibration_and_heldout_text_are_disjoint_and_long_enough(
    arguments, monkeypatch, tmp_path
):
    monkeypatch.setattr(demo, "smollm2", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "compressed", lambda *_: sys.exit("started"))
    with pytest.raises(SystemExit, match="started"):
        demo.main()
    calibration, heldout = (
        paragraphs(tmp_path / "texts" / f"python-{part}.txt") for part in ("calibration", "heldout")
    )
    assert not calibration & heldout
    # A token of English text averages under five characters; six leaves room.
    assert sum(map(len, calibration)) > 6 * demo.CALIBRATION_TOKENS
    assert sum(map(len, heldout)) > 6 * demo.HELDOUT_TOKENS


def test_only_the_output_of_an_earlier_demo_is_replaced(tmp_path):
    folders = [demo.folder(tmp_path, keep) for keep in demo.KEEPS]
    for folder in folders:
        folder.mkdir()
        (folder / "mine.txt").touch()
    (tmp_path / "mine.txt").touch()
    (folders[0] / "report.json").touch()
    demo._replace(tmp_path)
    assert [folder.exists() for folder in folders] == [False, True]
    assert (tmp_path / "mine.txt").exists()


def test_it_compresses_at_each_share_and_prints_one_table(
    arguments, tiny_folder, monkeypatch, tmp_path, capsys
):
    draw = random.Random(0)
    topics = {
        str(topic): " ".join(f"w{draw.randrange(3, 97)}" for _ in range(3000)) for topic in range(2)
    }
    monkeypatch.setattr(demo, "smollm2", lambda: tiny_folder)
    monkeypatch.setattr(demo, "python_reference", lambda: topics)
    monkeypatch.setattr(demo.texts, "source", lambda cache: topics)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "HELDOUT_TOKENS", 512)
    monkeypatch.setenv("COLUMNS", "120")
    demo.main()
    shown = capsys.readouterr().out
    lines = [
        line
        for line in map(str.strip, shown.splitlines())
        if re.match(r"dense|keep [\d.]+: ", line)
    ]
    assert len(lines) == 1 + 3 * len(demo.KEEPS)
    names = ["python-heldout.txt", "source-heldout.txt"]
    by_text = re.findall(r"(python|source)-heldout\.txt\s+(dense|keep [\d.]+: )", shown)
    assert len(by_text) == len(names) * len(lines)
    dense = set()
    for keep in demo.KEEPS:
        folder = demo.folder(tmp_path / "out", keep)
        report = Report.from_json((folder / "report.json").read_text())
        assert {"model.safetensors", "report.html", "README.md"} <= {
            f.name for f in folder.iterdir()
        }
        assert list(report.evaluation) == ["dense", "pruned", "compensated", "restored"]
        assert [row.selector for row in report.evaluation.values()] == [
            *(None, "wanda", "wanda", "greedy")
        ]
        assert {site.kept for site in report.sites} == {int(keep * 80)}
        dense.add(json.dumps(dataclasses.asdict(report.evaluation["dense"])))
        assert [score.text for score in report.evaluation["restored"].scores] == names
        assert report.samples[0].keys() == {"prompt", "dense", "pruned", "restored"}
        for row in report.evaluation.values():
            assert any(row.label in line for line in lines)
    assert len(dense) == 1
