"""bench/kernels/search.py: what it measures is checked first, and what it writes can be read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.kernels import search
from grail import select

SHAPE = (20, 96, 40)
ARGUMENTS = ["--device", "cpu", "--repeats", "2", "--shape", "20,96,40", "--experts", "3"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PRODUCT", 256)


def test_every_case_is_written_with_its_conditions(tmp_path: Path) -> None:
    path = tmp_path / "search.csv"
    threads = torch.get_num_threads()
    assert search.main([*ARGUMENTS, "--output", str(path)]) == 0
    assert torch.get_num_threads() == threads
    rows = list(csv.DictReader(path.open()))
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("floor", "greedy"),
        ("floor", "floor"),
        ("threads", "two threads"),
        ("threads", "one thread"),
        ("batch", "together"),
        ("batch", "one by one"),
    ]
    assert all(float(row["p50"]) > 0 and row["torch"] and row["kept"] == "40" for row in rows)


def test_the_floor_is_what_the_choices_multiply() -> None:
    outputs, channels, kept = SHAPE
    counted = 2 * outputs * channels**2  # W G
    for known in range(kept):  # a row of S − V Vᵀ, and what it takes from A
        counted += 2 * known * channels + 2 * outputs * channels
    assert search.flops(SHAPE) == pytest.approx(counted, rel=0.01)


def test_the_error_is_that_of_least_squares() -> None:
    site = search.view(SHAPE, "cpu")
    index = search.choices([site])[0]
    gram, weight = site.gram.matrix().double(), site.consumer.double()
    fitted = torch.linalg.solve(gram[index][:, index], gram[index] @ weight.mT).mT
    lost = weight.clone()
    lost[:, index] -= fitted
    assert search.lost(site, index) == pytest.approx(float((lost @ gram * lost).sum()), rel=1e-6)


def test_choices_that_differ_in_a_batch_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = search.choices

    def wrong(views: Sequence[select.View]) -> list[Tensor]:
        found = right(views)
        return [index.flip(0) for index in found] if len(views) > 1 else found

    monkeypatch.setattr(search, "choices", wrong)
    assert search.main(ARGUMENTS) == 1
    output = capsys.readouterr().out
    assert "otherwise together than alone" in output
    assert "batch:" not in output


def test_a_choice_worse_than_the_loudest_channels_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "choices", lambda views: [torch.arange(40) for _ in views])
    monkeypatch.setattr(search, "lost", lambda site, index: float(index[1] == 1))
    assert search.main(ARGUMENTS) == 1
    assert "greedy leaves" in capsys.readouterr().out
