"""docs/paper.md: every number is of a CSV or the paper's, and what is missing is said."""

import csv
import re
import shutil

import pytest

from bench.quality import paper as bench
from bench.report import paper
from bench.tools.measuring import RESULTS


def write(folder, name, *rows):
    """A CSV of `rows`, mappings of columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def page(folder):
    return paper.Page(paper.Results(folder))


@pytest.fixture
def language(tmp_path):
    """Wanda at 0.5 and 0.6 with all three variants, of which the last is missing at 0.6."""
    of = {"selector": "wanda", "samples": bench.SEQUENCES}
    values = {
        ("", 1.0, "dense"): (10, 30),
        ("wanda", 0.5, "own"): (40, 120),
        ("wanda", 0.5, "grail"): (20, 150),
        ("wanda", 0.5, "ours"): (12.5, 90),
        ("wanda", 0.6, "own"): (20, 60),
        ("wanda", 0.6, "alpha=0.001"): (12.5, 50),
    }
    rows = [
        {
            **of,
            "selector": selector,
            "keep": keep,
            "variant": variant,
            "perplexity_technical": same,
            "perplexity_brown": other,
        }
        for (selector, keep, variant), (same, other) in values.items()
    ]
    write(tmp_path, "paper_smollm2", *rows)
    return tmp_path


def test_the_committed_page_is_the_generated_one():
    assert paper.PAGE.read_text(encoding="utf-8") == paper.Page().text()


def test_without_any_csv_the_page_says_so_and_keeps_the_papers_figures(tmp_path):
    text = page(tmp_path).text()
    rows = re.findall(r"\| (\d+) of (\d+) \|", text)
    assert len(rows) == 9
    assert all(there == "0" and int(wanted) > 0 for there, wanted in rows)
    assert "| wanda | 50% | 171.29 → 18.85 (64%) | not measured | not measured |" in text
    assert "| slimgpt | 30% | – → 7.34 | not measured | not measured |" in text
    assert "CLIP, dense not measured" in text
    assert "None" not in text
    # A table of which nothing is measured is a sentence.
    missing = "Not measured: magnitude, wanda, folding-kmeans, greedy."
    assert text.count(missing) == 2


def test_every_figure_of_the_paper_is_on_the_page():
    text = paper.Page().text()
    with paper.REPORTED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 50
    for row in rows:
        value = float(row["value"])
        shown = {
            "perplexity": f"{value:.2f}",
            "accuracy": f"{100 * value:.1f}",
            "s": f"{value:.2f} s",
            "MB": f"{value:,.0f} MB",
            "losses": f"{row['selector']} {row['setting']} at ",
        }[row["metric"]]
        assert shown in text, row


def test_the_template_states_settings_and_no_results():
    text = re.sub(r"{{.*?}}|`.*?`", "", paper.TEMPLATE.read_text(encoding="utf-8"))
    assert re.findall(r"\d+\.\d+%?", text) == ["2602.23795", "1.1"]  # arXiv, a standard error


def test_a_changed_csv_changes_the_page(tmp_path):
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, tmp_path)
    shutil.copytree(RESULTS / "gpu", tmp_path / "gpu")
    assert page(tmp_path).text() == paper.Page().text()
    file = tmp_path / "selectors_smollm2.csv"
    before = "wanda,0.5,grail,16,21.87072"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, "wanda,0.5,grail,16,29.87072"))
    changed = page(tmp_path).llama()
    assert "38.6 → 29.9 (24%) → 19.8" in changed


def test_a_cell_shows_shares_and_what_is_missing(language):
    of = page(language)
    cell = of.cell("paper_smollm2", "perplexity_technical", "wanda", 0.5, bench.SEQUENCES)
    assert cell == "40.0 → 20.0 (50%) → 12.5 (84%)"
    cell = of.cell("paper_smollm2", "perplexity_technical", "wanda", 0.6, bench.SEQUENCES)
    assert cell == "20.0 → not measured → not measured"
    cell = of.cell("paper_smollm2", "perplexity_technical", "flap", 0.5, bench.SEQUENCES)
    assert cell == paper.MISSING


def test_text_of_another_kind_shows_where_compensation_is_worse(language):
    lines = page(language).domains().splitlines()
    worse = "| wanda | 50% | 40.0 → 20.0 (50%) → 12.5 (84%) | 120.0 → 150.0 (-16%) → 90.0 (21%) |"
    assert worse in lines
    (missing,) = (line for line in lines if line.startswith("Not measured: "))
    assert "flap 50%" in missing
    assert "wanda 50%" not in missing


def test_the_cost_of_the_papers_alpha_needs_every_strength(language):
    assert page(language).price().endswith("MLP and heads at 40% not measured")
    assert page(language).price().startswith("the paper 8.5%;")


def test_a_part_counts_its_rows_once_each(language):
    assert "| `paper cells` | 4 of 72 |" in page(language).inventory()
    for rows in (*bench.PARTS.values(), bench.resnet_rows, bench.clip_rows):
        keys = [(s, keep, variant, n) for s, keep, variant, _, n in rows()]
        assert len(set(keys)) == len(keys)


def test_two_values_of_one_cell_are_refused(tmp_path):
    of = {"selector": "wanda", "keep": "0.5", "variant": "grail", "samples": "16"}
    write(tmp_path, "some", {**of, "perplexity": "2"}, {**of, "perplexity": "3"})
    with pytest.raises(ValueError, match=r"some\.csv has 2 values of perplexity"):
        paper.Results(tmp_path).value("some", "perplexity", selector="wanda", keep=0.5)


def test_blocks_of_the_large_shape_are_scaled_to_all_and_say_so(tmp_path):
    (tmp_path / "gpu").mkdir()
    seconds = {"forward": 3, "gram": 1, "other": 0, "select": 2, "solve": 0.5, "absorb": 0}
    of = {"model": paper.LLAMA, "blocks": "4", "design": "paper"}
    rows = [{**of, "metric": k, "p50": str(v)} for k, v in {**seconds, "total": 6.5}.items()]
    write(tmp_path / "gpu", "calibrate", *rows, {**of, "metric": "measured_peak", "p50": "2e9"})
    text = page(tmp_path).costs()
    scaled = "| 32.0 s, 4 of 32 blocks × 8 | 20.0 s, 4 of 32 blocks × 8 | 2,000 MB (4 blocks) |"
    assert f"| {paper.LLAMA} by shape here: paper recipe {scaled}" in text
    assert f"{paper.LLAMA} by shape here: default recipe" in text.splitlines()[-1]
    of = {"model": paper.LLAMA, "simulated on": "assumed H100 rates", "tokens": "2048"}
    counted = {"forward_s": 3, "gram_s": 1.5, "select_s": 2, "solve_s": 0.25}
    write(tmp_path, "simulated", {**of, **counted, "device_peak_bytes": "3e9"})
    counted = "| 4.5 s, 2,048 tokens | 2.2 s, 2,048 tokens | 3,000 MB |"
    assert f"| {paper.LLAMA} by count here: default recipe {counted}" in page(tmp_path).costs()


def test_the_overhead_is_that_of_whole_runs_over_bare_passes(tmp_path):
    assert page(tmp_path).overhead() == "not measured and not measured"
    seconds = {("", "bare forward"): 4, ("paper", "total"): 6, ("default", "total"): 10}
    rows = [{"design": d, "metric": m, "p50": str(v)} for (d, m), v in seconds.items()]
    write(tmp_path, "calibrate_cpu", *rows)
    assert page(tmp_path).overhead() == "1.5× and 2.5×"


def test_the_worst_strength_is_the_largest_as_the_page_says():
    results = paper.Results()
    for name, samples in paper.STUDIED.items():
        score = paper.NETWORKS[name][1]
        key = {"selector": "wanda", "keep": 0.5, "samples": samples}
        values = [
            results.value(f"studies_{name}", score, variant=f"alpha={alpha:g}", **key)
            for alpha in bench.ALPHAS
        ]
        assert values[-1] == (max if score == "perplexity" else min)(values), name


def test_text_of_another_kind_needs_the_stronger_ridge_as_the_page_says():
    rows = [line.split(" | ") for line in paper.Page().off_domain().splitlines()[2:]]
    assert len(rows) == 3
    assert all(float(own.split()[0]) < float(other.split()[0]) for _, own, other in rows)


def test_brown_has_dashes_for_cells_that_no_bench_makes(tmp_path):
    of = {"text": "brown", "sites": "mlp,heads", "keep": "0.5"}
    dense = {"text": "brown", "model": "dense", "perplexity": "10"}
    rows = [{**of, "model": m, "perplexity": v} for m, v in (("pruned", 40), ("paper", 20))]
    write(tmp_path, "smollm2_table", dense, *rows)
    last = page(tmp_path).brown().splitlines()[-1]
    assert last == "| 50% | – | – | 40.0 → 20.0 (50%) → – |"
