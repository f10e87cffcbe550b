"""The numbers of docs/results.md and its pages, from rows that are known."""

import math

import pytest

pytest.importorskip("matplotlib")

from bench.reliability import soak
from bench.report import comparison, networks


def row(selector, keep, variant, value, score="accuracy"):
    return {
        "selector": selector,
        "keep": str(keep),
        "variant": variant,
        "samples": "8",
        score: str(value),
    }


ROWS = [
    row("", 1.0, "dense", 0.9),
    row("wanda", 0.5, "own", 0.5),
    row("wanda", 0.5, "grail", 0.7),
    row("wanda", 0.5, "ours", 0.8),
    row("slimgpt", 0.5, "own", 0.8),
    row("slimgpt", 0.5, "grail", 0.7),
]


def test_a_share_is_what_came_back_of_what_was_lost():
    assert networks.share("accuracy", 0.9, 0.5, 0.7) == pytest.approx(0.5)
    assert networks.share("accuracy", 0.9, 0.5, 0.4) == pytest.approx(-0.25)
    assert networks.share("accuracy", 0.9, 0.899, 0.9) is None
    halfway = math.sqrt(10 * 40)
    assert networks.share("perplexity", 10, 40, halfway) == pytest.approx(0.5)


def test_a_cell_shows_published_paper_and_defaults_with_their_shares():
    lines = comparison.table(ROWS, "accuracy", (0.5, 0.3)).splitlines()
    assert lines[2] == "| wanda | 50.0 → 70.0 (50%) → 80.0 (75%) | – |"
    assert lines[3] == "| slimgpt | 80.0 → 70.0 → – | – |"  # no share beside a ridge of its own


def test_cells_that_got_worse_are_counted_and_the_worst_is_named():
    worse = "GRAIL, the paper's way: no worse than alone in 1 of {}, at worst {} instead of {}."

    def said(rows, variant="grail"):
        return networks.helped(networks.found(rows, "accuracy"), "accuracy", variant)

    assert said(ROWS) == worse.format("2 cells", "70.0", "80.0")
    further = [row("flap", 0.5, "own", 0.85), row("flap", 0.5, "grail", 0.6)]
    assert said(ROWS + further) == worse.format("3 cells", "60.0", "85.0")
    defaults = "GRAIL, grail's defaults: no worse than alone in 1 of 1 cells."
    assert said(ROWS + further, "ours") == defaults


def test_less_perplexity_is_better():
    rows = [row(r["selector"], r["keep"], r["variant"], r["accuracy"], "perplexity") for r in ROWS]
    said = networks.helped(networks.found(rows, "perplexity"), "perplexity", "grail")
    assert "no worse than alone in 1 of 2 cells, at worst 0.7 instead of 0.5." in said


SELECTED = [
    row("", 1.0, "dense", 0.9),
    *(row(name, 0.5, "own", value) for name, value in (("a", 0.1), ("b", 0.5), ("c", 0.3))),
    *(row(name, 0.5, "ours", value) for name, value in (("a", 0.7), ("b", 0.8), ("c", 0.6))),
]


def test_the_range_over_selectors_is_a_sentence_and_a_table():
    values = networks.found(SELECTED, "accuracy")
    assert networks.spread_sentence(values, "accuracy", 0.5) == (
        "With half of the channels, 3 selectors have accuracy 60.0–80.0% by grail's defaults, "
        "10.0–50.0% alone"
    )
    assert comparison.spread_table(values, "accuracy").splitlines() == [
        "| keep | alone | GRAIL, grail's defaults |",
        "|---|---|---|",
        "| 0.5 | 10.0–50.0 | 60.0–80.0 |",
    ]
    assert networks.best(values, "accuracy", 0.5) == ("b", 0.8)
    values = networks.found([r | {"perplexity": r["accuracy"]} for r in SELECTED], "perplexity")
    assert networks.best(values, "perplexity", 0.5) == ("c", 0.6)


def test_the_summary_has_a_line_for_each_network():
    network = networks.Network("toy", "Toy, digits", "accuracy", (0.5,))
    vars(network)["values"] = networks.found(ROWS, "accuracy")
    lines = comparison.summary_table([network]).splitlines()
    assert lines[0] == "| network | score | dense | keep | Wanda | best | no worse than alone |"
    assert lines[2:] == [
        "| [Toy](results/toy.md) | accuracy, % | 90.0 | 0.5 | 50.0 → 70.0 → 80.0 | wanda 80.0 "
        "| 1 of 2 → 1 of 1 |"
    ]


def test_the_study_is_said_from_the_fewest_to_the_most_samples():
    rows = [
        {**row("wanda", 0.5, variant, value), "samples": str(samples)}
        for variant, of in (("ours", {4: 0.6, 64: 0.8, 16: 0.7}), ("grail", {4: 0.5, 64: 0.4}))
        for samples, value in of.items()
    ]
    assert networks.study_sentence(rows, "accuracy") == (
        "With 4 → 64 calibration samples, Wanda at half has accuracy 60.0 → 80.0% by grail's "
        "defaults, 50.0 → 40.0% in the paper's way"
    )


def test_growth_is_that_of_the_last_third_over_the_first_after_the_warm_up():
    assert soak.growth([9, 9, 9, 1, 1, 1, 5, 5, 5, 2, 2, 2]) == 2
    assert soak.growth([1, 2, 3, 4, 5]) is None


def test_a_study_shows_rows_of_one_size_and_what_is_not_measured():
    studied = [
        row("", 1.0, "dense", 0.9),
        {**row("wanda", 0.5, "grail", 0.6), "samples": "2"},
        row("wanda", 0.5, "grail", 0.7),
        row("wanda", 0.5, "alpha=0.1", 0.8),
        row("folding", 0.3, "exact", 0.4),
    ]
    assert comparison.study_table(studied, "accuracy", "8").splitlines() == [
        "Dense: 90.0. Calibration samples: 8.",
        "",
        "| selector | variant | keep 0.5 | keep 0.3 |",
        "|---|---|---|---|",
        "| wanda | grail | 70.0 | – |",
        "| folding | exact | – | 40.0 |",
    ]
    assert networks.has_axes(studied)
    assert not networks.has_axes(studied[:3])


def test_refitted_producers_stand_beside_the_defaults():
    def gained(network, steps, measure, value, gain, seconds):
        names = ("network", "keep", "steps", "measure", "value", "gain", "gain_error")
        values = (network, "0.3", str(steps), measure, str(value), str(gain), "0.01")
        return dict(zip(names, values, strict=True)) | {"cpu_seconds": str(seconds)}

    rows = [
        gained("vit", 0, "kl", 0.5, 0, 4.2),
        gained("minilm", 0, "cosine", 0.9, 0, 10),
        gained("vit", 3, "kl", 0.4, -0.1, 9.6),
        gained("minilm", 3, "cosine", 0.95, 0.05, 20),
    ]
    lines = comparison.producer_table(rows).splitlines()
    assert lines[0] == "| network | keep | steps | kl | cosine | CPU seconds |"
    assert lines[2] == "| vit | 0.3 | 3 | 0.5000 → 0.4000 (-0.1000 ± 0.0100) | – | 4 → 10 |"
    assert lines[3] == "| minilm | 0.3 | 3 | – | 0.9000 → 0.9500 (+0.0500 ± 0.0100) | 10 → 20 |"
