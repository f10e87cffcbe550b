"""The simulation of large models: FLOPs are counted, scaling holds, rows say what they are."""

import dataclasses

import pytest

pytest.importorskip("transformers")

from bench.quality import simulate
from bench.tools.measuring import read_rows

SMALL = simulate.Shape(
    "llama",
    {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    ("mlp",),
    2,
)


def test_flops_of_a_block_scale_to_those_of_a_block_twice_as_wide(monkeypatch):
    # Products among the candidates do not grow by the cube, and at these widths would be the most.
    monkeypatch.setattr("grail.select.pivots.POOL", 16)
    monkeypatch.setattr("grail.algebra.heldout.SKETCH", 64)  # nor does the choice by a sketch
    small, large = simulate.trial(SMALL, 2), simulate.trial(SMALL, 1)
    for phase, power in simulate.POWERS.items():
        assert small.flops[phase] * 2**power == pytest.approx(large.flops[phase], rel=0.25), phase
    assert small.moves == large.moves


def test_forward_and_gram_flops_are_those_of_the_shapes():
    found = simulate.trial(SMALL, 1)
    tokens, hidden, inner = 2 * simulate.TRIAL, 128, 384
    projections = hidden * (128 + 64 + 64 + 128)
    dense = 2 * tokens * (projections + 3 * hidden * inner)
    # The dense stream; the compressed one up to where the MLP lands.
    assert 2 * dense <= found.flops["forward"] <= 2.6 * dense
    triangle = tokens * inner**2
    cross = 2 * tokens * hidden * inner  # of the drift
    assert found.flops["gram"] == pytest.approx(triangle + cross, rel=0.3)


def test_rows_add_up_and_say_what_they_are(monkeypatch):
    monkeypatch.setitem(simulate.SHAPES, "small", SMALL)
    measured, assumed = simulate.rows("small", tokens=4096)
    assert measured["simulated on"] == "measured rates"
    assert assumed["simulated on"] == "assumed H100 rates"
    for row, phases in ((measured, simulate.POWERS), (assumed, (*simulate.POWERS, "link"))):
        total = sum(float(row[f"{phase}_s"]) for phase in phases)
        assert float(row["total_s"]) == pytest.approx(total, rel=1e-2)
        for phase in simulate.POWERS:
            seconds = float(row[f"{phase}_flops"]) / float(row[f"{phase}_rate"])
            assert float(row[f"{phase}_s"]) == pytest.approx(seconds, rel=1e-2)
    twice = dataclasses.replace(SMALL, config={**SMALL.config, "num_hidden_layers": 8})
    monkeypatch.setitem(simulate.SHAPES, "twice", twice)
    deeper, _ = simulate.rows("twice", tokens=4096)
    assert deeper["device_peak_bytes"] == measured["device_peak_bytes"]
    assert float(deeper["forward_flops"]) == pytest.approx(
        2 * float(measured["forward_flops"]), rel=1e-3
    )


def test_the_committed_simulation_covers_all_shapes_and_fits_one_card():
    rows = read_rows(simulate.RESULTS)
    assert {row["model"] for row in rows} == set(simulate.SHAPES)
    for row in rows:
        assert row["simulated on"] in ("measured rates", "assumed H100 rates")
        assert int(row["device_peak_bytes"]) < 80e9
