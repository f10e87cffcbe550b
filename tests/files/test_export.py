"""An export is complete and reloads to the same logits, or is not there."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import grail
from grail import export
from grail.errors import ExportError, InputError
from grail.files.load import load_model
from grail.report.card import card
from grail.report.report import Evaluation, Report, SiteReport
from grail.runtime.folder import check_output, complete


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_reloads_to_the_same_logits(tiny_model, tiny_batches, tmp_path, family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    folder = export(model, None, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tiny_batches()[0]
    assert torch.equal(model(tokens).logits, reloaded(tokens).logits)


def test_compares_no_more_tokens_than_the_model_has_positions_for(tiny_model, tmp_path):
    model = tiny_model("gpt2", max_position_embeddings=16)
    assert export(model, None, tmp_path / "out").is_dir()


def test_keeps_a_16_bit_model_in_16_bit(tiny_folder, tmp_path):
    model, tokenizer = load_model(tiny_folder, dtype=torch.bfloat16)
    folder = export(model, tokenizer, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_refuses_a_model_whose_rotary_frequencies_were_rounded(tiny_llama, tmp_path):
    with pytest.raises(ExportError, match="rotary"):
        export(tiny_llama().to(torch.bfloat16), None, tmp_path / "out")


def test_writes_tokenizer_report_and_page(tiny_llama, tiny_tokenizer, tmp_path):
    report = Report(settings={"keep": 0.5}, model={}, calibration={})
    folder = export(tiny_llama(), tiny_tokenizer(), tmp_path / "out", report, "<p>page</p>")
    assert AutoTokenizer.from_pretrained(folder)("w7 w9").input_ids == [7, 9]
    assert Report.from_json((folder / "report.json").read_text()) == report
    assert (folder / "report.html").read_text() == "<p>page</p>"
    assert "keep 0.5" in (folder / "README.md").read_text()


def test_report_and_page_are_made_once_the_model_is_there(tiny_llama, tmp_path):
    report = Report(settings={}, model={}, calibration={})
    seen = []

    def finished():
        (partial,) = tmp_path.glob(".out.*.partial")
        seen.extend(path.name for path in partial.iterdir())
        return report

    def page(given):
        given.notes.append("from the page")
        return "<p>made</p>"

    folder = export(tiny_llama(), None, tmp_path / "out", finished, page)
    assert "model.safetensors" in seen
    assert (folder / "report.html").read_text() == "<p>made</p>"
    assert Report.from_json((folder / "report.json").read_text()).notes == ["from the page"]


def test_a_failing_report_leaves_nothing(tiny_llama, tmp_path):
    with pytest.raises(ZeroDivisionError):
        export(tiny_llama(), None, tmp_path / "out", lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def header(card):
    """The fields between the two lines of dashes, read as YAML."""
    _, fields, _ = card.split("---\n", 2)
    return yaml.safe_load(fields)


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("models/of mine: #1.gguf", "of mine: #1.gguf"),
    ],
    ids=["hub", "file"],
)
@pytest.mark.parametrize("form", ["stock", "decilm", "decilm-256", "uneven", "grail"])
def test_the_card_says_what_hubs_read(source, base, form):
    report = Report({}, {"name": Path(source).name}, {}, provenance={"model": {"source": source}})
    assert header(card(report, form)) == {
        "base_model": base,
        "library_name": "grail" if form == "grail" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grail", "structured-pruning", "compressed"],
    }


@pytest.mark.parametrize(
    ("family", "kind", "keep", "uneven"),
    [
        ("llama", "mlp", 0.5, False),
        ("llama", "mlp", [0.5, 0.75], True),
        ("gpt2", "heads", 0.5, True),
    ],
    ids=["even", "uneven", "for grail alone"],
)
def test_the_code_on_the_card_loads_the_model(
    family, kind, keep, uneven, tiny_model, tiny_tokenizer, tiny_batches, tmp_path, own_modules
):
    model, batches = tiny_model(family), tiny_batches()
    report = grail.compress(model, batches, {kind: keep}, (kind,), multiple=2, progress=False)
    folder = export(model, tiny_tokenizer(), tmp_path / "out", report, uneven=uneven)
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    names = {}
    exec(code, names)
    assert names["tokenizer"]("w5").input_ids == [5]
    tokens = tiny_batches()[0]
    with torch.no_grad():
        assert torch.equal(names["model"](tokens).logits, model(tokens).logits)
    kept = sum(site.kept for site in report.sites)
    channels = sum(site.channels for site in report.sites)
    assert f"{kind}: 2 sites, {kept} of {channels} channels kept" in text


def site(kept, kind="mlp"):
    return SiteReport("a", kind, 0, 1024, kept, 10, None, 0.0, 0.0, 0, None, None)


WIDTHS = {
    (768, 512): "multiples of 256, which fits GGUF blocks of 32 and 256, groups of 64 and 128, "
    "tensor parallelism on 2, 4 and 8 GPUs.",
    (96, 160): "multiples of 32, which fits GGUF blocks of 32, tensor parallelism on 2, 4 and 8",
    (9, 15): "multiples of 3.",
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("form", ["stock", "decilm", "decilm-256", "uneven", "grail", "saved"])
def test_the_card_says_how_to_serve_and_what_was_not_verified(widths, form):
    sites = [*map(site, widths), site(7, "heads")]
    text = card(Report({}, {}, {}, sites), form)
    served = form not in ("grail", "saved")
    assert ("Not verified in vLLM: `grail export FOLDER --check FOLDER`" in text) == served
    assert (f"- MLP widths are {WIDTHS[widths]}" in text) == served
    assert ("trust_remote_code=True" in text) == (form in ("decilm", "decilm-256", "uneven"))
    assert ("`vllm serve FOLDER`" in text) == (form == "stock")


def test_the_card_has_the_scores_and_takes_hostile_names(tmp_path):
    hostile = "a | b\n# c <script>"
    row = Evaluation(12.5, 10, 1_000_000, 4_000_000, hostile, "weights")
    report = Report({"selector": hostile}, {"name": hostile}, {}, evaluation={"restored": row})
    text = card(report)
    (line,) = [line for line in text.splitlines() if "12.5" in line]
    cells = re.split(r"(?<!\\)\|", line)
    assert [cell.strip() for cell in cells[2:5]] == ["12.5", "1.00 M", "4.00 MB"]
    _, _, body = text.split("---\n", 2)
    assert "script" in body
    assert "<script>" not in body
    assert not [line for line in text.splitlines() if line.startswith("# c")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
@pytest.mark.parametrize("writer", ["export", "save", "any"])
def test_files_have_the_mode_that_the_umask_grants(
    writer, mask, mode, tiny_llama, tiny_tokenizer, tmp_path
):
    report = Report({}, {}, {})
    before = os.umask(mask)
    try:
        if writer == "export":
            export(tiny_llama(), tiny_tokenizer(), tmp_path / "out", report, "<p>page</p>")
        elif writer == "save":
            grail.save(torch.nn.Linear(3, 2), tmp_path / "out", report)
        else:
            with complete(tmp_path / "out", ExportError) as folder:
                (folder / "deep").mkdir()
                for private in (folder / "one", folder / "deep" / "two"):
                    os.close(os.open(private, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    paths = list((tmp_path / "out").rglob("*"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in paths if path.is_file()}
    assert len(modes) >= 2
    assert set(modes.values()) == {mode}, modes
    folders = [tmp_path / "out", *(path for path in paths if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~mask}


def test_a_card_that_is_there_is_not_overwritten(tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama()
    save = type(model).save_pretrained

    def with_card(self, folder):
        save(self, folder)
        (folder / "README.md").write_text("mine")

    monkeypatch.setattr(type(model), "save_pretrained", with_card)
    folder = export(model, None, tmp_path / "out", Report({}, {}, {}))
    assert (folder / "README.md").read_text() == "mine"


def test_creates_missing_parents_and_fills_an_empty_folder(tiny_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new" / "deep" / "out", tmp_path / "empty"):
        export(tiny_llama(), None, output)
        assert (output / "config.json").is_file()


def test_leaves_random_state_and_training_mode(tiny_llama, tmp_path):
    model, state = tiny_llama().train(), torch.get_rng_state()
    export(model, None, tmp_path / "out")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["full folder", "file", "below a file"])
def test_refuses_an_output_in_use(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "full folder":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    else:
        output.write_text("mine")
        output = output if kind == "file" else output / "deeper"
    with pytest.raises(InputError, match=r"not empty|a file"):
        check_output(output)


def test_refuses_a_disk_that_is_too_small(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ExportError, match="MiB free"):
        check_output(tmp_path / "out", size=2 * free)


def test_too_little_disk_writes_nothing(tiny_llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="needs"):
        export(tiny_llama(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_model_that_reloads_differently(tiny_llama, tmp_path):
    model = tiny_llama()
    # The known trap: stock Llama drops a bias that only down_proj has.
    projection = model.model.layers[0].mlp.down_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))
    with pytest.raises(ExportError, match="largest difference"):
        export(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_model_whose_shapes_do_not_reload(tiny_llama, tmp_path):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight = torch.nn.Parameter(projection.weight[:40].clone())
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :40].clone())
    with pytest.raises(ExportError, match="does not load"):
        export(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(tiny_llama, tmp_path, monkeypatch, error):
    model = tiny_llama()
    save = type(model).save_pretrained

    def fail_after_saving(self, folder):
        save(self, folder)
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", fail_after_saving)
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_SLOW_EXPORT = """
import pathlib, sys, time
import grail
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
def wait(*_):
    print("written", flush=True)
    time.sleep(60)
