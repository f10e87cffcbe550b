"""README.md and docs/: numbers are those of the committed results, and what is named exists.

`tests/test_blocks.py` runs their blocks and commands.
"""

import csv
import re
from pathlib import Path

import pytest

import grail
from bench.report import comparison, networks
from tests import counting

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


KERNELS_PAGE = " ".join((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split())


def times_of(name: str, metric: str = "time") -> dict[tuple[str, ...], float]:
    """Returns the medians of a CSV of Grams by kernel, dtype, tokens, call, channels, provider."""
    key = ("kernel", "dtype", "tokens", "call", "channels", "provider")
    return {
        tuple(row.get(column, "") for column in key): float(row["p50"])
        for row in rows_of(name)
        if row["metric"] == metric
    }


def test_the_kernels_page_quotes_the_committed_csv():
    times = times_of("gram_cpu.csv")
    quoted = re.findall(
        r"\| (\d+) \| (\d+) \| ([\d.]+)× \| ([\d.]+)× \| ([\d.]+)× \|", KERNELS_PAGE
    )
    assert len(quoted) >= 5
    for channels, tokens, *ratios in quoted:
        for provider, ratio in zip(("grail", "numpy syrk", "scipy ssyrk"), ratios, strict=True):
            library, ours = (
                times["gram", "fp32", tokens, "", channels, name] for name in ("addmm", provider)
            )
            assert float(ratio) == pytest.approx(library / ours, abs=0.006)


def test_the_kernels_page_quotes_the_committed_read_outs():
    times = times_of("gram_cpu.csv")
    quoted = re.findall(
        r"\| (\d+) (fp32|bf16) \| ([\d.]+)× \| ([\d.]+)× \| ([\d.]+)× \|", KERNELS_PAGE
    )
    assert len(quoted) == 6
    for channels, dtype, *ratios in quoted:
        for call, ratio in zip(("256", "1024", "2048"), ratios, strict=True):
            ((library, ours),) = (
                (time, times[(*key[:5], "grail")])
                for key, time in times.items()
                if key[:2] == ("gram_readout", dtype) and key[3:] == (call, channels, "addmm")
            )
            assert float(ratio) == pytest.approx(library / ours, abs=0.006)


def test_the_kernels_page_quotes_the_committed_predictions():
    found = {
        row["metric"]: float(row["p50"])
        for row in rows_of("gram_predicted.csv")
        if (row["device"], row["dtype"], row["channels"], row["tokens"], row["matrices"])
        == ("H100 (predicted)", "bf16", "4096", "65536", "1")
    }
    quoted = f"{found['speed']:.2f}× `addmm` and {found['TF-eq']:.0f} TF-eq for 65,536 tokens"
    assert quoted in KERNELS_PAGE


def test_the_kernels_page_quotes_the_host_time_of_a_call():
    whole = [float(row["p50"]) for row in rows_of("launching.csv") if row["phase"] == "whole"]
    assert f"{min(whole):.0f} to {max(whole):.0f} µs" in KERNELS_PAGE


def test_the_kernels_page_quotes_the_committed_trials():
    times, errors = {}, {}
    for row in rows_of("gpu/trials.csv"):
        if row["dtype"] != "bfloat16":
            continue
        shipped = row["provider"] == "descriptors, chains in a flat loop" and row["chain"] == "256"
        if row["provider"] == "addmm" or (shipped and row["config"].startswith("128 tokens")):
            key = row["provider"] == "addmm", int(row["tokens"]), int(row["channels"])
            times[key], errors[key] = float(row["p50"]), row["error"]

    def speed(tokens, channels):
        return f"{times[True, tokens, channels] / times[False, tokens, channels]:.2f}×"

    def rate(tokens, channels):
        return f"{2 * tokens * channels**2 / times[False, tokens, channels] / 1e12:.0f}"

    assert (
        f"{speed(8192, 11008)} and {rate(8192, 11008)} TF-eq for 8192 tokens, "
        f"{speed(32_768, 11008)} and {rate(32_768, 11008)} for 32,768" in KERNELS_PAGE
    )
    assert (
        f"{speed(8192, 4096)} for 8192 tokens, {speed(65_536, 4096)} and "
        f"{rate(65_536, 4096)} TF-eq for 65,536" in KERNELS_PAGE
    )
    first, second = (float(errors[False, tokens, 11008]) for tokens in (8192, 32_768))
    assert f"at {first:.1f} and {second:.1f} eps" in KERNELS_PAGE


def test_the_pages_quote_what_a_gpu_measured():
    times = times_of("gpu/gram.csv")

    def speed(kernel, dtype, channels, rival):
        library, ours = (
            times[kernel, dtype, "65536", "", channels, name] for name in (rival, "grail")
        )
        return library / ours

    of_calibration = [
        1000 * times["gram", "bf16", "65536", "", "4096", name] for name in ("grail", "float addmm")
    ]
    assert "{:.1f} ms instead of {:.1f}".format(*of_calibration) in KERNELS_PAGE
    assert "{:.1f} ms instead of {:.0f}".format(*of_calibration) in " ".join(README.split())
    wide = [speed("gram", "fp32", str(h), "addmm") for h in (4096, 11008, 14336, 18944)]
    assert f"{min(wide):.1f} to {max(wide):.1f}× from H = 4096 on" in KERNELS_PAGE
    for channels in ("4096", "11008"):
        assert f" | {speed('gram', 'bf16', channels, 'addmm'):.2f}×; trials" in KERNELS_PAGE
    experts = [speed("gram_ragged", "bf16", "768", rival) for rival in ("loop", "bmm")]
    assert "loop, `bmm` | {:.1f}× and {:.1f}× |".format(*experts) in KERNELS_PAGE
    heads = [speed("gram_batched", "bf16", "128", rival) for rival in ("loop", "bmm")]
    assert "loop, `bmm` | {:.1f}× and {:.2f}×, at".format(*heads) in KERNELS_PAGE
    solves = [float(row["p50"]) for row in rows_of("gpu/ridge.csv") if row["channels"] == "11008"]
    fit, solve, reference = solves
    assert (
        f"{reference / solve:.1f}×, a whole fit with both errors {reference / fit:.1f}×"
        in KERNELS_PAGE
    )


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


def test_the_promises_quote_the_counts_of_a_test_run():
    assert counting.sentence(counting.read(counting.COMMITTED)) in " ".join(PROMISES.split())


def test_every_promise_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", README + PROMISES)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
