"""Speeds are measured in turns, each in a process of its own, and ratios are of the same rounds."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
from importlib.util import find_spec
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from grail.errors import InputError, ModelError, OutOfMemoryError
from grail.serving import speed_engines, speed_files, speed_process, speed_worker
from grail.serving.speed import measure_speed, remarks
from grail.serving.speed_files import Measured, recognise
from tests.serving.test_speed_report import row

# Answers as a worker does, as the "GGUF" file says: seconds of a round, and what goes wrong.
ACTOR = """
import json, os, sys
load = json.loads(sys.stdin.readline())
told = json.loads(open(load["source"], "rb").read()[4:])
def say(what):
    with open(told["log"], "a") as log:
        print(os.path.basename(load["source"]), what, os.getpid(), file=log)
def answer(what):
    print(json.dumps(what), flush=True)
say("load")
if told.get("at_load"):
    answer(told["at_load"])
    sys.exit()
answer({"result": {"runtime": told.get("runtime", "llama.cpp 1"), "form": "F32"}})
for turn, line in enumerate(sys.stdin):
    batch = json.loads(line)["batch"]
    say(batch)
    if turn == told.get("dies"):
        print("ggml: error: no more", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    slower = 1 + turn / 10  # the machine
    wall = told["seconds"] * batch * (slower if turn >= told.get("warm", 0) else 1000)
    answer({"result": {"prefill": [wall, wall / 2], "decode": [3 * wall, wall / 2]}})
"""


@pytest.fixture
def actor(tmp_path, monkeypatch):
    """`actor(name, seconds=1, …)`: a file whose worker answers what is given here."""
    monkeypatch.setattr(speed_process, "program", lambda _: [sys.executable, "-c", ACTOR])
    monkeypatch.setattr(speed_files, "find_spec", lambda _: object())

    def make(name, seconds=1.0, **told):
        path = tmp_path / name
        told |= {"seconds": seconds, "log": str(tmp_path / "log")}
        path.write_bytes(b"GGUF" + json.dumps(told).encode())
        return path

    return make


def log(folder):
    """What the workers did: name of the file, and what."""
    return [tuple(line.split()[:2]) for line in (folder / "log").read_text().splitlines()]


def run(*files, **settings):
    settings = {"batches": [1], "rounds": 3, "progress": False, **settings}
    return measure_speed(files, **settings)


def test_rows_hold_the_times_of_the_rounds_and_their_ratios(actor):
    dense, small = actor("dense.gguf", 1.0, warm=2), actor("small.gguf", 0.5, warm=2)
    rows = run(small, against=dense, prompt=32, new=8, batches=[1, 4])
    names = [(row.file, row.batch, row.phase) for row in rows]
    assert names == [
        (str(file), batch, phase)
        for file in (dense, small)
        for batch in (1, 4)
        for phase in ("prefill", "decode")
    ]
    prefill = rows[0]
    assert prefill.wall == pytest.approx((1.2, 1.4, 1.6))  # and not the warming up
    assert prefill.cpu == pytest.approx((0.6, 0.7, 0.8))
    assert prefill.per_second == pytest.approx(32 / 1.4)
    assert prefill.spread == pytest.approx(0.2 / 1.4)
    assert rows[3].count == 4 * 8
    assert rows[3].per_second == pytest.approx(32 / (3 * 4 * 1.5))
    assert {row.against for row in rows} == {str(dense)}
    assert {row.bytes for row in rows[:4]} == {dense.stat().st_size}
    ratios = [(row.wall_ratio, row.cpu_ratio) for row in rows]
    assert ratios == [pytest.approx((1, 1))] * 4 + [pytest.approx((2, 2))] * 4
    assert rows[0].facts()["ratio"] == rows[0].cpu_ratio


def test_a_ratio_is_of_wall_time_where_several_threads_are_used():
    assert row(wall_ratio=2.0, cpu_ratio=3.0, threads=1).ratio == 3
    assert row(wall_ratio=2.0, cpu_ratio=3.0, threads=4).ratio == 2


def test_files_take_turns_and_every_other_round_runs_from_last_to_first(actor, tmp_path):
    files = [actor("a"), actor("b")]
    run(*files, rounds=2, batches=[1, 4])
    turns = [["a", "b"], ["b", "a"], ["a", "b"]]
    assert log(tmp_path) == [
        ("a", "load"),
        ("b", "load"),
        *((name, batch) for turn in turns for batch in "14" for name in turn),
    ]


def test_one_by_one_ends_with_a_file_before_the_next_is_loaded(actor, tmp_path):
    run(actor("a"), actor("b"), rounds=1, one_by_one=True)
    assert log(tmp_path) == [(name, what) for name in "ab" for what in ("load", "1", "1")]


@pytest.mark.parametrize(
    ("against", "names", "first"), [(None, "ab", "a"), ("b", "ab", "b"), ("c", "cab", "c")]
)
def test_the_file_to_compare_with_is_measured_once(actor, tmp_path, against, names, first):
    files = {name: actor(name) for name in "abc"}
    rows = run(files["a"], files["b"], rounds=1, against=against and files[against])
    found = dict.fromkeys(row.file for row in rows)
    assert list(found) == [str(files[name]) for name in names]
    assert {row.against for row in rows} == {str(files[first])}


def test_the_same_file_twice_is_two_rows(actor):
    file = actor("a")
    assert len(run(file, file, rounds=1)) == 4


def alive(folder):
    pids = {int(line.split()[2]) for line in (folder / "log").read_text().splitlines()}
    found = set()
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        found.add(pid)
    return found


def test_a_runtime_that_dies_ends_the_measurement_and_all_workers(actor, tmp_path):
    files = [actor("a"), actor("b", dies=1)]
    message = r"llama.cpp ended \(SIGKILL\) while it runs a batch of 1 of .*b; it says: "
    with pytest.raises(ModelError, match=message + "ggml: error: no more$"):
        run(*files)
    assert alive(tmp_path) == set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"failed": "no such op"}, r"llama.cpp does not run .*a; it says: no such op$"),
        ({"failed": ""}, r"llama.cpp does not run .*a; it says: nothing$"),
        ({"refused": "a is of no use"}, "^a is of no use$"),
    ],
)
def test_what_a_worker_answers_instead_of_a_result_is_said(actor, tmp_path, answer, message):
    with pytest.raises(ModelError, match=message):
        run(actor("b"), actor("a", at_load=answer))
    assert alive(tmp_path) == set()


def test_ctrl_c_ends_all_workers(actor, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed_process.Worker, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(actor("a"), actor("b"))
    assert len(log(tmp_path)) == 2
    assert alive(tmp_path) == set()


def test_progress_says_what_is_measured(actor, capsys):
    run(actor("a"), rounds=2, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    for part in ("loading a", "warming up, batch 1, a", "round 2/2, batch 1, a", "4/4"):
        assert part in said.err


def test_remarks_name_several_runtimes_and_a_busy_machine():
    quiet = row(wall=(1.0, 1.1), cpu=(1.0, 1.05))
    assert remarks([quiet, quiet]) == []
    busy, other = (
        row(wall=(3.0, 3.0), cpu=(1.5, 1.5)),
        row(runtime="transformers 5", cpu=(1.0, 1.25, 1.5)),
    )
    (said,) = remarks([quiet, busy])
    assert "wall time up to 2.00 times the CPU time" in said
    (said,) = remarks([quiet, other])
    assert "the runtimes differ (llama-cpp-python 1, transformers 5)" in said
    assert remarks([row(wall=(1.0, 1.0), cpu=(4.0, 4.0), threads=4)]) == []


# Files.


def test_a_file_is_known_by_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_files, "find_spec", lambda _: object())
    (tmp_path / "sha256-abc").write_bytes(b"GGUF....")  # as Ollama names it
    (tmp_path / "net.onnx").write_bytes(b"1234")
    (tmp_path / "net.onnx.data").write_bytes(b"123456")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"12")
    for number in (1, 2):
        (tmp_path / f"x-0000{number}-of-00002.gguf").write_bytes(b"GGUF" * number)
    names = ("sha256-abc", "net.onnx", "out", "x-00001-of-00002.gguf")
    found = [recognise(str(tmp_path / name)) for name in names]
    assert [file.kind for file in found] == ["gguf", "onnx", "transformers", "gguf"]
    assert [file.bytes for file in found] == [8, 10, 2, 12]
    assert found[0].where == str(tmp_path / "sha256-abc")
    hub = recognise("owner/model-that-is-nowhere")
    assert (hub.kind, hub.bytes, hub.where) == ("transformers", 0, "owner/model-that-is-nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such file or folder; models of the hub are named"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b.onnx", "no such file or folder"),
        ("empty/out", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("", "no such file or folder|has no config.json"),
        ("text.gguf", "text.gguf is not a GGUF file: it does not begin with GGUF"),
        ("text.txt", "text.txt is of no kind whose speed is measured; give a transformers folder"),
        ("empty", "empty is not a model: the folder has no config.json"),
    ],
)
def test_what_is_no_model_is_refused_before_a_worker_starts(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for file in ("text.gguf", "text.txt"):
        (tmp_path / file).write_text("hello")
    with monkeypatch.context() as offline:
        offline.setattr(socket, "getaddrinfo", asked := Mock(side_effect=OSError("offline")))
        with pytest.raises(InputError, match=message):
            run(name)
    asked.assert_not_called()  # the hub least of all


@pytest.mark.parametrize(
    ("name", "install"),
    [("a.gguf", "pip install llama-cpp-python"), ("a.onnx", "pip install onnxruntime")],
)
def test_a_runtime_that_is_not_installed_is_named(tmp_path, monkeypatch, name, install):
    monkeypatch.setattr(speed_files, "find_spec", lambda _: None)
    (tmp_path / name).write_bytes(b"GGUF" if "gguf" in name else b"")
    with pytest.raises(ModelError, match=rf"{name} needs .* is not installed: {install}"):
        run(tmp_path / name)


def test_language_models_and_vision_networks_are_measured_apart(actor, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"net.onnx is measured as a vision network, and .*a is"):
        run(actor("a"), tmp_path / "net.onnx")


def test_models_beyond_the_free_memory_are_refused(actor, monkeypatch):
    files = [actor("a"), actor("b")]
    monkeypatch.setattr(speed_files, "available", lambda: 500 << 20)
    with pytest.raises(OutOfMemoryError, match=r"2 models together need about 839 MB .*one-by-one"):
        run(*files)
    assert len(run(*files, one_by_one=True)) == 4
    monkeypatch.setattr(speed_files, "available", lambda: 300 << 20)
    with pytest.raises(OutOfMemoryError, match="the largest of the models needs about 419 MB"):
        run(*files, one_by_one=True)
    monkeypatch.setattr(speed_files, "available", lambda: None)  # of another system
    assert len(run(*files)) == 4


# What a worker does.


@pytest.fixture
def threads(monkeypatch):
    """The thread counts that engines ask torch for; it keeps its own."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    return asked


WORK = {"prompt": 7, "new": 4, "threads": 1}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_transformers_reads_the_prompt_and_then_token_by_token(
    tiny_model, tiny_tokenizer, tmp_path, threads, family
):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = speed_engines.Transformers(str(tmp_path), **WORK)
    assert threads == [1]
    assert engine.form == "float32"
    times = engine.measure(3)
    assert list(times) == ["prefill", "decode"]
    assert all(wall > 0 and cpu > 0 for wall, cpu in times.values())
    tokens = torch.from_numpy(speed_engines.tokens_of(97, 3, 11))
    with torch.inference_mode():
        expected = model(tokens).logits[:, -1:]
    assert engine.logits.shape == (3, 1, 97)
    torch.testing.assert_close(engine.logits, expected, atol=2e-5, rtol=1e-4)


def test_sequences_beyond_the_model_s_positions_are_refused(tiny_folder, threads):
    with pytest.raises(speed_engines.Refused, match=r"at most 128 tokens, and .* are 129; lower"):
        speed_engines.Transformers(str(tiny_folder), prompt=120, new=9, threads=1)


def test_a_model_without_keys_and_values_is_refused(tiny_folder, threads, monkeypatch):
    engine = speed_engines.Transformers(str(tiny_folder), **WORK)
    whole = engine._model.forward

    def forward(tokens, use_cache, **options):
        return whole(tokens, use_cache=False, **options)

    monkeypatch.setattr(engine._model, "forward", forward)
    with pytest.raises(speed_engines.Refused, match="keeps no keys and values, so that it has no"):
        engine.measure(1)


def test_a_worker_answers_line_by_line(monkeypatch):
    class Engine:
        runtime, form = "runtime 1", "F32"

        def __init__(self, source, **work):
            if source == "bad":
                raise ValueError("no\n  such op")
            if source == "explained":
                raise speed_engines.Explained
            if source == "ours":
                raise InputError("ours is of no use")

        def measure(self, batch):
            if batch > 4:
                raise speed_engines.Refused("too many")
            return {"prefill": (1.0, 0.5)}

    monkeypatch.setattr(speed_worker, "ENGINES", {"kind": Engine})
    monkeypatch.setattr(speed_worker.gc, "disable", lambda: None)

    def answers(source, *batches):
        lines = [{"kind": "kind", "source": source}, *({"batch": batch} for batch in batches)]
        said = io.StringIO()
        speed_worker.serve(io.StringIO("\n".join(map(json.dumps, lines)) + "\n"), said)
        return [json.loads(line) for line in said.getvalue().splitlines()]

    loaded = {"result": {"runtime": "runtime 1", "form": "F32"}}
    times = {"result": {"prefill": [1.0, 0.5]}}
    assert answers("good", 1, 4) == [loaded, times, times]
    assert answers("good", 1, 8, 1) == [loaded, times, {"refused": "too many"}]
    assert answers("bad", 1) == [{"failed": "no such op"}]
    assert answers("explained") == [{"failed": ""}]
    assert answers("ours") == [{"refused": "ours is of no use"}]


def test_times_are_of_the_clock_and_of_the_processor():
    wall, cpu = speed_engines.timed(lambda: time.sleep(0.05))
    assert wall >= 0.05
    assert cpu < 0.04


@pytest.mark.parametrize(
    ("description", "form"),
    [
        ("deci ?B all F32", "F32"),
        ("llama 135M Q4_K - Medium", "Q4_K_M"),
        ("llama 135M IQ2_XXS - 2.0625 bpw", "IQ2_XXS - 2.0625 bpw"),
    ],
)
def test_the_quantisation_is_named_as_files_are(description, form):
    assert speed_engines._quantisation(description) == form


def test_a_real_worker_measures_a_folder(tiny_folder):
    rows = run(tiny_folder, prompt=6, new=3, batches=[2], rounds=2)
    assert [(row.phase, row.count) for row in rows] == [("prefill", 12), ("decode", 6)]
    for found in rows:
        assert found.runtime.startswith("transformers ")
        assert found.form == "float32"
        assert found.bytes == (tiny_folder / "model.safetensors").stat().st_size
        assert min(found.wall + found.cpu) > 0
        assert found.ratio == 1


# In llama.cpp and ONNX Runtime, where they are installed.

llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
onnxruntime = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="needs onnxruntime, onnx"
)