pathlib.Path.rename = wait
grail.export(model, None, sys.argv[2])
"""


def test_a_killed_export_does_not_look_finished(tiny_folder, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-c", _SLOW_EXPORT, str(tiny_folder), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    leftovers = {path.name for path in tmp_path.iterdir()} - {tiny_folder.name}
    assert all(name.startswith(".out.") and name.endswith(".partial") for name in leftovers)


def test_everything_is_flushed_before_the_rename(tiny_llama, tmp_path, monkeypatch):
    flushed, at_rename = set(), {}
    rename = type(tmp_path).rename

    def note(handle):
        flushed.add(os.fstat(handle).st_ino)

    def check(self, target):
        at_rename.update({path.name: path.stat().st_ino for path in self.rglob("*")})
        assert set(at_rename.values()) <= flushed
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(type(tmp_path), "rename", check)
    export(tiny_llama(), None, tmp_path / "out")
    assert {"config.json", "model.safetensors"} <= set(at_rename)


def test_a_link_to_an_empty_folder_is_followed(tiny_llama, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(tiny_llama(), None, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path.resolve())
    with pytest.raises(InputError, match="mount point"):
        check_output(tmp_path)


def test_whatever_stops_the_writing_is_an_export_error(tiny_llama, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(folder):
        raise SafetensorError("No space left on device")

    model = tiny_llama()
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(ExportError, match="No space left"):
        export(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_frozen_parts_stay_in_their_mode(tiny_llama, tmp_path):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    export(model, None, tmp_path / "out")
    assert [module.training for module in model.modules()] == before
