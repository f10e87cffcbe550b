"""The search: only a launch that is right, repeats and is faster gets into the table."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from bench.tools import tune
from grail_kernels import gram_serve, tuning
from grail_kernels.backend import interpreting

WIDE = ("gram", "16-bit", "wide")


def default(key: tuning.Key) -> tuning.Row:
    return tuning.read_table(tuning.TABLE)[tuning.DEFAULT, key]


def judged(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[tuning.Config], float]
) -> list[tuning.Config]:
    """Let candidates take that long, without running them; the list of those that were tried."""
    tried: list[tuning.Config] = []

    def judge(
        key: tuning.Key, config: tuning.Config, work: tune.Work, repeats: int
    ) -> tuple[float, str]:
        tried.append(config)
        return seconds(config), "" if math.isfinite(seconds(config)) else "wrong"

    monkeypatch.setattr(tune, "judge", judge)
    return tried


def test_every_row_is_searched() -> None:
    assert sorted(tune.ORDER) == sorted(tuning.ROWS)


@pytest.mark.parametrize("key", tune.ORDER, ids="/".join)
def test_every_candidate_may_stand_in_the_table(key: tuning.Key, tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    table = dict(tuning.read_table(tuning.TABLE))
    present = table[tuning.DEFAULT, key]
    for config in tune.candidates(key):
        row = (config, *present[-1:]) if isinstance(present, tuple) else config
        tuning.write_table(path, table | {("sm_90", key): row})
        assert tuning.read_table(path)["sm_90", key] == row


def test_triton_dry_run_finds_candidates_right(own_table: Path, tmp_path: Path) -> None:
    rows = ("gram/16-bit/middle", "gram/16-bit/gated", "gram/split/scattered", "absorb/bf16/middle")
    path = tmp_path / "tuning.csv"
    named = [argument for row in rows for argument in ("--row", row)]
    arguments = ["--dry-run", "--table", str(own_table), "--output", str(path), *named]
    assert tune.main(arguments) == 0
    measured = list(csv.DictReader(path.open()))
    assert {row["row"] for row in measured} == set(rows)
    assert not [row["problem"] for row in measured if row["problem"]]
    written = {
        key for architecture, key in tuning.read_table(own_table) if architecture == "interpreter"
    }
    assert {"/".join(key) for key in written} == set(rows)


def test_the_fastest_is_written_and_launched_with(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = tune.candidates(WIDE)[0]
    judged(monkeypatch, lambda config: 1.0 if config == fastest else 2.0)
    tune.tune([WIDE], "cpu", dry=True, table=own_table)
    launched = tuning.gram_launches(torch.bfloat16, 4096, architecture="interpreter")
    assert launched == (fastest,)
    assert fastest not in default(WIDE)
    assert tuning.gram_launches(torch.bfloat16, 4096, architecture="sm_80") == default(WIDE)


@pytest.mark.parametrize("faster", ["tma", "pointers"])
def test_kernels_are_listed_in_the_order_of_their_times(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, lambda config: 1.0 if tune._kernel(config) == faster else 2.0)
    chosen, _ = tune.search(WIDE, default(WIDE), "cpu", True, math.inf)
    assert isinstance(chosen, tuple)
    expected = {"tma": ["tma", "pointers"], "pointers": ["pointers"]}[faster]
    assert [config.kernel for config in chosen] == expected


def test_a_dry_run_leaves_the_shipped_table_alone(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, lambda config: float(config.stages))
    before = own_table.read_bytes()
    assert tune.main(["--dry-run"]) == 0
    assert own_table.read_bytes() == before


def test_a_gain_within_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    present = default(WIDE)
    for gain, changes in ((0.01, False), (0.03, True)):
        judged(monkeypatch, lambda config, gain=gain: 1.0 if config in present else 1 - gain)
        chosen, _ = tune.search(WIDE, present, "cpu", True, math.inf)
        assert (chosen != present) == changes


def test_the_librarys_product_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("absorb", "bf16", "wide")
    present = default(key)
    assert isinstance(present, tuning.AbsorbConfig)
    best = tune.candidates(key)[0]
    times = {replace(present, method="gathered"): 1.0, best: 2.0}
    judged(monkeypatch, lambda config: times.get(config, 3.0))
    chosen, _ = tune.search(key, present, "cpu", True, math.inf)
    # An explicit backend="triton" still gets the kernel's best launch.
    assert chosen == replace(best, method="gathered")


def _changed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, tuning.GramConfig], object]
) -> None:
    right = gk.gram_batched_

    def changed(out: Tensor, x: Tensor, backend: str) -> Tensor:
        right(out, x, backend=backend)
        change(out, tuning.gram_launches(x.dtype, x.shape[-1])[0])
        return out

    monkeypatch.setattr(gk, "gram_batched_", changed)


def test_a_wrong_candidate_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tune.candidates(WIDE)[0]
    _changed(monkeypatch, lambda out, config: out.mul_(1.001 if config == wrong else 1))
    chosen, rows = tune.search(WIDE, default(WIDE), "cpu", True, math.inf)
    assert wrong not in chosen
    of_wrong = [row for row in rows if row["config"] == str(wrong)]
    assert of_wrong
    assert all("off by" in row["problem"] and not row["p50"] for row in of_wrong)
    assert all(not row["problem"] for row in rows if row not in of_wrong)


def test_a_candidate_that_does_not_repeat_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = tune.candidates(WIDE)[0]
    calls: list[None] = []

    def change(out: Tensor, config: tuning.GramConfig) -> None:
        calls.append(None)
        if config == unsteady:
            out[0, 0] *= 1 + 2.0**-22 * (len(calls) % 2)  # far below what counts as an error

    _changed(monkeypatch, change)
    _, rows = tune.search(WIDE, default(WIDE), "cpu", True, math.inf)
    problems = {row["problem"] for row in rows if row["config"] == str(unsteady)}
    assert problems == {"not the same bits again"}


def test_a_candidate_that_does_not_fit_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    too_large = tune.candidates(WIDE)[0]

    def change(out: Tensor, config: tuning.GramConfig) -> None:
        if config == too_large:
            raise RuntimeError("out of resource: shared memory")

    _changed(monkeypatch, change)
    chosen, rows = tune.search(WIDE, default(WIDE), "cpu", True, math.inf)
    assert too_large not in chosen
    assert "out of resource" in " ".join(row["problem"] for row in rows)


def test_no_call_is_served_by_a_candidate_that_raised() -> None:
    with suppress(RuntimeError), tune.launched_with(WIDE, tune.candidates(WIDE)[0]):
        gk.gram_(torch.zeros(gk.packed_numel(67)), torch.ones(5, 67))
        raise RuntimeError
    assert not gram_serve._FORMS


def test_nothing_is_written_where_nothing_is_right(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = own_table.read_bytes()
    judged(monkeypatch, lambda config: math.inf)
    assert tune.tune([WIDE], "cpu", dry=True, table=own_table)
    assert own_table.read_bytes() == before


def test_no_candidate_starts_when_the_seconds_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = judged(monkeypatch, lambda config: 1.0)
    assert tune.tune(list(tune.ORDER), "cpu", dry=True, table=None, seconds=-1.0) == []
    assert not tried


def test_what_a_gpu_has_no_engine_for_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = judged(monkeypatch, lambda config: 1.0)
    monkeypatch.setattr(tune, "runs_here", lambda config, _: tune._kernel(config) != "tma")
    chosen, _ = tune.search(WIDE, default(WIDE), "cpu", False, math.inf)
    assert tried
    assert all(tune._kernel(config) == "pointers" for config in tried)
    assert [config.kernel for config in chosen] == ["pointers"]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--row", "gram/8-bit/wide"])
    assert "gram/16-bit/wide" in capsys.readouterr().err


@pytest.mark.skipif(not interpreting(), reason="compares what Triton launched")
def test_triton_is_launched_with_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from grail_kernels.gram_blocks import Launch

    add, launched = Launch.add, []

    def spy(launch: Launch, *arguments: int, **read: object) -> None:
        launched.append(launch.config)
        add(launch, *arguments, **read)

    monkeypatch.setattr(Launch, "add", spy)
    key = ("gram", "16-bit", "scattered")
    tune.search(key, default(key), "cpu", True, math.inf)
    assert set(launched) == {*default(key), *tune.candidates(key)[:2]}
