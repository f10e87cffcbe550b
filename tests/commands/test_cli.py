"""The command line: what it writes, what it prints, and how it refuses."""

import hashlib
import html
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial

import pytest
import torch

from grail.report.formatting import format_bytes, format_seconds
from grail.report.report import Report
from grail.report.summary import headline
from grail.report.texts import distance_cells, recovered_cell, worse_sentence

pytest.importorskip("typer")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

import grail as grail_library  # noqa: E402
from grail import commands  # noqa: E402
from grail.commands import bench, compress, evaluate, export, generate, inspect, stats  # noqa: E402
from grail.files import pretrained  # noqa: E402
from grail.files import text as texts  # noqa: E402
from grail.files.load import load_model  # noqa: E402
from grail.run import study, workflow  # noqa: E402
from tests.counting import refused  # noqa: E402

SHORT = ["--sequence-length", "32", "--tokens", "512"]
GRAIL = [sys.executable, "-m", "grail"]


def words(count, seed):
    """Text of `count` words that the tiny tokenizer knows, one token each."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, 97)}" for _ in range(count))


def grail(*arguments):
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


def refusal(result):
    """The one sentence that a refused command says; fails if it says more or was not refused."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    refused("refused command")
    *_, last = result.stderr.splitlines()
    return last


def everything_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A model with texts beside it; tests only read it."""
    root = tmp_path_factory.mktemp("command-line")
    tiny_llama().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "calibration.txt").write_text(words(2000, seed=1))
    (root / "heldout.txt").write_text(words(1000, seed=2))
    return root


@pytest.fixture
def arguments(folder, tmp_path):
    """A small `grail compress`; what is given after it wins, but texts add up."""
    return [
        *("compress", folder / "model", "--calibration", folder / "calibration.txt"),
        *("--output", tmp_path / "out", *SHORT),
    ]


@pytest.fixture
def without_text(folder, tmp_path):
    """`arguments` without a calibration."""
    return ["compress", folder / "model", "--output", tmp_path / "out", *SHORT]


@pytest.fixture(scope="session")
def finished(folder):
    """One complete run in a process of its own: (what it printed, its output folder)."""
    output = folder / "finished"
    command = [*GRAIL, "compress", folder / "model", "--calibration", folder / "calibration.txt"]
    command += ["--evaluate", folder / "heldout.txt", "--evaluate-tokens", "512", *SHORT]
    command += ["--keep", "0.5", "--sites", "mlp,heads", "--output", output]
    return subprocess.run(command, capture_output=True, text=True, check=True), output


def test_compress_writes_a_narrower_model_that_transformers_loads(finished):
    _, output = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 40  # half of 80
    assert model.config.num_attention_heads == 3  # half of 6
    assert model.model.layers[1].mlp.down_proj.weight.shape == (48, 40)
    assert transformers.AutoTokenizer.from_pretrained(output)("w5").input_ids == [5]


def test_compress_writes_the_report_beside_the_model(finished):
    _, output = finished
    report = Report.from_json((output / "report.json").read_text())
    assert list(report.evaluation) == ["dense", "pruned", "compensated", "restored"]
    assert report.evaluation["dense"].parameters > report.evaluation["pruned"].parameters
    assert report.model["name"] == "model"
    assert report.calibration["source"].endswith("calibration.txt")
    assert len(report.sites) == 4
    page = (output / "report.html").read_text()
    assert html.escape(headline(report)[1]) in page
    assert html.escape(report.samples[0]["restored"]) in page


def test_compress_prints_table_time_memory_and_where_things_are(finished):
    done, output = finished
    for word in ("dense", "perplexity", "forward", "predicted", "measured", "source", "output"):
        assert word in done.stdout
    for row in ("pruned (wanda)", "compensated (wanda)", "compensated (greedy)"):
        assert row in done.stdout
    assert str(output) in done.stdout
    assert "Predicted for keep=0.5, 512 tokens: peak memory" in done.stderr
    assert "Warning" not in done.stderr


def test_evaluate_finds_the_perplexity_that_compress_reported(finished, folder):
    _, output = finished
    result = grail(
        *("evaluate", output, "--text", folder / "heldout.txt", "--json"),
        *("--sequence-length", 32, "--tokens", 512),
    )
    report = Report.from_json((output / "report.json").read_text())
    row = json.loads(result.stdout)
    # The folder reloads to the same bits and sees the same batches.
    assert row["perplexity"] == report.evaluation["restored"].perplexity
    assert row["tokens"] == 512 // 32 * 31


def test_compress_and_evaluate_agree_on_several_texts_and_on_the_distance(
    arguments, folder, tmp_path
):
    (tmp_path / "other.txt").write_text(words(1000, seed=3))
    texts = [folder / "heldout.txt", tmp_path / "other.txt"]
    given = ["--evaluate", texts[0], "--evaluate", texts[1], "--evaluate-tokens", 256]
    result = grail(*arguments, *given, "--selector", "wanda", "--keep", 0.5)
    assert result.exit_code == 0, result.stderr
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    row = report.evaluation["restored"]
    assert [score.text for score in row.scores] == ["heldout.txt", "other.txt"]
    origins = [report.provenance["evaluation"], *report.provenance["further_evaluations"]]
    assert [origin["source"] for origin in origins] == list(map(str, texts))
    command = ["evaluate", tmp_path / "out", "--text", texts[0], "--text", texts[1]]
    command += ["--tokens", 256, "--sequence-length", 32, "--against", folder / "model"]
    alone = json.loads(grail(*command, "--json").stdout)
    for score, found in zip(row.scores, [alone, *alone["others"]], strict=True):
        # The folder reloads to the same bits, and the reference is of the same dense model.
        measured = ("text", "perplexity", "tokens", "kl", "kl_error", "top1", "top1_error")
        for name in (*measured, "losses", "divergences", "agreements", "predicted"):
            assert getattr(score, name) == found[name]
        assert min(score.kl, score.kl_error, score.top1_error) > 0
        assert recovered_cell(score) in result.stdout
    table = grail(*command).stdout
    for cell in ("heldout.txt", "other.txt", "top-1", *distance_cells(row)):
        assert cell in table
        assert cell in result.stdout
    assert "KL and top-1 against model" in table


def test_a_text_on_which_the_model_is_worse_than_pruned_is_named_everywhere(
    arguments, folder, tmp_path
):
    given = ["--keep", 0.5, "--selector", "wanda"]
    for name, more in (("plain", ["--no-compensate"]), ("fitted", [])):
        result = grail(*arguments, *given, *more, "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    plain, fitted = (load_model(tmp_path / name)[0] for name in ("plain", "fitted"))
    # A text of the sequences on which compensation harms, and one of those on which it helps.
    drawn = torch.randint(3, 97, (200, 32), generator=torch.Generator().manual_seed(0))
    losses = [evaluate.evaluate_model(model, [drawn]).losses for model in (fitted, plain)]
    order = torch.tensor(losses[0]).sub(torch.tensor(losses[1])).argsort().tolist()
    for name, rows in (("helped.txt", order[:16]), ("harmed.txt", order[-16:])):
        chosen = drawn[rows].flatten().tolist()
        (tmp_path / name).write_text(" ".join(f"w{token}" for token in chosen))
    texts = [
        word for name in ("helped", "harmed") for word in ("--evaluate", tmp_path / f"{name}.txt")
    ]
    result = grail(*arguments, *given, *texts, "--evaluate-tokens", 512)
    assert result.exit_code == 0, result.stderr
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    helped, harmed = report.evaluation["restored"].scores
    assert helped.over_pruned < -2 * helped.over_pruned_error < 0
    assert harmed.over_pruned > 2 * harmed.over_pruned_error > 0
    line = worse_sentence(report)
    assert line.startswith("The model is worse than plain pruning on harmed.txt by ")
    assert "helped.txt" not in line
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert line in result.stdout
    assert html.escape(line) in page
    assert line in card.replace("\\", "")


def test_a_dense_model_that_reads_other_tokens_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "dense")
    tokenizer = tmp_path / "dense" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w7"', '"w70000"'))
    text = folder / "heldout.txt"
    result = grail(
        *("evaluate", folder / "model", "--text", text, "--tokens", 256),
        *("--sequence-length", 32, "--against", tmp_path / "dense"),
    )
    assert "is not the one of the dense reference" in refusal(result)


def test_pruned_row_is_the_model_that_plain_pruning_writes(finished, arguments, folder):
    _, output = finished
    result = grail(
        *arguments, "--no-compensate", "--keep", 0.5, "--sites", "mlp,heads", "--json",
        *("--selector", "wanda"),  # greedy's choice would be for a compensated model
        *("--evaluate", folder / "heldout.txt", "--evaluate-tokens", 512),
    )  # fmt: skip
    alone = Report.from_json(result.stdout)
    beside = Report.from_json((output / "report.json").read_text())
    assert list(alone.evaluation) == ["dense", "pruned"]
    assert alone.evaluation["pruned"].perplexity == beside.evaluation["pruned"].perplexity
    assert [row.selector for row in beside.evaluation.values()] == [
        *(None, "wanda", "wanda", "greedy")
    ]


def test_compensated_row_is_the_model_that_the_selector_of_the_pruned_one_gives(
    finished, arguments, folder
):
    _, output = finished
    result = grail(
        *arguments, "--keep", 0.5, "--sites", "mlp,heads", "--json", "--selector", "wanda",
        *("--evaluate", folder / "heldout.txt", "--evaluate-tokens", 512),
    )  # fmt: skip
    alone = Report.from_json(result.stdout)
    beside = Report.from_json((output / "report.json").read_text())
    assert list(alone.evaluation) == ["dense", "pruned", "restored"]
    assert alone.evaluation["restored"].perplexity == beside.evaluation["compensated"].perplexity
    assert alone.recovered == beside.recovered


def test_the_prediction_that_is_printed_is_the_one_in_the_report(finished):
    done, output = finished
    report = Report.from_json((output / "report.json").read_text())
    said = (
        f"peak memory {format_bytes(report.memory['predicted_peak'])}, "
        f"time {format_seconds(report.stages['total']['predicted'])}."
    )
    assert said in done.stderr
    for column in ("predicted", "measured"):
        stages = {name: row[column] for name, row in report.stages.items()}
        assert stages.pop("total") == pytest.approx(sum(stages.values()))
        assert stages.keys() == {
            *("importing", "loading", "predicting", "perplexity", "completions"),
            *("runs to compare with", "compressing", "writing"),
        }
    page = (output / "report.html").read_text()
    assert page.count(format_seconds(report.stages["total"]["predicted"])) >= 1


def test_statistics_are_said_to_be_what_a_run_is_predicted_for(folder, tmp_path):
    collect = ["stats", "collect", folder / "model", "--calibration", folder / "calibration.txt"]
    assert grail(*collect, "--output", tmp_path / "a", *SHORT).exit_code == 0
    command = ["compress", folder / "model", "--statistics", tmp_path / "a", "--open-loop"]
    result = grail(*command, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert "statistics of 512 tokens" in result.stderr
    assert " 0 tokens" not in result.stderr
    report = Report.from_json(result.stdout)
    assert report.provenance["calibration"]["source"] == str(tmp_path / "a")
    (collected,) = report.provenance["calibration"]["collected"]
    assert collected["tokens"] == report.calibration["tokens"] == 512


def test_the_origin_of_a_result_is_in_its_report_and_on_its_card(finished, folder):
    _, output = finished
    report = Report.from_json((output / "report.json").read_text())
    origin, card = report.provenance, (output / "README.md").read_text()
    assert shlex.split(origin["command"])[:3] == ["grail", "compress", str(folder / "model")]
    assert "--evaluate-tokens 512" in origin["command"]
    model, calibration, heldout = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model/model.safetensors", "calibration.txt", "heldout.txt")
    )
    assert origin["model"]["files"]["model.safetensors"]["sha256"] == model
    assert origin["calibration"]["sha256"] == calibration
    assert origin["evaluation"]["sha256"] == heldout
    for word in (origin["command"], model, origin["date"], "pruned (wanda)", "from_pretrained"):
        assert word in card


def test_the_command_of_a_report_runs_again_and_gives_the_same(arguments, folder, tmp_path):
    given = ["--no-compensate", "--seed", 3, "--keep", 0.6, "--json", "--no-baseline"]
    first = Report.from_json(grail(*arguments, *given).stdout)
    shutil.rmtree(tmp_path / "out")
    again = Report.from_json(grail(*shlex.split(first.provenance["command"])[1:]).stdout)
    assert again.settings == first.settings
    assert again.provenance["command"] == first.provenance["command"]
    assert again.provenance["calibration"] == first.provenance["calibration"]


def test_the_time_of_uneven_widths_is_predicted_too(arguments):
    result = grail(*arguments, "--uneven", "--keep", 0.5, "--multiple", 2, "--batch-size", 1)
    assert "loss by site" in result.stderr.split("Predicted")[1]
    assert result.exit_code == 0


def test_token_weights_leave_the_pruned_row_as_it_is(finished, arguments, folder):
    _, output = finished
    result = grail(
        *arguments, "--token-weights", "--keep", 0.5, "--sites", "mlp,heads", "--json",
        *("--evaluate", folder / "heldout.txt", "--evaluate-tokens", 512),
    )  # fmt: skip
    weighted = Report.from_json(result.stdout)
    alike = Report.from_json((output / "report.json").read_text())
    assert weighted.evaluation["pruned"].perplexity == alike.evaluation["pruned"].perplexity


def test_without_heldout_text_nothing_is_evaluated(arguments):
    report = Report.from_json(grail(*arguments, "--json").stdout)
    assert report.evaluation == {}


def test_no_baseline_leaves_the_pruned_row_out(arguments, folder):
    result = grail(*arguments, "--json", "--evaluate", folder / "heldout.txt", "--no-baseline")
    assert list(Report.from_json(result.stdout).evaluation) == ["dense", "restored"]


def test_options_reach_the_library(arguments):
    result = grail(
        *arguments, "--json", "--keep", 0.6, "--selector", "magnitude", "--alpha", 0.01,
        *("--toward", "zero", "--open-loop", "--multiple", 16, "--seed", 7, "--batch-size", 3),
    )  # fmt: skip
    report = Report.from_json(result.stdout)
    expected = {
        "keep": 0.6,
        "sites": None,
        "selector": "magnitude",
        "alpha": 0.01,
        "seed": 7,
        "toward": "zero",
        "closed_loop": False,
        "multiple": 16,
        "compensate": True,
        "fit_bias": False,
    }
    assert {name: report.settings[name] for name in expected} == expected
    assert (report.calibration["tokens"], report.calibration["sequence_length"]) == (512, 32)
    assert {site.kept for site in report.sites} == {48}  # 0.6 · 80 in multiples of 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_the_written_weights(arguments, dtype, tmp_path):
    assert grail(*arguments, "--dtype", dtype).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype


def test_inspect_predicts_the_parameters_of_the_real_run_and_changes_nothing(folder, finished):
    before = everything_under(folder)
    result = grail("inspect", folder / "model", "--keep", 0.5, "--tokens", 512, "--json")
    report = Report.from_json((finished[1] / "report.json").read_text())
    plan = json.loads(result.stdout)
    assert plan["savings"][0]["parameters"] == report.model["parameters"]["after"]
    assert plan["parameters"] == report.model["parameters"]["before"]
    assert everything_under(folder) == before


def test_inspect_prints_sites_savings_and_cost(folder):
    result = grail("inspect", folder / "model")
    assert result.exit_code == 0
    for text in ("80 channels", "heads", "0.9", "0.5", "peak memory", "time"):
        assert text in result.stdout


def wide(folder, tiny_llama, tiny_tokenizer):
    """Writes a model whose MLPs have 384 channels."""
    tiny_llama(intermediate_size=384).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_inspect_prints_what_widths_fit(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = [wide(tmp_path / "model", tiny_llama, tiny_tokenizer), "--sites", "mlp"]
    given += ["--tokens", 64, "--sequence-length", 32]
    shown = grail("inspect", *given, "--keep", "0.7,0.5,0.3").stdout
    rows = [line.split() for line in shown.splitlines() if " mlp " in line]
    assert rows[-3:] == [
        ["0.7", "mlp", "–", "–", "2,", "4,", "8", "–"],  # 272
        ["0.5", "mlp", "64", "32", "2,", "4,", "8", "–"],  # 192
        ["0.3", "mlp", "–", "–", "2,", "4,", "8", "–"],  # 112
    ]
    assert "note    mlp: 272 of 384 channels is a multiple of neither 128 nor 64" in shown
    shown = grail("inspect", *given, "--keep", 0.7, "--multiple", "gguf").stdout
    assert ["0.7", "mlp", "64,", "128", "32,", "256", "2,", "4,", "8", "2"] in [
        line.split() for line in shown.splitlines()
    ]
    assert "note" not in shown
    given += ["--keep", 0.7, "--multiple", "gguf", "--json"]
    fits = json.loads(grail("inspect", *given).stdout)["savings"][0]["fits"]["mlp"]
    assert (fits["groups: 128"], fits["TP, groups of 128: 4"]) == (2, 0)


@pytest.mark.parametrize("given", [[], ["--evaluate"], ["--uneven"], ["--no-progress"]])
def test_compress_says_once_before_the_run_which_widths_are_refused(
    given, arguments, folder, tiny_llama, tiny_tokenizer, tmp_path
):
    arguments[1] = wide(tmp_path / "model", tiny_llama, tiny_tokenizer)
    if given == ["--evaluate"]:
        given = [*given, folder / "heldout.txt", "--evaluate-tokens", 512]
    result = grail(*arguments, "--keep", 0.7, "--batch-size", 2, *given)
    assert result.exit_code == 0, result.stderr
    before, _, after = result.stderr.partition("Compressing …")
    assert before.count("Warning: mlp: ") == (given != ["--no-progress"])
    assert after.count("refuses other widths") == 0
    assert result.stdout.count("refuses other widths") == 1
    assert "choose multiple=128" in result.stdout
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert sum("refuses other widths" in note for note in report.notes) == 1


def test_a_target_is_a_multiple_by_name(arguments, tiny_llama, tiny_tokenizer, tmp_path):
    arguments[1] = wide(tmp_path / "model", tiny_llama, tiny_tokenizer)
    result = grail(*arguments, "--json", "--keep", 0.7, "--multiple", "GPTQ")
    report = Report.from_json(result.stdout)
    assert {site.kept for site in report.sites} == {256}
    assert "Warning" not in result.stderr
    assert "--multiple GPTQ" in report.provenance["command"]
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["multiple"] == report.settings["multiple"] == 128
    for wrong, said in (("gtpq", "did you mean 'gptq'?"), ("2.5", "got '2.5'"), ("-8", "got -8")):
        assert said in refusal(grail(*arguments, "--multiple", wrong))


def test_onload_writes_the_same_bits(arguments, tmp_path):
    assert grail(*arguments).exit_code == 0
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    result = grail(*arguments, "--output", tmp_path / "again", "--onload", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uneven_widths_add_up_and_the_folder_is_read_by_every_command(
    arguments, folder, dtype, tmp_path
):
    output, heldout = tmp_path / "out", folder / "heldout.txt"
    result = grail(
        *(*arguments, "--keep", "0.5", "--uneven", "--multiple", "2", "--dtype", dtype, "--json"),
        *("--evaluate", heldout, "--evaluate-tokens", "512", "--no-baseline", "--batch-size", "1"),
    )
    assert result.exit_code == 0, result.stderr
    report = Report.from_json((output / "report.json").read_text())
    kept = [site.kept for site in report.sites]
    assert sum(kept) == 80  # half of 160
    assert kept[0] != kept[1]
    model, _ = load_model(output)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == kept
    assert str(model.dtype) == f"torch.{dtype}"
    again = grail("evaluate", output, "--text", heldout, "--tokens", "512", "--json", *SHORT[:2])
    assert json.loads(again.stdout)["perplexity"] == report.evaluation["restored"].perplexity
    assert str(kept[0]) in (shown := grail("inspect", output).stdout)
    assert str(kept[1]) in shown
    again = [*arguments, "--keep", "0.75", "--multiple", "2", "--output", tmp_path / "narrower"]
    again[1] = output
    assert grail(*again).exit_code == 0
    model, _ = load_model(tmp_path / "narrower")
    narrower = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert all(width < before for width, before in zip(narrower, kept, strict=True))
    with pytest.raises((RuntimeError, ValueError)):  # never silently another model
        transformers.AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    "given",
    [[], ["--no-compensate"], ["--open-loop", "--drift-correction", "0"], ["--alpha", "0.01"]],
    ids=["both", "bias alone", "open loop", "alpha"],
)
def test_biases_are_fitted_where_the_model_has_none(given, arguments, tmp_path):
    result = grail(*arguments, "--fit-bias", *given)
    assert result.exit_code == 0, result.stderr
    model, _ = load_model(tmp_path / "out")
    assert all(layer.mlp.down_proj.bias.any() for layer in model.model.layers)


@pytest.mark.parametrize(
    ("family", "settings", "given"),
    [
        ("gpt2", {}, ["--sites", "heads"]),
        ("gpt_neox", {}, ["--sites", "mlp,heads"]),
        ("opt", {}, ["--sites", "heads", "--no-compensate"]),
        ("bloom", {"n_head": 6, "n_layer": 2}, ["--fit-bias"]),
        ("gptj", {"n_embd": 48, "n_head": 6, "n_layer": 2, "rotary_dim": 4}, []),
    ],
    ids=["gpt2", "gpt_neox", "opt", "bloom", "gptj"],
)
def test_widths_beyond_the_configuration_are_written_for_grail_alone(
    family, settings, given, tiny_model, tiny_tokenizer, arguments, folder, tmp_path
):
    config = tiny_model(family, **settings).config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    arguments[1] = tmp_path / "dense"
    heldout = ["--evaluate", folder / "heldout.txt", "--evaluate-tokens", "512", "--no-baseline"]
    result = grail(*arguments, *heldout, "--keep", "0.5", *given)
    assert result.exit_code == 0, result.stderr
    output = tmp_path / "out"
    report = Report.from_json((output / "report.json").read_text())
    assert [note for note in report.notes if "grail alone loads it" in note]
    assert not [note for note in report.notes if "save with" in note]
    assert "grail is needed to load it" in (output / "README.md").read_text()
    again = grail(
        *("evaluate", output, "--text", folder / "heldout.txt", "--tokens", "512", "--json"), *SHORT
    )
    row = report.evaluation["restored" if report.settings["compensate"] else "pruned"]
    assert json.loads(again.stdout)["perplexity"] == row.perplexity


def test_uneven_widths_of_what_is_not_measured_are_refused(arguments):
    result = grail(*arguments, "--uneven", "--no-compensate")
    assert "leave compensate on" in refusal(result)


@pytest.mark.parametrize("given", [[], ["--guard", "heldout.txt"]], ids=["one text", "guard"])
def test_uneven_widths_of_mlps_and_heads_share_one_budget(given, arguments, folder, tmp_path):
    output, given = tmp_path / "out", [str(folder / t) if "." in t else t for t in given]
    options = ["--keep", 0.65, "--uneven", "--multiple", 2, "--sites", "mlp,heads", *given]
    result = grail(*arguments, *options, "--json")
    assert result.exit_code == 0, result.stderr
    report = Report.from_json((output / "report.json").read_text())
    dense, (model, _) = load_model(folder / "model")[0], load_model(output)
    size, before = (
        sum(p.numel() for layer in m.model.layers for p in layer.parameters())
        for m in (model, dense)
    )
    assert 0.6 * before < size <= 0.655 * before  # but for the norms, which stay
    for layer, heads, mlp in zip(
        model.model.layers, report.sites[::2], report.sites[1::2], strict=True
    ):
        assert (heads.kind, mlp.kind) == ("heads", "mlp")
        assert layer.self_attn.o_proj.in_features == heads.kept
        assert layer.mlp.down_proj.in_features == mlp.kept


def test_other_texts_select_channels_and_uneven_widths(arguments, folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(words(1000, seed=3))
    given = ["--select-on", other, "--select-on", folder / "heldout.txt", "--select-tokens", 256]
    result = grail(*arguments, "--uneven", *given, "--json")
    assert result.exit_code == 0, result.stderr
    selecting = Report.from_json(result.stdout).provenance["select_on"]
    assert selecting["tokens"] == 256
    assert selecting["source"] == f"{other}, {folder / 'heldout.txt'}"
    idle = grail(*arguments, "--select-tokens", 256)
    assert "--select-tokens is used with --select-on" in refusal(idle)


@pytest.mark.parametrize("given", [["--onload"], ["--statistics", "a", "--open-loop"]])
def test_uneven_widths_need_text_and_the_model_where_it_runs(given, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["compress", folder / "model", "--output", tmp_path / "out", "--uneven", *given]
    text = ["--calibration", folder / "calibration.txt"]
    if "--onload" in given:
        command += text
    else:
        collect = ["stats", "collect", folder / "model", *text, "--output", tmp_path / "a", *SHORT]
        assert grail(*collect).exit_code == 0
    assert "uneven runs the whole model" in refusal(grail(*command))


def test_heldout_text_that_is_the_calibration_text_is_noted(arguments, folder):
    result = grail(*arguments, "--json", "--evaluate", folder / "calibration.txt", "--no-baseline")
    assert any("calibration text" in note for note in Report.from_json(result.stdout).notes)


def test_several_texts_are_mixed_and_named(arguments, folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(words(1000, seed=3))
    given = [*arguments, "--calibration", other, "--shares", "75%,0.25"]
    result = grail(*given, "--evaluate", other, "--no-baseline", "--json")
    report = Report.from_json(result.stdout)
    origin = report.provenance["calibration"]
    assert origin["source"] == f"{folder / 'calibration.txt'}, {other}"
    assert [text["tokens"] for text in origin["texts"]] == [384, 128]
    assert report.calibration["tokens"] == origin["tokens"] == 512
    assert any("is the calibration text" in note for note in report.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"  - {other}, 128 tokens, sha256" in card.replace("\\", "")
    assert report.provenance["command"].count("--calibration") == 2
    shutil.rmtree(tmp_path / "out")
    again = Report.from_json(grail(*shlex.split(report.provenance["command"])[1:]).stdout)
    assert again.provenance["calibration"] == origin
    shutil.rmtree(tmp_path / "out")
    python = grail_library.compress_checkpoint(
        folder / "model",
        tmp_path / "out",
        grail_library.Mixture(
            [folder / "calibration.txt", other], (0.75, 0.25), tokens=512, sequence_length=32
        ),
        progress=False,
    )
    assert python.provenance["calibration"] == origin
    collected = grail(
        *("stats", "collect", folder / "model", "--calibration", folder / "calibration.txt"),
        *("--calibration", other, "--output", tmp_path / "sums", *SHORT),
    )
    assert collected.exit_code == 0, collected.stderr
    (calibration,) = grail_library.Collected(tmp_path / "sums").calibrations
    assert calibration["tokens"] == 512


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--shares", "0.5,0.5"], "one number for each of 1 texts; got 2"),
        (["--calibration", "TEXT"], "again; give each text once"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt: nowhere.txt: no such file"),
        (["--calibration", "OTHER", "--shares", "0.5,0.4"], "add up to 1; got 0.9"),
        (["--calibration", "OTHER", "--shares", "half"], "is no share"),
        (["--calibration", "OTHER", "--tokens", "32"], "one sequence of 32 for each of 2 texts"),
        (["--calibration", "OTHER", "--field", "body"], "is plain text and has no field 'body'"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(arguments, folder, tmp_path, extra, said):
    paths = {"TEXT": folder / "calibration.txt", "OTHER": folder / "heldout.txt"}
    assert said in refusal(grail(*arguments, *(paths.get(word, word) for word in extra)))


def test_generate_writes_text_to_calibrate_on(folder, arguments, tmp_path):
    output = tmp_path / "generated.jsonl"
    given = ["generate", folder / "model", "--tokens", 256, "--sequence-length", 32]
    given += ["--prompts", folder / "calibration.txt", "--prompt-tokens", 4]
    given += ["--output", output, "--top-p", "90%", "--temperature", 0.8]
    result = grail(*given)
    assert result.exit_code == 0, result.stderr
    assert f"text    {output} (" in result.stdout
    assert "tokens a second" in result.stdout
    made = json.loads(output.read_text().splitlines()[0])["made"]
    assert (made["top_p"], made["temperature"], made["prompt_tokens"]) == (0.9, 0.8, 4)
    again = grail(*given, "--no-progress", "--json")
    facts = json.loads(again.stdout)
    assert (facts["written"], facts["path"]) == (0, str(output))
    assert facts["tokens"] >= 256
    assert "the file was there" in grail(*given, "--no-progress").stdout
    mixed = grail(*arguments, "--calibration", output, "--tokens", "256", "--json")
    texts = Report.from_json(mixed.stdout).provenance["calibration"]["texts"]
    assert [text["tokens"] for text in texts] == [128, 128]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--prompt-tokens", "4"], "--prompt-tokens is used with --prompts"),
        (["--field", "body"], "--field is used with --prompts"),
        (["--top-p", "2"], "top_p must be a number > 0 and ≤ 1; got 2.0"),
        (["--temperature", "hot"], "'hot' is not a number"),
        (["--output", "out.txt"], "does not end in .jsonl"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt: no such file"),
    ],
)
def test_wrong_options_of_generate_are_refused(folder, tmp_path, monkeypatch, extra, said):
    monkeypatch.chdir(tmp_path)
    given = ["generate", folder / "model", "--output", "out.jsonl", *extra]
    assert said in refusal(grail(*given))
    assert list(tmp_path.iterdir()) == []


def test_text_shorter_than_asked_for_is_noted(arguments):
    result = grail(*arguments, "--json", "--tokens", 100_000)
    assert any("fewer than the 100000" in note for note in Report.from_json(result.stdout).notes)


def test_version_is_printed():
    result = grail("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "grail")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--keep", "0"], "keep must be a fraction in (0, 1]"),
        (["--keep", "1.5"], "keep must be a fraction in (0, 1]"),
        (["--keep", "nan"], "keep must be a fraction in (0, 1]"),
        (["--selector", "best"], "wanda"),
        (["--selector", "wandaa"], "did you mean 'wanda'?"),
        (["--keep", "0.5,0.7"], "2 shares, and a run has one"),
        (["--keep", "half"], "'half' is no share"),
        (["--tokens", "0.5k"], "'0.5k' is no number of tokens"),
        (["--tokens", "64q"], "'64q' is no number of tokens"),
        (["--tokens", "0k"], "'0k' is no number of tokens"),
        (["--tokens", "-5"], "'-5' is no number of tokens"),
        (["--alpha", "some"], "'some' is neither a number nor auto"),
        (["--batch-size", "0"], "invalid value for '--batch-size'"),
        (["--no-such-option"], "--no-such-option"),
        (["--join", "newline"], "'eos', 'blank', 'none'"),
        (["--split", "test"], "is one file and has no split 'test'"),
        (["--calibration", ""], "the name of the text is empty"),
        (["--alpha", "-1"], "alpha must be"),
        (["--calibration", "missing.txt"], "missing.txt: no such file"),
        (["--evaluate", "missing.txt"], "missing.txt: no such file"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
        (["--device", "meta"], "'meta' cannot be used here"),
        (["--tokens", "8"], "less than one sequence"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    arguments, changes, said, monkeypatch, tmp_path
):
    monkeypatch.setattr(pretrained, "load_model", lambda *a, **k: pytest.fail("loaded the model"))
    assert said in refusal(grail(*arguments, *changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [["--toward", "up"], ["--dtype", "int8"]])
def test_values_out_of_range_are_usage_errors(arguments, changes):
    assert "; see grail compress --help" in refusal(grail(*arguments, *changes))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512", 512),
        ("65_536", 65536),
        ("64k", 65536),
        ("64 K", 65536),
        ("3M", 3 << 20),
        ("9" * 20, int("9" * 20)),
    ],
)
def test_counts_of_tokens_have_multiples(folder, text, count):
    result = grail("inspect", folder / "model", "--tokens", text, "--json")
    assert json.loads(result.stdout)["tokens"] == count


def test_more_tokens_than_any_text_has_are_all_of_it(arguments):
    result = grail(*arguments, "--json", "--tokens", "9" * 25, "--alpha", "AUTO", "--keep", "70%")
    report = Report.from_json(result.stdout)
    assert (report.calibration["tokens"], report.settings["keep"]) == (2000 // 32 * 32, 0.7)


def test_a_selector_is_found_in_any_case(arguments):
    result = grail(*arguments, "--json", "--selector", "Wanda", "--sites", " MLP , heads ")
    report = Report.from_json(result.stdout)
    assert report.settings["selector"] == "wanda"
    assert report.settings["sites"] == ["mlp", "heads"]


def test_inspect_takes_shares_as_a_list_and_one_by_one(folder):
    result = grail("inspect", folder / "model", "--keep", "0.5,0.7", "--keep", 0.6, "--json")
    assert [row["keep"] for row in json.loads(result.stdout)["savings"]] == [0.5, 0.7, 0.6]
    assert "in (0, 1]" in refusal(grail("inspect", folder / "model", "--keep", "0.5,7"))


def test_tokens_that_the_embedding_does_not_have_are_refused(
    folder, tiny_tokenizer, arguments, tmp_path
):
    model = shutil.copytree(folder / "model", tmp_path / "larger")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained(model)
    bad = tmp_path / "bad.txt"
    bad.write_text(words(600, seed=4) + " <turn> w5")
    said = "tokenizer of 98 tokens, holds token ids that the model's embedding of 97 rows does not"
    arguments[1] = model
    for command in (
        [*arguments, "--calibration", bad, "--tokens", "600"],
        [*arguments, "--evaluate", bad, "--evaluate-tokens", "602"],
        ["evaluate", model, "--text", bad, *SHORT[:2], "--tokens", "602"],
        ["stats", "collect", model, "--calibration", bad, "--output", tmp_path / "s", *SHORT[:2]],
    ):
        if command[0] != "stats":
            bad.write_text(words(575, seed=4) + " <turn> w5")  # in the last whole sequence
        assert said in refusal(grail(*command, "--tokens", "576"))
    assert not (tmp_path / "out").exists()
    assert grail(*arguments).exit_code == 0  # a larger tokenizer whose tokens do not occur


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect", "stats"])
@pytest.mark.parametrize(
    "error", [IndexError("index 5 is\nout of range"), KeyError("a"), OSError()]
)
@pytest.mark.parametrize("debug", [False, True])
def test_any_other_exception_is_one_sentence_and_status_1(
    command, error, debug, arguments, folder, monkeypatch, tmp_path
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(study, "compress", fail)
    monkeypatch.setattr(evaluate, "evaluate_model", fail)
    monkeypatch.setattr(inspect, "inspect_model", fail)
    monkeypatch.setattr(stats, "collect_statistics", fail)
    text, model = folder / "heldout.txt", folder / "model"
    commandline = {
        "compress": arguments,
        "evaluate": ["evaluate", model, "--text", text],
        "inspect": ["inspect", model],
        "stats": ["stats", "collect", model, "--calibration", text, "--output", tmp_path / "s"],
    }
    result = grail(*commandline[command], *(["--debug"] if debug else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    message = " ".join(str(error).split()) or type(error).__name__
    assert result.stderr.splitlines()[-1] == (
        f"grail: unexpected {type(error).__name__}: {message}; --debug shows the traceback; please "
        "report it"
    )
    assert ("Traceback" in result.stderr) == debug
    assert not list(tmp_path.iterdir())


def test_statistics_from_a_wrong_folder_are_refused_before_the_model_is_loaded(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(pretrained, "load_model", lambda *a, **k: pytest.fail("loaded the model"))
    for wrong in (folder / "model", tmp_path / "none", folder / "heldout.txt"):
        result = grail(
            *("compress", folder / "model", "--statistics", wrong, "--open-loop"),
            *("--output", tmp_path / "out"),
        )
        assert f"{wrong} holds no statistics: there is no {wrong}/index.state" in refusal(result)


def test_a_folder_without_tokenizer_is_refused_by_every_command(folder, arguments, tmp_path):
    model = tmp_path / "bare"
    shutil.copytree(folder / "model", model, ignore=shutil.ignore_patterns("*token*"))
    arguments[1] = model
    text = folder / "heldout.txt"
    for command in (arguments, ["evaluate", model, "--text", text], ["inspect", model]):
        assert "its tokenizer is missing" in refusal(grail(*command))


ROW = "w5 w6 w7 w8 w9 w10 w11"


@pytest.fixture
def wikitext(monkeypatch, tmp_path):
    """Stands for the hub: every dataset has these splits; gives the splits that were asked for."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(builder, name=None, split=None, streaming=False):
        asked.append((builder, name, split))
        rows = ["", f" {'w90 ' if split == 'test' else 'w91 '}= \n", *[ROW] * 400]
        return datasets.Dataset.from_dict({"text": rows, "body": rows[::-1]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_wikitext2_is_evaluated_as_in_the_literature(
    wikitext, tiny_llama, tiny_tokenizer, monkeypatch, tmp_path
):
    seen = []
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    real = evaluate.evaluate_model
    monkeypatch.setattr(
        evaluate,
        "evaluate_model",
        lambda network, b, **how: (seen.append(b), real(network, b, **how))[1],
    )
    result = grail("evaluate", tmp_path / "model", "--text", "wikitext2", "--json")
    assert json.loads(result.stdout)["tokens"] == 2047
    assert set(wikitext) == {("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
    (tokens,) = seen[0]
    rows = ["", " w90 = \n", *[ROW] * 400]
    whole = tiny_tokenizer()("\n\n".join(rows)).input_ids  # 2802 tokens
    assert tokens.tolist() == [whole[:2048]]
    result = grail(
        *("evaluate", tmp_path / "model", "--text", "wikitext2", "--json"),
        *("--sequence-length", "32", "--tokens", "64"),
    )
    assert json.loads(result.stdout)["tokens"] == 62


def test_compress_compares_on_wikitext2_whatever_the_calibration_is(arguments, wikitext):
    result = grail(*arguments, "--evaluate", "wikitext2", "--no-baseline", "--json")
    report = Report.from_json(result.stdout)
    assert report.evaluation["dense"].tokens == 2802 // 128 * 127
    assert any("windows of 128 tokens" in note for note in report.notes)


@pytest.mark.parametrize("given", [[], ["--evaluate-split", "train"]])
def test_calibration_and_evaluation_read_splits_of_their_own(without_text, wikitext, given):
    source = ["--calibration", "some/data", "--evaluate", "some/data", "--no-baseline"]
    result = grail(*without_text, *source, *given, "--evaluate-tokens", "64", "--json")
    report = Report.from_json(result.stdout)
    splits = [split for _, _, split in wikitext]
    assert set(splits) == ({"train"} if given else {"train", "test"})
    read = {name: report.provenance[name]["split"] for name in ("calibration", "evaluation")}
    assert read == {"calibration": "train", "evaluation": "train" if given else "test"}
    assert any("is the calibration text" in note for note in report.notes) == bool(given)


def test_fields_and_joins_of_the_calibration_are_those_of_the_evaluation(
    without_text, monkeypatch, tmp_path
):
    rows = [{"body": words(40, seed), "other": words(40, 90 + seed)} for seed in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    calls = []
    real = texts.token_batches
    monkeypatch.setattr(texts, "token_batches", lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    source = ["--calibration", tmp_path / "a.json", "--evaluate", tmp_path / "a.json"]
    source += ["--no-baseline", "--field", "body", "--join", "none", "--evaluate-tokens", "64"]
    assert grail(*without_text, *source).exit_code == 0
    own = ["--evaluate-field", "other", "--evaluate-join", "blank", "--output", tmp_path / "again"]
    assert grail(*without_text, *source, *own).exit_code == 0
    read = [(call["field"], call["join"]) for call in calls]
    assert read == [("body", "none"), ("body", "none"), ("body", "none"), ("other", "blank")]


def test_chats_need_a_template(arguments, tmp_path):
    chat = [{"role": "user", "content": words(40, 1)}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 30))
    said = refusal(grail(*arguments, "--calibration", tmp_path / "chat.jsonl"))
    assert "chats need a tokenizer with a chat template" in said


def test_sequences_longer_than_a_model_has_positions_for_are_refused(arguments, folder, tmp_path):
    text = folder / "heldout.txt"
    said = "reads sequences of at most 128 tokens, not of 256; give --sequence-length 128"
    model, longer = folder / "model", ["--sequence-length", "256", "--tokens", "512"]
    for command in (
        ["compress", model, *arguments[2:], *longer],
        ["evaluate", model, "--text", text, *longer],
        ["stats", "collect", model, "--calibration", text, "--output", tmp_path / "s", *longer],
    ):
        assert said in refusal(grail(*command))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "loads"),
    [("", False), (" \n ", False), ("w5 w6", False), (words(30, seed=3), True)],
    ids=["empty", "blank", "few bytes", "few tokens"],
)
@pytest.mark.parametrize("option", ["--calibration", "--evaluate"])
def test_text_without_one_sequence_is_refused(
    arguments, text, loads, option, monkeypatch, tmp_path
):
    if not loads:
        monkeypatch.setattr(
            pretrained, "load_model", lambda *a, **k: pytest.fail("loaded the model")
        )
    (tmp_path / "text.txt").write_text(text)
    said = refusal(grail(*arguments, option, tmp_path / "text.txt"))
    assert "one sequence" in said
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_the_models_own_length_is_refused_before_it_is_loaded(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(pretrained, "load_model", lambda *a, **k: pytest.fail("loaded the model"))
    (tmp_path / "text.txt").write_text(words(30, seed=3))  # 128 positions, fewer bytes
    result = grail("evaluate", folder / "model", "--text", tmp_path / "text.txt")
    assert "less than one sequence of 128" in refusal(result)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--keep", "0.01"], "is a width of 0"),
        (["--keep", "0.01", "--sites", "heads"], "is a width of 0"),
        (["--sites", "mlp,experts"], "experts"),
        (["--sites", "heads", "--selector", "folding"], "not attention heads"),
    ],
    ids=["mlp width 0", "heads width 0", "unknown site", "folded heads"],
)
def test_what_the_model_cannot_do_is_refused(arguments, changes, said, tmp_path):
    assert said in refusal(grail(*arguments, *changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect"])
def test_a_folder_that_is_no_model_is_refused(command, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    options = {
        "compress": ["--calibration", folder / "calibration.txt", "--output", tmp_path / "out"],
        "evaluate": ["--text", folder / "heldout.txt"],
        "inspect": [],
    }
    said = refusal(grail(command, tmp_path / "empty", *options[command]))
    assert "is not a model" in said


def test_an_architecture_without_sites_is_refused_by_name(arguments, tiny_tokenizer, tmp_path):
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    arguments[1] = tmp_path / "mamba"
    said = refusal(grail(*arguments))
    assert "no sites are known for model_type 'mamba'" in said
    assert "grail.trace(model)" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_non_finite_weights_are_refused_with_their_site(
    arguments, tiny_llama, tiny_tokenizer, value, tmp_path
):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    arguments[1] = tmp_path / "broken"
    assert "model.layers.1.mlp" in refusal(grail(*arguments))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused_before_the_model_is_loaded(
    arguments, monkeypatch, tmp_path
):
    monkeypatch.setattr(pretrained, "load_model", lambda *a, **k: pytest.fail("loaded the model"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty" in refusal(grail(*arguments))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_too_little_disk_is_refused_before_the_work(arguments, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(1 << 40, (1 << 40) - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(study, "compress", lambda *a, **k: pytest.fail("did the work"))
    assert "MiB free" in refusal(grail(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "stage"),
    [(pretrained, "load_model"), (study, "evaluate"), (study, "compress"), (workflow, "page")],
    ids=["load", "evaluate", "compress", "page"],
)
def test_an_interrupted_run_leaves_nothing_behind(
    arguments, folder, module, stage, monkeypatch, tmp_path
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, stage, interrupt)
    result = grail(*arguments, "--evaluate", folder / "heldout.txt")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_process_with_130_and_leaves_nothing(arguments, tmp_path):
    (tmp_path / "long.txt").write_text(words(400_000, seed=4))
    command = [*GRAIL, *map(str, arguments), "--calibration", tmp_path / "long.txt"]
    command += ["--tokens", "300000", "--batch-size", "1"]
    # Where this suite runs in a shell's background, its children would ignore Ctrl-C.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c
    ) as process:
        for line in process.stderr:
            if line.startswith("Compressing"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_running_out_of_memory_names_the_knobs(error, arguments, monkeypatch):
    def exhausted(*args, **kwargs):
        raise error

    monkeypatch.setattr(study, "compress", exhausted)
    assert "--batch-size" in refusal(grail(*arguments))


def test_debug_shows_the_traceback(arguments):
    result = grail(*arguments, "--keep", 2, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "InputError" in result.stderr


def test_missing_matplotlib_costs_the_page_and_not_the_run(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(workflow, "find_spec", lambda name: None)
    result = grail(*arguments, "--json")
    assert any("grail-kernels[report]" in note for note in Report.from_json(result.stdout).notes)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_packages_are_named_with_what_to_install(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from grail.__main__ import main\n"
        "exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"The command line needs {package}: pip install 'grail-kernels[llm]'."
    )


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no-such-option", 2)])
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_tearing_down(argument, status, processes):
    code = (
        "import atexit, sys; atexit.register(print, 'torn down'); from grail.__main__ import main; "
        f"sys.argv[1:] = [{argument!r}]; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert ("torn down" in done.stdout) == (processes == 1)
    assert ("Usage" in done.stdout + done.stderr) or ("usage" in done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--evaluate-split", "test"], "--evaluate-split is of the held-out text"),
        (["--evaluate-field", "a"], "--evaluate-field is of the held-out text"),
        (["--evaluate-join", "blank"], "--evaluate-join is of the held-out text"),
        (["--evaluate-tokens", "5k"], "--evaluate-tokens is of the held-out text"),
        (["--field", "text"], "plain text and has no field 'text'"),
        (["--evaluate", "-"], "--evaluate: - is a pipe"),
        (["--seed", str(2**63)], "invalid value for '--seed'"),
        (["--batch-size", str(2**63)], "invalid value for '--batch-size'"),
        (["--tokens", "9" * 5000], "a text of 5000 characters is no number of tokens"),
        (["--tokens", str(10**30 + 1)], "at most 10³⁰"),
        (["--output", "x" * 245], "cannot be written: [Errno 36]"),
    ],
)
def test_options_that_nothing_reads_or_holds_are_refused(
    arguments, extra, sentence, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(grail(*arguments, *extra))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra",
    [["--tokens", "64"], ["--split", "train"], ["--join", "eos"], ["--shares", "0.5,0.5"]],
)
def test_statistics_take_no_options_of_a_text(folder, tmp_path, extra):
    command = ["compress", folder / "model", "--statistics", folder, "--open-loop"]
    told = refusal(grail(*command, "--output", tmp_path / "out", *extra))
    assert f"{extra[0]} is of the calibration text" in told


@pytest.mark.parametrize(
    ("output", "resume"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/../c", "c/d")]
)
def test_output_and_state_lie_apart(arguments, tmp_path, output, resume):
    extra = ["--output", tmp_path / output, "--resume-dir", tmp_path / resume]
    assert "inside one another" in refusal(grail(*arguments, *extra))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["same", "link", "copy", "other"])
def test_the_same_text_is_known_by_another_path(folder, tmp_path, way):
    first, second = folder / "calibration.txt", tmp_path / "second.txt"
    if way == "link":
        second.symlink_to(first)
    elif way != "same":
        second.write_text(first.read_text() + ("" if way == "copy" else "w5"))
    sources = first, first if way == "same" else second
    one, other = (texts.Text(str(path)) for path in sources)
    assert one.is_same_text(other) == (way != "other")


def test_a_full_disk_behind_the_printing_does_not_hide_the_output(
    folder, arguments, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress, "headline", full)
    result = grail(*arguments)
    assert result.exit_code == 0
    assert f"complete in {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out" / "report.json").is_file()


def test_help_is_shown_on_an_ascii_terminal():
    command = [*GRAIL, "compress", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"--calibration" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["--no-such-option"]])
def test_the_first_page_does_not_wait_for_torch(arguments):
    code = (
        "import sys; from grail.__main__ import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_the_first_page_lists_the_sentences_of_the_commands():
    page = " ".join(grail("--help").stdout.replace("│", " ").split())
    for module in (bench, compress, evaluate, export, generate, inspect, stats):
        name = module.__name__.rpartition(".")[2]
        sentence = commands.root.COMMANDS[name]
        assert f"{name} {sentence}" in page
        assert sentence in " ".join(grail(name, "--help").stdout.split())
    assert len(commands.root.COMMANDS) == 7


def test_ctrl_c_while_torch_is_imported_is_one_sentence():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from grail.__main__ import main\n"
        "sys.argv[1:] = ['inspect', 'model']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.split() == ["grail:", "interrupted;", "no", "output", "was", "written."]
