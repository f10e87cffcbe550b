"""Figures are drawn from a CSV alone; the accuracy and memory benches measure what they say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

import grail_kernels as gk
from bench.kernels import accuracy, memory
from bench.report import figures
from bench.tools.measuring import ROOT
from grail_kernels import reference, tuning

COMMITTED = figures.drawable(figures.RESULTS)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_csv_with_a_figure_is_drawn(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert figures.main([str(copy)]) == 0
    drawn = copy.with_suffix(".svg").read_bytes()
    assert len(drawn) > 5000
    # The same CSV gives the same file: a figure changes only with its numbers.
    assert figures.main([str(copy)]) == 0
    assert copy.with_suffix(".svg").read_bytes() == drawn


def test_each_figure_has_a_committed_csv_and_its_drawing() -> None:
    kinds = {figures.kind(path)[0] for path in COMMITTED}
    assert kinds == figures.FIGURES.keys()
    assert all(path.with_suffix(".svg").exists() for path in COMMITTED)


def test_a_csv_without_a_figure_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(tmp_path / "checks.csv")])
    assert "checks.csv has no figure" in capsys.readouterr().err


def test_the_roof_ends_the_axis_and_a_faster_rival_stays_in() -> None:
    pytest.importorskip("matplotlib")
    case = {"kernel": "gram", "dtype": "fp32", "tokens": "8", "channels": "4", "device": "x"}
    seconds = {"grail": 2.0, "rival": 1.25}
    rows = [
        case | {"provider": provider, "metric": metric, "p50": str(value)}
        for provider, time in seconds.items()
        for metric, value in (("time", time), ("limit", 1.0))
    ]
    figure = figures.roof(rows)
    panel = figure.axes[0]
    assert panel.get_xlim() == (0, 100)
    points = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    assert (points["grail"], points["rival"]) == ([50], [80])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["grail", "rival"]
    rows[2]["p50"] = "0.5"
    assert figures.roof(rows).axes[0].get_xlim() == (0, 200)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_title_says_a_number_and_text_is_legible_at_its_width(path: Path) -> None:
    drawn = path.with_suffix(".svg").read_text(encoding="utf-8")
    title = " ".join(re.findall(r"<text [^>]*font-weight: 700[^>]*>([^<]*)<", drawn))
    assert re.search(r"\d", title)
    assert len(title.split()) > 5
    assert min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawn)) >= 9
    assert 'width="468pt"' in drawn  # 6.5 inches


def test_a_title_leaves_out_what_is_not_measured() -> None:
    pytest.importorskip("matplotlib")
    cell = {"calibration": "passages", "sequences": "16", "sites": "mlp", "keep": "0.5"}
    measured = {"dense": (10, 10), "pruned": (40, 90), "defaults": (20, 30)}
    rows = [
        cell | {"lever": lever, "text": text, "perplexity": str(value)}
        for lever, of in measured.items()
        for text, value in zip(("passages", "brown"), of, strict=True)
    ]
    title = " ".join(figures.FIGURES["levers"](rows, "").texts[0].get_text().split())
    assert title == (
        "With half of the channels GRAIL recovers 50% of the loss on text like the calibration's, "
        "50% on other text"
    )


def test_every_figure_of_a_page_has_a_sentence_for_those_who_do_not_see_it() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [
        (page.name, text)
        for page in pages
        for text in re.findall(r"!\[([^]]*)\]\([^)]*\.svg\)", page.read_text(encoding="utf-8"))
    ]
    assert len(shown) > 10
    assert [each for each in shown if len(each[1].split()) < 10] == []


def test_accuracy_is_that_of_every_power_of_two_of_tokens() -> None:
    rows = accuracy.measure("cpu", most=1100, channels=10)
    assert {int(row["tokens"]) for row in rows} == {256, 512, 1024}
    found = {(row["provider"], row["dtype"]) for row in rows}
    assert found == {
        ("grail", "float32"),
        ("addmm", "float32"),
        ("grail", "bfloat16"),
        ("mm", "bfloat16"),
    }
    x = torch.randn(1100, 10, generator=torch.Generator().manual_seed(0)) + 0.5
    (last,) = (
        r for r in rows if (r["provider"], r["dtype"], r["tokens"]) == ("mm", "bfloat16", "1024")
    )
    part = x.bfloat16()[:1024]
    exact, result = reference.gram(part), (part.T @ part).double()
    bias = ((result - exact).diagonal() / exact.diagonal()).mean()
    assert float(last["diagonal_bias"]) == pytest.approx(bias.item(), rel=1e-3)
    ratio = reference.error_ratio(result.float(), exact, reference.gram(part.abs()))
    assert float(last["error"]) == pytest.approx(ratio, rel=1e-3)


def test_a_library_that_cannot_is_left_out_of_accuracy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> torch.Tensor:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(torch, "addmm", fail)
    rows = accuracy.measure("cpu", most=256, channels=3)
    assert {row["provider"] for row in rows} == {"grail", "mm"}
    assert "addmm in torch.float32 left out: not on this machine" in capsys.readouterr().out


def test_accuracy_patches_the_chain_that_launches_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    right = gk.gram_

    def spy(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert tuning.LAUNCHED_TOKENS >= tuning.CHAIN_TOKENS
        seen.append((tuning.CHAIN_TOKENS, tuning.token_splits(1, 10**6, 100)))
        return right(out, x)

    monkeypatch.setattr(gk, "gram_", spy)
    for _, _, dtype, call in accuracy.providers("cpu", 3):
        call(torch.ones(5, 3, dtype=dtype))
    assert set(seen) == {(tuning.CHAIN_TOKENS, 1)}
    assert tuning.token_splits(1, 10**6, 100) > 1


def test_a_biased_sum_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = gk.gram_
    arguments = ["--tokens", "256", "--channels", "5", "--output", str(tmp_path / "accuracy.csv")]
    assert accuracy.main(arguments) == 0
    monkeypatch.setattr(gk, "gram_", lambda out, x: right(out, x).mul_(1 - 2e-5))
    assert accuracy.main(arguments) == 1


def test_the_accumulator_takes_what_its_formula_says(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    channels = 2560
    assert memory.main(["--channels", str(channels), "--output", str(path)]) == 0
    rows = {(r["provider"], r["metric"]): int(r["p50"]) for r in csv.DictReader(path.open())}
    for provider in memory.PROVIDERS:
        # Sums, counts and masks: a few numbers a channel, a byte a buffered token.
        spare = 32 * channels + 2 * tuning.BUFFER_TOKENS
        assert 0 <= rows[provider, "accumulator"] - rows[provider, "formula"] <= spare
        assert rows[provider, "peak"] >= rows[provider, "accumulator"]
    assert rows["grail", "accumulator"] < 0.56 * rows["dense", "accumulator"]
