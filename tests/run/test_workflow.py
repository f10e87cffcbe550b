"""The workflow of the command line as one call from Python."""

import json

import pytest
import torch

import grail
from grail.errors import InputError
from grail.files import pretrained
from grail.recipe import Recipe
from grail.report.report import Report
from grail.run import resume_folder, study
from grail.run.served import WidthWarning
from grail.runtime.settings import Runtime

pytest.importorskip("transformers")

SETTINGS = {"sites": "mlp,heads", "alpha": 1e-3, "seed": 3}


@pytest.fixture
def text(tmp_path):
    """`text(name, seed)`: a file of words that the tiny tokenizer knows, as a `grail.Text`."""

    def make(name, step, **how):
        path = tmp_path / name
        path.write_text(" ".join(f"w{3 + step * n % 90}" for n in range(600)))
        return grail.Text(str(path), **{"tokens": 128, "sequence_length": 16, **how})

    return make


def test_it_writes_the_folder_of_the_command_line(tiny_folder, text, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail import commands

    calibration, heldout = text("a.txt", 7), text("b.txt", 11)
    report = grail.compress_checkpoint(
        tiny_folder,
        tmp_path / "python",
        calibration,
        evaluate=grail.Text.held_out(heldout.source, tokens=64, sequence_length=16),
        recipe=Recipe(0.5),
        runtime=Runtime(progress=False),
        **SETTINGS,
    )
    options = ["--keep", 0.5, "--sites", "mlp,heads", "--alpha", 1e-3, "--seed", 3]
    options += ["--tokens", 128, "--sequence-length", 16, "--evaluate", heldout.source]
    arguments = ["compress", tiny_folder, "--calibration", calibration.source, *options]
    arguments += ["--evaluate-tokens", 64, "--output", tmp_path / "shell"]
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    python, shell = (
        {path.name: path.read_bytes() for path in (tmp_path / way).iterdir()}
        for way in ("python", "shell")
    )
    assert python.keys() == shell.keys() >= {"recipe.json", "report.html", "README.md"}
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert python[name] == shell[name]
    assert list(report.evaluation) == ["dense", "pruned", "compensated", "restored"]
    written = Report.from_json(python["report.json"].decode())
    assert written == Report.from_json(report.to_json())
    assert written.provenance["command"].startswith("grail.compress_checkpoint(")
    other = Report.from_json(shell["report.json"].decode())
    assert (written.settings, written.sites) == (other.settings, other.sites)
    assert written.evaluation == other.evaluation
    recipe = Recipe.load(tmp_path / "python" / "recipe.json")
    assert recipe == Recipe(0.5, "mlp,heads", alpha=1e-3, seed=3)


def test_the_command_line_is_that_call(tiny_folder, text, tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail import commands

    Recipe(0.4, alpha=0.1).save(tmp_path / "recipe.yaml")
    calls = []

    def call(*args, **kwargs):
        calls.append((args, kwargs))
        raise InputError("enough")

    monkeypatch.setattr(commands.compress, "compress_checkpoint", call)
    arguments = ["compress", tiny_folder, "--calibration", text("a.txt", 7).source]
    arguments += ["--output", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--uneven"]
    arguments += ["--alpha", 0.2, "--no-progress", "--storage", "cpu", "--batch-size", 2]
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    assert done.stderr == f"help: {InputError.page}\ngrail: enough\n"
    (((model, output, calibration), settings),) = calls
    assert (model.source, output) == (str(tiny_folder), tmp_path / "out")
    assert (calibration.batch_size, calibration.tokens) == (2, 65536)
    assert settings["recipe"] == Recipe(0.4, alpha=0.2)  # what is given wins over the file
    assert settings["runtime"] == Runtime(progress=False, storage="cpu")
    assert settings["uneven"]
    assert settings["evaluate"] is None


def test_statistics_stand_for_a_text(tiny_folder, text, tmp_path):
    model, tokenizer = grail.load_model(tiny_folder)
    batches = text("a.txt", 7, seed=0).batches(model, tokenizer)
    grail.collect(model, batches, output=tmp_path / "sums", progress=False)
    settings = {"closed_loop": False, "progress": False}
    for way, calibration in (
        ("text", text("a.txt", 7)),
        ("sums", grail.Collected(tmp_path / "sums")),
    ):
        grail.compress_checkpoint(tiny_folder, tmp_path / f"{way}-out", calibration, **settings)
    found = [(tmp_path / f"{way}-out/model.safetensors").read_bytes() for way in ("text", "sums")]
    assert found[0] == found[1]


def test_nothing_is_printed_without_progress(tiny_folder, text, tmp_path, capfd):
    grail.compress_checkpoint(tiny_folder, tmp_path / "out", text("a.txt", 7), progress=False)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Compressing" not in printed.err


@pytest.mark.parametrize("when", ["measured", "written"])
def test_a_killed_call_is_resumed(when, tiny_folder, text, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    def run(output):
        runtime = Runtime(resume_dir=tmp_path / "state", progress=False)
        return grail.compress_checkpoint(
            tiny_folder, tmp_path / output, text("a.txt", 7), runtime=runtime
        )

    expected = run("expected")
    with monkeypatch.context() as patch:
        at = (study, "export") if when == "measured" else (resume_folder, "clear")
        patch.setattr(*at, die)
        with pytest.raises(Killed):
            run("out")
    if when == "written":  # then nothing is left to do
        monkeypatch.setattr(pretrained, "load_model", lambda *_, **__: pytest.fail("loaded"))
    again = run("out")
    assert again.sites == expected.sites
    assert not (tmp_path / "state").exists()
    weights = [(tmp_path / o / "model.safetensors").read_bytes() for o in ("expected", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"uneven": True, "compensate": False}, "leave compensate on"),
        ({"uneven": True, "keep": {"mlp": 0.5}}, "leave uneven out to use these"),
        ({"uneven": True, "onload": "cpu"}, "in one process: give no statistics and no onload"),
        ({"alhpa": 1}, "did you mean 'alpha'"),
        ({"recipe": "papre"}, "did you mean 'paper'"),
        ({"evaluate": "missing.txt"}, r"evaluate: missing\.txt: no such file"),
        ({"calibration": "missing.txt"}, r"calibration: missing\.txt: no such file"),
        ({"output": "here"}, "is not empty"),
    ],
)
def test_what_shows_before_the_model_is_loaded_is_refused_by_then(
    given, said, tiny_folder, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes").write_text("mine")
    call = {"output": "out", "calibration": text("a.txt", 7), **given}
    with pytest.raises(InputError, match=said):
        grail.compress_checkpoint(tiny_folder, progress=False, **call)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tokens": "2k"}, "tokens must be a whole number; got '2k'"),
        ({"sequence_length": "64"}, "sequence_length must be a whole number; got '64'"),
        ({"batch_size": 4.0}, "batch_size must be a whole number; got 4.0"),
        ({"field": 5}, "field must be the name of a field; got int"),
        ({"source": 5}, "source must be the name of a file or dataset; got int"),
    ],
)
def test_values_of_another_kind_make_no_text(how, said):
    with pytest.raises(InputError, match=said):
        grail.Text(**{"source": "a.txt", **how})


@pytest.mark.parametrize(
    ("keep", "label"),
    [
        ({"mlp": 0.5, "heads": 0.7}, "compensated (wanda)"),
        ({"mlp": [0.5, 0.9], "heads": 0.7}, "compensated (wanda, uneven)"),
        ({"mlp": 0.5, "model.layers.1.mlp": 0.9, "heads": 1}, "compensated (wanda, uneven)"),
    ],
    ids=["kinds", "blocks", "sites"],
)
def test_shares_by_name_run_through_the_workflow(keep, label, tiny_folder, text, tmp_path):
    settings = {"sites": "mlp,heads", "selector": "wanda", "multiple": 4, "alpha": 1e-3}
    report = grail.compress_checkpoint(
        tiny_folder,
        tmp_path / "out",
        text("a.txt", 7),
        evaluate=text("b.txt", 11),
        keep=keep,
        progress=False,
        **settings,
    )
    assert report.evaluation["restored"].label == label
    path = tmp_path / "out" / "recipe.json"
    assert Recipe.load(path).keep == keep
    grail.compress_checkpoint(
        tiny_folder, tmp_path / "again", text("a.txt", 7), recipe=path, progress=False
    )
    weights = [(tmp_path / o / "model.safetensors").read_bytes() for o in ("out", "again")]
    assert weights[0] == weights[1]


def test_a_recipe_that_names_layers_runs_through_the_workflow(tiny_folder, text, tmp_path):
    layers = [f"model.layers.{block}.mlp" for block in range(2)]
    sites = [
        grail.Site([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [f"{mlp}.down_proj"], name=mlp)
        for mlp in layers
    ]
    Recipe(0.5, sites).save(path := tmp_path / "recipe.yaml")
    report = grail.compress_checkpoint(
        tiny_folder, tmp_path / "out", text("a.txt", 7), recipe=path, progress=False
    )
    assert [site.name for site in report.sites] == layers
    assert Recipe.load(tmp_path / "out" / "recipe.json") == Recipe(0.5, sites)
    assert report.memory["predicted_peak"] > 0
    assert report.stages["compressing"].keys() == {"predicted", "measured"}


def test_the_recipe_of_uneven_widths_gives_the_same_bits_alone(tiny_folder, text, tmp_path):
    call = {"runtime": Runtime(progress=False), "multiple": 2}
    calibration = text("a.txt", 7, batch_size=2)
    grail.compress_checkpoint(
        tiny_folder, tmp_path / "out", calibration, uneven=True, keep=0.5, **call
    )
    path = tmp_path / "out" / "recipe.json"
    grail.compress_checkpoint(tiny_folder, tmp_path / "again", calibration, recipe=path, **call)
    weights = [(tmp_path / o / "model.safetensors").read_bytes() for o in ("out", "again")]
    assert weights[0] == weights[1]


def test_widths_that_quantisers_refuse_are_warned_of_once(
    tiny_llama, tiny_tokenizer, text, tmp_path
):
    tiny_llama(intermediate_size=384).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(WidthWarning) as caught:
        grail.compress_checkpoint(
            *(tmp_path / "model", tmp_path / "out", text("a.txt", 7)),
            evaluate=text("b.txt", 8),
            runtime=Runtime(progress=False),
        )
    (warning,) = (w for w in caught if w.category is WidthWarning)
    assert "mlp: 272 of 384" in str(warning.message)


def test_the_report_has_the_recipe_as_data(tiny_folder, text, tmp_path):
    report = grail.compress_checkpoint(
        tiny_folder, tmp_path / "out", text("a.txt", 7), recipe="flap", progress=False
    )
    assert Recipe.from_dict(report.settings) == Recipe.named("flap")
    assert json.loads((tmp_path / "out/recipe.json").read_text()) == report.settings
    page = (tmp_path / "out/report.html").read_text()
    assert all(name in page for name in report.settings)
    assert torch.isfinite(torch.tensor([site.error for site in report.sites])).all()
