import pytest
import torch

from bench.reliability import failsafe
from bench.reliability.failsafe import (
    CASES,
    METHODS,
    RESULTS,
    Answer,
    measure,
    outcome,
    problem,
    table,
    trials,
)
from bench.tools.measuring import read_rows
from tests.counting import injected

NUMBER = 2  # problems of each case
TRIALS = [(f"{name} {i % NUMBER}", trial) for i, (name, trial) in enumerate(trials(NUMBER))]


@pytest.mark.parametrize("trial", [trial for _, trial in TRIALS], ids=[name for name, _ in TRIALS])
def test_a_corrupted_problem_is_refused_flagged_or_solved(trial):
    injected("corrupted problems")
    found, ratio = outcome(failsafe.ours, trial)
    assert found != "silent", ratio
    assert trial.solvable or found == "refused"


@pytest.mark.parametrize(
    "name",
    ["nan in masked tokens", "dead channels", "energies 1e12 apart", "one token", "bf16 weight"],
)
def test_what_can_be_solved_is_not_refused(name):
    for number in range(3):
        assert outcome(failsafe.ours, problem(name, number))[0] == "solved"


def test_what_only_rounding_keeps_from_being_singular_is_flagged():
    # Without the least pivot of `grail.algebra.ridge.solve` the Cholesky succeeds, 1.4 bounds off.
    trial = problem("nearly singular undamped", 34)
    assert outcome(failsafe.ours, trial)[0] == "flagged"


def test_a_wrong_answer_counts_as_silent():
    # The judge itself: plain pruning, a NaN, and a right weight with a wrong reported error.
    trial = failsafe.healthy(torch.Generator().manual_seed(0))
    right = failsafe.ours(trial)
    plain = trial.weight[:, trial.kept]
    for wrong in (
        Answer(plain),
        Answer(torch.full_like(plain, float("nan")), flagged=True),
        Answer(right.weight, error=right.error + 0.01),
    ):
        assert outcome(lambda _, answer=wrong: answer, trial)[0] == "silent"
    assert outcome(lambda _: right, trial)[0] == "solved"


def test_the_usual_loop_solves_what_is_healthy():
    # Else the comparison would not be fair.
    assert outcome(failsafe.usual_loop, failsafe.healthy(torch.Generator().manual_seed(0)))[0] == (
        "solved"
    )


def test_the_committed_table_holds_a_thousand_problems_and_no_silent_one_of_ours():
    rows = read_rows(RESULTS)
    own = [row for row in rows if row["method"] == "grail"]
    assert {row["case"] for row in own} == set(CASES)
    assert sum(int(row["problems"]) for row in own) >= 1000
    assert all(row["silent"] == "0" for row in own)


def test_every_problem_has_one_outcome_and_the_table_one_row_for_a_case(monkeypatch):
    monkeypatch.setattr(
        failsafe, "CASES", {name: CASES[name] for name in ("no token", "one token")}
    )
    rows = measure(2)
    assert len(rows) == 2 * len(METHODS)
    for row in rows:
        assert sum(int(row[kind]) for kind in failsafe.OUTCOMES) == int(row["problems"]) == 2
    lines = table(rows).splitlines()
    assert lines[2] == "| no token | 2 | 100% refused | 100% refused |"
    assert lines[-1].startswith("| all | 4 | 50% refused, 50% solved |")