@pytest.fixture
def gguf(tiny_llama, tiny_batches, tmp_path):
    """A GGUF file with blocks of different widths."""
    files = pytest.importorskip("tests.serving.gguf_files")
    from grail.serving.gguf_writing import export_gguf

    like = files.dense_file(tiny_llama(), tmp_path / "keys.gguf")
    keep = {"mlp": [0.9, 0.4]}
    folder = files.compressed(tiny_llama(), tiny_batches(), tmp_path / "out", keep=keep)
    return export_gguf(folder, tmp_path / "small.gguf", like, verify=False).path


@llama_cpp
def test_llama_cpp_reads_the_prompt_and_then_token_by_token(gguf):
    from tests.serving.gguf_files import logits

    engine = speed_engines.LlamaCpp(str(gguf), **WORK)
    assert engine.form == "F32"
    for _ in range(2):  # the second forgets the first
        times = engine.measure(3)
    assert all(wall > 0 and cpu > 0 for wall, cpu in times.values())
    found = engine._contexts[3].logits()
    tokens = torch.from_numpy(speed_engines.tokens_of(97, 3, 11))
    expected = np.stack([logits(gguf, sequence)[-1] for sequence in tokens])
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()  # 16-bit keys and values


@llama_cpp
def test_folder_and_file_are_measured_beside_one_another(gguf, tmp_path):
    rows = run(gguf, against=tmp_path / "out", prompt=8, new=4, rounds=1, batches=[1, 8])
    assert [row.runtime.split()[0] for row in rows] == ["transformers"] * 4 + [
        "llama-cpp-python"
    ] * 4
    assert len(remarks(rows)) >= 1


