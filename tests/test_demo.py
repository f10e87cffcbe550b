"""What `make demo` starts."""

import re
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from bench import demo


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs the demo up to the command line; gives the arguments that reach it, as a dictionary."""

    def start():
        seen = []
        monkeypatch.setattr(demo, "app", seen.extend)
        monkeypatch.setattr(demo, "smollm2", lambda: tmp_path / "model.gguf")
        folders = ["--output", str(tmp_path / "out"), "--texts", str(tmp_path / "texts")]
        monkeypatch.setattr(sys, "argv", ["demo", *folders])
        demo.main()
        assert seen[0] == "compress"
        return dict(zip(seen[2::2], seen[3::2], strict=True))

    return start


def paragraphs(path):
    with open(path, encoding="utf-8") as file:
        return {text.strip() for text in re.split(r"\n\s*\n", file.read()) if text.strip()}


def test_calibration_and_heldout_text_are_disjoint_and_long_enough(started):
    arguments = started()
    calibration = paragraphs(arguments["--calibration"])
    heldout = paragraphs(arguments["--evaluate"])
    assert not calibration & heldout
    # A token of English text averages under five characters; six leaves room.
    assert sum(map(len, calibration)) > 6 * demo.CALIBRATION_TOKENS
    assert sum(map(len, heldout)) > 6 * demo.HELDOUT_TOKENS


def test_only_the_output_of_an_earlier_run_is_replaced(started, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").touch()
    started()
    assert (output / "mine.txt").exists()
    (output / "report.json").touch()
    started()
    assert not output.exists()
