"""The trials of wide Gram kernels: their harness on a CPU, and the one-chain kernel by the mock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grail_kernels as gk
from bench.kernels import trials
from bench.tools import measuring, model
from bench.tools.measuring import read_rows
from grail_kernels import reference, tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_call import GramCall
from tests.kernels import gluon_mock
from tests.kernels.test_gram_wide import Launches, lower, planned, whole_numbers

one_chain = pytest.importorskip("bench.kernels.one_chain")
gram_wide = pytest.importorskip("grail_kernels.gram_wide")


ONE_CHAIN = tuning.GramConfig("one chain", 64, 256, group=4, warps=4, stages=4)
COPIES_ONLY = tuning.GramConfig("one chain", 64, 256, group=4, warps=4, stages=0)


@pytest.fixture(autouse=True)
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "measure_roof", lambda dtype, device: trials.Roof(1e11, 1e10))


def test_candidates_are_checked_apart_and_timed_beside_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trials.csv"
    assert trials.main(["--device", "cpu", "--output", str(path)]) == 0
    assert "shipped: right" in capsys.readouterr().out
    rows = {row["provider"]: row for row in read_rows(path)}
    assert rows.keys() == {"torch", "addmm", "shipped", "model of wide"}
    assert float(rows["shipped"]["error"]) < reference.ERROR_LIMIT
    ratio = float(rows["addmm"]["p50"]) / float(rows["shipped"]["p50"])
    assert float(rows["shipped"]["x addmm"]) == pytest.approx(ratio, rel=1e-2)


def test_every_shape_is_written_before_the_next_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trials.csv"
    monkeypatch.setattr(trials, "TOYS", ((64, 8), (64, 16)))
    monkeypatch.setattr(trials, "passing", lambda names, device, deadline: names)
    timed = trials.timed

    def second_fails(good: Any, tokens: int, channels: int, device: str) -> Any:
        if channels == 16:
            assert {row["channels"] for row in read_rows(path)} == {"", "8"}
            raise KeyboardInterrupt
        return timed(good, tokens, channels, device)

    monkeypatch.setattr(trials, "timed", second_fails)
    with pytest.raises(KeyboardInterrupt):
        trials.main(["--device", "cpu", "--output", str(path)])
    assert read_rows(path)


def test_a_hang_and_a_wrong_result_cost_only_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "CHECK_SECONDS", 0.1)  # no Python starts that fast
    assert trials.passing(["shipped"], "cpu", deadline=float("inf")) == []
    assert "shipped: does not end" in capsys.readouterr().out
    monkeypatch.setattr(trials, "CHECK_SECONDS", 60.0)
    assert trials.passing(["nobody"], "cpu", deadline=float("inf")) == []
    assert "KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda out, x: gk.gram_(out, x).mul_(1.0001), "off by"),
        (lambda out, x: gk.gram_(out, x).mul_(1 + 1e-7 * torch.rand(())), "not the same bits"),
        (lambda out, x: gk.gram_(out, x)._base.zero_(), "outside"),
    ],
)
def test_a_wrong_candidate_fails_its_check(
    add: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"wrong": trials.Candidate(add)}
    monkeypatch.setattr(trials, "candidates", lambda device: wrong)
    with pytest.raises(ArithmeticError, match=message):
        trials.check("wrong", "cpu")


def test_short_calls_are_queued_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    called: list[str] = []

    def takes(name: str, seconds: float) -> Any:
        def call(x: object) -> None:
            called.append(name)
            now[0] += seconds

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    durations = {"short": 0.7e-3, "long": 0.1}
    calls = {name: takes(name, seconds) for name, seconds in durations.items()}
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    found = measuring.time_in_turns(calls, [on_gpu], repeats=3)
    for name, seconds in durations.items():
        assert found[name] == pytest.approx([seconds] * 3)
    # The first, one to count by, and three rounds of 4 ms or of one call.
    assert called.count("short") == 2 + 3 * 6
    assert called.count("long") == 2 + 3


def test_the_candidates_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert trials.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "shipped"
    assert {name.split()[0] for name in listed} == {"shipped", "wide", "one", "copies"}


@pytest.mark.skipif(interpreting(), reason="the mock runs without the interpreter")
@pytest.mark.parametrize("choice", [gluon_mock.first, gluon_mock.last, gluon_mock.at_random(0)])
@pytest.mark.parametrize("tokens", [60, 2600])
def test_one_chain_adds_every_element_once(
    tokens: int, choice: gluon_mock.Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 264
    monkeypatch.setattr(gram_wide, "processors_of", lambda device: 4)
    for module, name in ((one_chain, "_one_chain_kernel"), (gram_wide, "_add_shares_kernel")):
        machine = gluon_mock.Machine(module, model.walk, choice)
        monkeypatch.setattr(module, name, Launches(machine, module, name))
    x = whole_numbers(tokens, channels)
    out = torch.ones(gk.packed_numel(channels))
    call = GramCall(out, x, None, None, None, None)
    expected = gk.pack(x.float().T @ x.float())
    planned(one_chain.add, call, ONE_CHAIN)
    assert torch.equal(lower(out, channels), 1 + lower(expected, channels))
    planned(one_chain.add, call, COPIES_ONLY)
    assert torch.equal(lower(out, channels), 1 + lower(expected, channels))


@pytest.mark.skipif(interpreting(), reason="the mock runs without the interpreter")
@pytest.mark.parametrize("name", ["wide group=8 slots=8", "one chain group=8"])
def test_a_candidate_is_launched_as_a_listed_kernel_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 272
    monkeypatch.setattr(gram_wide, "processors_of", lambda device: 4)
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "LAUNCHED_TOKENS", 1500)
    for module, kernel in (
        (gram_wide, "_gram_wide_kernel"),
        (one_chain, "_one_chain_kernel"),
        (gram_wide, "_add_shares_kernel"),
    ):
        machine = gluon_mock.Machine(module, model.walk)
        monkeypatch.setattr(module, kernel, Launches(machine, module, kernel))
    add = trials.candidates("cuda")[name].add
    x = whole_numbers(2600, channels)
    for _ in range(2):  # planned, and planned before
        out = torch.ones(gk.packed_numel(channels))
        add(out, x)
        expected = gk.pack(x.float().T @ x.float())
        assert torch.equal(lower(out, channels), 1 + lower(expected, channels))


@pytest.mark.skipif(interpreting(), reason="interpreted kernels do not compile")
@pytest.mark.parametrize("copies_only", [False, True])
def test_one_chain_compiles_for_hopper(copies_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.tools import aot

    case = aot.WideCase("sm_90", torch.bfloat16)
    config = COPIES_ONLY if copies_only else ONE_CHAIN
    kernel, fixed = one_chain._one_chain_kernel, one_chain.constants(config)
    source = aot.wide_source(kernel, case.dtype, one_chain.COLUMN_BLOCK, fixed)
    monkeypatch.setattr(aot.WideCase, "source", lambda self: source)
    found = aot.compile_case(case)
    assert found["shared"] <= aot.SHARED_LIMITS["sm_90"]
    assert bool(found["tensor_core"]) == (not copies_only)
    assert found["full_waits"] == (0 if copies_only else 2)
