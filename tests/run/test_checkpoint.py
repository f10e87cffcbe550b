"""A run that is killed and started again ends with the bits of one that was not."""

import copy
import csv
import fcntl
import html
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict

import pytest
import torch

import grail
from grail.errors import InputError, StateError
from grail.report.page import page
from grail.report.report import Report
from grail.report.summary import resumed_sentence
from grail.run import checkpoint, resume_folder
from grail.runtime import state
from grail.select import greedy
from tests import processes
from tests.convnets import images, network
from tests.counting import injected
from tests.kills import Killed, killing


@pytest.fixture
def kill(monkeypatch):
    """`kill(after)`: the next run ends once it has saved so many blocks; None lets it end well."""
    return killing(checkpoint.Checkpoint, "save", monkeypatch)


def compressed(model, batches, **settings):
    """A compressed copy of a model, and the rows of its report."""
    model = copy.deepcopy(model)
    report = grail.compress(model, batches, progress=False, **settings)
    return model, report


def bits(model):
    """Everything that a run may change."""
    numbers = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (int, bool)
    }
    config = getattr(model, "config", None)
    own = {
        name: module.config.to_dict()
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    return numbers, config and config.to_dict(), own, model.state_dict()


def assert_same(one, other):
    (model, report), (expected_model, expected) = one, other
    *found, tensors = bits(model)
    *wanted, expected_tensors = bits(expected_model)
    assert found == wanted
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected_tensors[name].dtype
        assert torch.equal(tensor, expected_tensors[name]), name
    for rows, expected_rows in ((report.sites, expected.sites), (report.inputs, expected.inputs)):
        assert [asdict(row) for row in rows] == [asdict(row) for row in expected_rows]


CASES = {
    "llama": ("llama", {"sites": "mlp,heads"}),
    "open loop": ("llama", {"closed_loop": False, "drift_correction": 0}),
    "biases": ("llama", {"fit_bias": True}),
    "folding": ("llama", {"selector": "folding"}),
    "attention": ("llama", {"correct_attention": True}),
    "producers": ("llama", {"refit_producers": 2}),
    "conv1d": ("gpt2", {"sites": "mlp,heads"}),
    "a configuration of its own": ("phi3", {"sites": "heads", "keep": {"heads": [0.5, 0.7, 0.5]}}),
    "one width for each block": ("llama", {"keep": {"mlp": [0.5, 0.8, 0.5]}}),
    "a dense first block": (
        "llama",
        {"keep": {"mlp": [1.0, 0.5, 0.5], "heads": 1.0}, "sites": "mlp,heads"},
    ),
    "a share of the dense stream": ("llama", {"dense_share": 0.5}),
    "experts": ("qwen3_moe", {"sites": "experts,heads"}),
}


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("after", [1, 3], ids=["early", "at the end"])
def test_a_resumed_run_ends_with_the_same_bits(
    family, settings, after, kill, tiny_model, tiny_batches, tmp_path
):
    settings = {"keep": 0.5, **settings}
    model, batches = tiny_model(family, num_hidden_layers=3), tiny_batches(count=5)
    expected = compressed(model, batches, **settings)
    kill(after)
    with pytest.raises(Killed):
        compressed(model, batches, resume_dir=tmp_path / "d", **settings)
    kill(None)
    assert_same(compressed(model, batches, resume_dir=tmp_path / "d", **settings), expected)


def test_hidden_states_keep_their_strides(kill, tmp_path):
    # Channels last: convolutions then take other paths, and other roundings.
    settings = {"keep": 0.5, "repair": True, "resume_dir": tmp_path / "d"}
    model = network("torchvision-basic").to(memory_format=torch.channels_last)
    batches = [batch.to(memory_format=torch.channels_last) for batch in images()]
    expected = compressed(model, batches, **{**settings, "resume_dir": None})
    kill(2)
    with pytest.raises(Killed):
        compressed(model, batches, **settings)
    kill(None)
    assert_same(compressed(model, batches, **settings), expected)


@pytest.fixture
def killed(kill, tiny_llama, tiny_batches, tmp_path):
    """A run of three blocks that ended after two: `killed(**changes)` starts it again."""
    folder, model, batches = tmp_path / "d", tiny_llama(num_hidden_layers=3), tiny_batches(count=5)
    settings = {"model": model, "batches": batches, "keep": 0.5, "resume_dir": folder}
    kill(2)
    with pytest.raises(Killed):
        compressed(**settings)
    kill(None)
    return lambda **changes: compressed(**{**settings, **changes})


@pytest.fixture
def expected(killed):
    """What a run that is not resumed ends with."""
    return killed(resume_dir=None)


def forbid_blocks(monkeypatch):
    """Lets no block of a run pass; before the run one is rehearsed, on another state."""
    monkeypatch.setattr("grail.run.peak_memory.predict", lambda *_, **__: None)
    monkeypatch.setattr("grail.run.block.BlockCompressor.compress", None)


def test_a_run_that_ended_gives_its_result_again(killed, expected, monkeypatch):
    killed()
    forbid_blocks(monkeypatch)
    assert_same(killed(), expected)


def test_seconds_of_both_runs_are_counted(killed, tmp_path):
    before = state.read(tmp_path / "d/position-0002.state", "position").content["seconds"]
    _, report = killed()
    assert all(report.seconds[phase] > seconds for phase, seconds in before.items())


def changed(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model, batches: {"model": changed(model)}, "the model's weights differs"),
        (lambda model, batches: {"batches": batches[::-1]}, "calibration differs"),
        (lambda model, batches: {"batches": batches[:-1]}, "calibration differs"),
        (lambda model, batches: {"keep": 0.7}, "keep was 0.5 and is 0.7"),
        (lambda model, batches: {"alpha": 0.1}, "alpha was 'auto' and is 0.1"),
        (lambda model, batches: {"selector": lambda view: None}, "given by its name"),
    ],
    ids=["model", "order", "batches", "keep", "alpha", "selector"],
)
def test_another_run_is_refused_by_what_differs(
    change, said, killed, tiny_llama, tiny_batches, tmp_path
):
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=5)
    with pytest.raises(InputError, match=said):
        killed(**change(model, batches))
    assert {path: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before


def damage(path):
    """Flips the last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["position-0002.state", "block-0001.state"])
def test_a_damaged_file_costs_one_block_and_the_report_says_so(name, killed, expected, tmp_path):
    damage(tmp_path / "d" / name)
    model, report = killed()
    assert_same((model, report), expected)
    (note,) = (note for note in report.notes if name in note)
    assert "is damaged" in note
    assert "went on from block 1" in note


def test_without_a_whole_file_the_run_is_refused_and_the_model_left_alone(
    killed, tiny_llama, tiny_batches, tmp_path
):
    damage(tmp_path / "d/block-0000.state")
    model = tiny_llama(num_hidden_layers=3)
    before = copy.deepcopy(model)
    with pytest.raises(StateError, match=r"block-0000\.state is damaged.*delete"):
        grail.compress(model, tiny_batches(count=5), 0.5, progress=False, resume_dir=tmp_path / "d")
    assert bits(model)[:-1] == bits(before)[:-1]
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


def test_a_file_that_was_never_finished_is_removed(killed, expected, tmp_path):
    unfinished = tmp_path / "d/.position-0003.state.0a1b2c3d.partial"
    unfinished.write_bytes(b"half")
    assert_same(killed(), expected)
    assert not unfinished.exists()


def test_two_runs_cannot_use_a_folder_at_once(killed, tmp_path):
    with (tmp_path / "d/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another run"):
            killed()


def test_too_little_disk_is_refused_before_the_first_block(killed, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 10))
    forbid_blocks(monkeypatch)
    with pytest.raises(StateError, match="free some space"):
        killed()


def test_a_resume_on_other_surroundings_is_noted(killed, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    _, report = killed()
    assert any("the number of threads is 77" in note for note in report.notes)


def test_a_resumed_run_says_so_with_the_time_of_all_runs(killed):
    _, whole = killed(resume_dir=None)
    assert whole.resumed == {}
    assert resumed_sentence(whole) == ""
    _, report = killed()
    assert report.resumed.keys() == {"after", "of", "seconds"}
    assert 0 < report.resumed["after"] <= report.resumed["of"] == 3
    assert 0 < report.resumed["seconds"] < report.seconds["total"]
    said = resumed_sentence(report)
    assert said.startswith(f"Resumed after block {report.resumed['after']} of 3: ")
    assert said in html.unescape(page(report))
    assert Report.from_json(report.to_json()).resumed == report.resumed


def test_two_generations_are_kept_and_clear_removes_them_all(killed, tmp_path):
    killed()
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    blocks = [f"block-{number:04}.state" for number in range(3)]
    assert names == [*blocks, "lock", "position-0002.state", "position-0003.state"]
    (tmp_path / "d/mine.txt").touch()
    resume_folder.clear(tmp_path / "d")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mine.txt"]


def _one_dies(number, batches, options):
    save = checkpoint.Checkpoint.save

    def saving(self, position, streams):
        if number == 1 and position.done == 2:
            os._exit(1)
        save(self, position, streams)

    checkpoint.Checkpoint.save = saving
    processes.compressed(number, "llama", batches, options)


def test_processes_that_were_killed_apart_go_on_together(tiny_batches, tmp_path):
    batches = tiny_batches(count=5)
    options = {"keep": 0.5, "resume_dir": tmp_path / "d"}
    expected = processes.run(2, processes.compressed, "llama", batches, {"keep": 0.5})
    processes.run(2, _one_dies, batches, options)
    found = [sorted(path.name for path in folder.glob("position*")) for folder in folders(tmp_path)]
    assert found == [["position-0001.state", "position-0002.state"], ["position-0001.state"]]
    resumed = processes.run(2, processes.compressed, "llama", batches, options)
    for one, other in zip(resumed, expected, strict=True):
        assert one["rows"] == other["rows"]
        assert all(map(torch.equal, one["weights"].values(), other["weights"].values()))
    resume_folder.clear(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def folders(tmp_path):
    return [tmp_path / f"d/process-{number}-of-2" for number in range(2)]


def test_the_command_line_survives_kills_at_random_moments(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "bench.reliability.killing", "--trials", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads do not survive a fork
    subprocess.run([*command, "--output", tmp_path / "killing.csv"], check=True, env=environment)
    rows = list(csv.DictReader((tmp_path / "killing.csv").open()))
    assert [row["bitwise equal"] for row in rows] == ["yes"] * 4
    deaths = sum(int(row["deaths"]) for row in rows)
    assert deaths > 0
    injected("killed runs", deaths)


@pytest.fixture
def command(tiny_folder, tmp_path):
    """`command(*more)`: a compression on the command line that keeps its state in tmp_path/d."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail import commands

    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + n % 90}" for n in range(400)))
    fixed = ["compress", tiny_folder, "--calibration", tmp_path / "text.txt", "--tokens", 64]
    fixed += ["--sequence-length", 16, "--output", tmp_path / "out", "--json"]
    fixed += ["--resume-dir", tmp_path / "d"]
    return lambda *more: CliRunner().invoke(commands.app, [str(part) for part in (*fixed, *more)])


def test_a_command_that_was_killed_once_its_output_was_there_is_done(
    command, monkeypatch, tmp_path
):
    def die(_):
        injected("killed runs")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume_folder, "clear", die)
        with pytest.raises(Killed):
            command()
    assert command("--keep", "0.6").exit_code == 2
    again = command()
    assert (again.exit_code, again.stdout) == (0, (tmp_path / "out/report.json").read_text())
    assert not (tmp_path / "d").exists()


def test_a_command_that_was_killed_behind_its_measuring_does_not_measure_again(
    command, kill, monkeypatch, tmp_path
):
    uneven = ("--uneven", "--batch-size", "1", "--multiple", "1")
    result = command(*uneven)
    assert result.exit_code == 0, result.output
    expected = (tmp_path / "out/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    kill(1)
    with pytest.raises(Killed):
        command(*uneven)
    kill(None)
    monkeypatch.setattr(greedy, "errors", None)
    assert command(*uneven).exit_code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected
    assert not (tmp_path / "d").exists()
