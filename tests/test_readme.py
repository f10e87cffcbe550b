"""README.md and docs/: numbers are those of the committed results, and what is named exists.

`tests/test_blocks.py` runs their blocks and commands.
"""

import csv
import re
from pathlib import Path

import grail
from bench.report import comparison, networks
from bench.report.numbers.kernels import Kernels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("    grail ")
]


def test_the_page_of_selectors_names_every_one_and_its_source():
    page = (ROOT / "docs" / "reference" / "selectors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z0-9+-]+)`", page)) >= set(grail.select.names())
    modules = {grail.select.get(name).choose.__module__ for name in grail.select.names()}
    assert set(re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)) == modules


def test_the_pages_of_results_are_made_from_the_committed_csv():
    pages = comparison.pages()
    assert {path: path.read_text(encoding="utf-8") for path in pages} == pages
    assert {comparison.PAGE, *comparison.FOLDER.glob("*.md")} == pages.keys()


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_quotes_what_a_gpu_measured():
    gpu = Kernels().gpu
    quoted = f"{gpu.ms('grail'):.1f} ms instead of {gpu.ms('float addmm'):.0f}"
    assert quoted in " ".join(README.split())


def test_its_exports_are_commands_of_the_pages_of_serving_whose_tests_run_them():
    pages = (ROOT / "docs" / "serving").glob("*.md")
    lines = {
        line.strip() for page in pages for line in page.read_text(encoding="utf-8").split("\n")
    }
    exports = [command.split("#")[0].strip() for command in COMMANDS if " export " in command]
    assert len(exports) == 3
    assert set(exports) <= lines


def test_it_quotes_the_table_of_serving():
    rows = {(row["model"], row["format"]): row for row in rows_of("serving.csv")}
    own, stock = rows["uneven 0.5", "Q4_1 by grail"], rows["uneven 0.5", "Q4_1"]
    exact, dense = rows["uneven 0.5", "F32"], rows["dense", "Q4_1"]
    said = " ".join(README.split())
    perplexities = (f"{float(row['perplexity']):.1f}" for row in (own, exact, stock))
    assert (
        "has perplexity {} on Brown text (F32 {}, Q4_1 by `llama-quantize` {})".format(
            *perplexities
        )
        in said
    )
    small, large = (f"{int(row['bytes']) / 1e6:.1f}" for row in (own, dense))
    assert f"{small} MB instead of {large}, and decodes {float(own['decode_1_ratio']):.2f}×" in said


def test_it_quotes_the_time_of_a_calibration():
    seconds = {
        row["design"]: float(row["p50"])
        for row in rows_of("calibrate_cpu.csv")
        if row["metric"] in ("bare forward", "total")
    }
    shares = [f"{seconds[name] / seconds['']:.2f}" for name in ("default", "paper")]
    quoted = "Time over one forward pass: defaults {}, the paper's recipe {} (".format(*shares)
    assert quoted in " ".join(README.split())


def test_its_table_is_the_committed_csv():
    assert comparison.quality_table(rows_of("levers.csv")) in README


def test_it_counts_the_families():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    narrowed = re.findall("^\\| `", page.split("| model type | reason")[0], flags=re.MULTILINE)
    assert f"{len(narrowed)} model types of transformers" in README


def test_its_files_exist_and_it_stays_short():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 110


def test_the_resnets_numbers_are_those_of_the_csv():
    values = networks.found(rows_of("selectors_resnet18.csv"), "accuracy")
    cells = [("", 1.0, "dense"), ("magnitude", 0.5, "own"), ("magnitude", 0.5, "ours")]
    dense, pruned, ours = (f"{100 * values[cell]:.1f}" for cell in cells)
    said = " ".join(README.split())
    assert f"has {pruned}% accuracy (dense {dense}%), compensated {ours}%" in said


def test_every_promise_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README + PROMISES)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