@llama_cpp
def test_llama_cpp_explains_what_it_does_not_load(gguf):
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"does not run .*small.gguf; it says: .*error loading"):
        run(gguf)
    gguf.write_bytes(whole)
    with pytest.raises(ModelError, match=r"small.gguf reads sequences of at most 128 tokens"):
        run(gguf, prompt=128, new=1)


def vision(path, batch=None, kind=1, size=3):
    """Writes a network that multiplies images [batch, 3] by a matrix of ones."""
    from onnx import helper, numpy_helper, save

    given = helper.make_tensor_value_info("x", kind, [batch or "n", size])
    result = helper.make_tensor_value_info("y", kind, [batch or "n", 2])
    ones = numpy_helper.from_array(np.ones((3, 2), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [given], [result], [ones]
    )
    opset = helper.make_opsetid("", 17)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@onnxruntime
def test_images_per_second_of_an_onnx_file(tmp_path):
    rows = run(vision(tmp_path / "a.onnx"), vision(tmp_path / "b.onnx"), batches=[1, 4], rounds=1)
    assert [(row.phase, row.count, row.form) for row in rows] == [
        ("forward", 10, "float32"),
        ("forward", 40, "float32"),
    ] * 2


@onnxruntime
def test_other_onnx_files_are_refused(tmp_path):
    fixed = vision(tmp_path / "fixed.onnx", batch=2)
    with pytest.raises(ModelError, match="takes batches of 2, not of 1; give --batch 2"):
        run(fixed)
    assert len(run(fixed, batches=[2], rounds=1)) == 1
    with pytest.raises(ModelError, match=r"takes x tensor\(float\) \['n', 'm'\]; the speed of"):
        run(vision(tmp_path / "open.onnx", size="m"))
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"ONNX Runtime does not run .*damaged.onnx; it says: "):
        run(tmp_path / "damaged.onnx")


def test_the_name_that_another_process_finds(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Measured("out", "transformers").where == str(tmp_path / "out")
    assert Measured("out", "transformers").label == "out"
