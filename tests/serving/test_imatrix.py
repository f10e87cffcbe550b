"""An importance matrix holds the squares that llama.cpp's graph of the file would read."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

import grail
from grail.errors import InputError, ModelError, NonFiniteError
from grail.files.load import load_model
from grail.files.provenance import text_source
from grail.serving import imatrix
from grail.serving.calibration import read_calibration, text_of_folder
from tests.commands.test_cli import grail as run
from tests.commands.test_cli import refusal

gguf = pytest.importorskip("gguf")
files = pytest.importorskip("tests.serving.gguf_files")

BLOCKS = {"mlp": [0.9, 0.4], "heads": [1.0, 2 / 3]}
WORDS = " ".join(f"w{3 + index * index % 90}" for index in range(400))
FEW = {"tokens": 128, "sequence_length": 16}
QUANTISE = shutil.which("llama-quantize")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture
def make(tiny_model, tiny_batches, tmp_path):
    """Writes a compressed folder."""

    def made(family="llama", keep=None, **config):
        keep = {"mlp": 0.5} if keep is None else keep
        settings = {"keep": keep, "sites": tuple(keep)}
        model = tiny_model(family, **config)
        return files.compressed(model, tiny_batches(), tmp_path / "out", **settings)

    return made


def calibrated(folder, text, **reading):
    """Writes into a folder's report where its calibration comes from, as the command does."""
    batches = grail.Text(str(text), **{**FEW, **reading}).batches(*load_model(folder))
    path = folder / "report.json"
    report = json.loads(path.read_text())
    report["provenance"] = {"calibration": text_source(str(text), batches) | reading}
    report["calibration"]["sequence_length"] = 16
    path.write_text(json.dumps(report))
    return batches


def read(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def reads(network, batches):
    """Returns the sums of squares of what each linear layer reads, in fp64."""
    found = {}

    def add(name, x):
        found[name] = found.get(name, 0) + x.square().sum((0, 1)).numpy()

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
    with torch.inference_mode():
        for batch in batches:
            network.double()(batch)
    return found


PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED = {"attn_qkv": "self_attn.v_proj"} | dict(list(PARTS.items())[3:])


@pytest.mark.parametrize(
    ("family", "keep", "config", "parts"),
    [
        ("llama", {"mlp": 0.5}, {}, PARTS),
        ("llama", BLOCKS, {"mlp_bias": True}, PARTS),
        ("mistral", BLOCKS, {}, PARTS),
        ("qwen3", BLOCKS, {"tie_word_embeddings": True}, FUSED),
    ],
)
def test_holds_the_squares_of_what_each_matrix_reads(
    make, text, tmp_path, family, keep, config, parts
):
    folder = make(family, keep, **config)
    batches = calibrated(folder, text)
    file = grail.export_imatrix(folder, tmp_path / "a.gguf", progress=False)
    found = read(file.path)
    network, _ = load_model(folder)
    widths = [layer.mlp.down_proj.in_features for layer in network.model.layers]
    own = reads(network, batches)
    assert (file.matrices, file.tokens) == (2 * len(parts), 128)
    assert found.keys() == {
        f"blk.{block}.{name}.weight.{kind}"
        for block in range(2)
        for name in parts
        for kind in ("in_sum2", "counts")
    }
    for block in range(2):
        for name, layer in parts.items():
            sums = found[f"blk.{block}.{name}.weight.in_sum2"]
            expected = own[f"model.layers.{block}.{layer}"]
            np.testing.assert_allclose(sums[: len(expected)], expected, rtol=1e-4)
            assert found[f"blk.{block}.{name}.weight.counts"].tolist() == [128]
            assert sums.dtype == np.float32
        down = found[f"blk.{block}.ffn_down.weight.in_sum2"]
        assert len(down) == -(-widths[block] // 32) * 32
        assert not down[widths[block] :].any()


def test_keys_are_those_of_llama_cpp(make, text, tmp_path):
    folder = make()
    calibrated(folder, text)
    file = grail.export_imatrix(folder, tmp_path / "a.gguf", progress=False)
    keys = {name: value for name, value in files.keys(file.path).items() if "GGUF." not in name}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(text)],
        "imatrix.chunk_count": 8,
        "imatrix.chunk_size": 16,
    }
    assert file.bytes == file.path.stat().st_size


def test_the_sums_fit_the_file_of_the_same_padding(make, tiny_model, text, tmp_path):
    folder = make(keep=BLOCKS)
    like = files.dense_file(tiny_model("llama"), tmp_path / "dense.gguf")
    small = grail.export_gguf(folder, tmp_path / "small.gguf", like, pad=256, verify=False)
    words = grail.Text(str(text), **FEW)
    file = grail.export_imatrix(folder, tmp_path / "a.gguf", words, pad=256, progress=False)
    weights, sums = files.tensors(small.path), read(file.path)
    named = {name.removesuffix(".in_sum2") for name in sums if name.endswith(".in_sum2")}
    matrices = {name for name, values in weights.items() if values.ndim == 2}
    assert named == {name for name in matrices if name.startswith("blk.")}
    for name in named:
        assert sums[f"{name}.in_sum2"].shape == (weights[name].shape[1],)


@pytest.mark.skipif(QUANTISE is None, reason="needs llama-quantize of llama.cpp on the PATH")
def test_llama_quantize_takes_it(make, tiny_model, text, tmp_path):
    folder = make(keep=BLOCKS, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    like = files.dense_file(
        tiny_model("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4),
        tmp_path / "dense.gguf",
    )
    grail.export_gguf(folder, tmp_path / "small.gguf", like, verify=False)
    words = grail.Text(str(text), **FEW)
    grail.export_imatrix(folder, tmp_path / "a.gguf", words, progress=False)
    results = []
    for options in ([], ["--imatrix", "a.gguf"]):
        command = [QUANTISE, *options, "small.gguf", "q.gguf", "Q4_0"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(files.tensors(tmp_path / "q.gguf"))
    assert "loaded 14 importance matrix entries" in done.stdout + done.stderr
    assert "did not find weights for blk" not in done.stdout + done.stderr
    error, weighted = (weighted_error(result, tmp_path) for result in results)
    assert weighted < error


@pytest.mark.skipif(QUANTISE is None, reason="needs llama-quantize of llama.cpp on the PATH")
def test_channels_that_were_added_compute_nothing_in_k_quants(make, tiny_model, text, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = make(keep={"mlp": [0.9, 0.1]}, **sizes)
    like = files.dense_file(tiny_model("llama", **sizes), tmp_path / "dense.gguf")
    grail.export_gguf(folder, tmp_path / "small.gguf", like, pad=256, verify=False)
    words = grail.Text(str(text), **FEW)
    grail.export_imatrix(folder, tmp_path / "a.gguf", words, pad=256, progress=False)
    for kind in ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_S"):
        command = [QUANTISE, "--imatrix", "a.gguf", "small.gguf", f"{kind}.gguf", kind]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found = files.tensors(tmp_path / f"{kind}.gguf")
        assert found["blk.1.ffn_down.weight"].shape[1] == 256
        assert np.isfinite(found["blk.1.ffn_down.weight"]).all()
        # What the second matrix makes of an input of zero does not matter: it rounds a block whose
        # inputs have no importance to anything.
        assert not found["blk.1.ffn_gate.weight"][64:].any()
        assert not found["blk.1.ffn_up.weight"][64:].any()


def weighted_error(quantised, folder):
    """Returns the error that the importance matrix weighs, over all matrices of the blocks."""
    exact, sums = files.tensors(folder / "small.gguf"), read(folder / "a.gguf")
    return sum(
        float((((exact[name] - quantised[name]) ** 2) @ sums[f"{name}.in_sum2"]).sum())
        for name in exact
        if f"{name}.in_sum2" in sums
    )


@pytest.mark.parametrize("reading", [{}, {"seed": 3}])
def test_the_text_is_the_one_of_the_report(make, text, reading):
    folder = make()
    batches = calibrated(folder, text, **reading)
    found, origin = read_calibration(folder, None, *load_model(folder))
    assert torch.equal(torch.cat(found), torch.cat(batches))
    assert origin["tokens"] == 128
    assert origin["source"] == str(text)
    assert reading.items() <= origin.items()


def test_texts_of_the_report_are_mixed_as_in_the_run(make, text, tmp_path):
    folder, short = make(), tmp_path / "short.txt"
    short.write_text("w5 w6 w7 w8 " * 20)
    how = {"tokens": 480, "sequence_length": 16, "seed": 2}
    mixture = grail.Mixture([grail.Text(str(text), join="blank"), str(short)], [0.4, 0.6], **how)
    with pytest.warns(UserWarning, match=r"short\.txt holds 80 tokens"):
        batches, origin = mixture.read(*load_model(folder))
    report = json.loads((folder / "report.json").read_text())
    report["provenance"] = {"calibration": origin}
    report["calibration"]["sequence_length"] = 16
    (folder / "report.json").write_text(json.dumps(report))
    found, again = read_calibration(folder, None, *load_model(folder))
    assert torch.equal(torch.cat(found), torch.cat(batches))
    assert again == origin
    given = grail.Mixture([text, short], tokens=96, sequence_length=16)
    assert read_calibration(folder, given, *load_model(folder))[1]["tokens"] == 96
    short.write_text("w5")
    with pytest.raises(InputError, match=r"calibrated on .*short\.txt, which changed since"):
        text_of_folder(folder)


def test_a_text_that_is_given_is_read_instead(make, text, tmp_path):
    folder = make()
    calibrated(folder, text)
    other = tmp_path / "other.txt"
    other.write_text("w5 w6 w7 w8 " * 50)
    found, origin = read_calibration(folder, grail.Text(str(other), **FEW), *load_model(folder))
    assert origin["source"] == str(other)
    assert found[0][0, :4].tolist() == [5, 6, 7, 8]
    assert text_of_folder(folder, str(other)).source == str(other)


def damaged(folder, text, case):
    path = folder / "report.json"
    report = json.loads(path.read_text())
    if case == "gone":
        text.unlink()
    elif case == "changed":
        text.write_text(WORDS + " w3")
    elif case == "other tokens":
        report["provenance"]["calibration"]["tokens_sha256"] = "0"
    elif case == "statistics":
        report["provenance"]["calibration"]["collected"] = []
    elif case == "no text":
        del report["provenance"]
    path.write_text("{" if case == "no report" else json.dumps(report))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gone", "was calibrated on .*words.txt, which is not there from here; give a text"),
        ("changed", "was calibrated on .*words.txt, which changed since; give a text"),
        ("other tokens", "words.txt gives other tokens than it gave when"),
        ("statistics", "was made from statistics in .*words.txt, which hold no text"),
        ("no text", "the report of .*out names no calibration text; give one as calibration"),
        ("no report", "names no calibration text"),
    ],
)
def test_without_the_text_of_the_run_one_must_be_given(make, text, tmp_path, case, message):
    folder, own = make(), tmp_path / "words.txt"
    shutil.copy(text, own)
    calibrated(folder, own)
    damaged(folder, own, case)
    with pytest.raises(InputError, match=message):
        grail.export_imatrix(folder, tmp_path / "a.gguf", progress=False)
    assert not (tmp_path / "a.gguf").exists()
    grail.export_imatrix(folder, tmp_path / "a.gguf", grail.Text(str(text), **FEW), progress=False)


def test_what_cannot_be_written_is_refused(make, text, tmp_path):
    folder = make("gemma")
    calibrated(folder, text)
    with pytest.raises(ModelError, match="no GGUF is written for models of type gemma"):
        grail.export_imatrix(folder, tmp_path / "a.gguf", progress=False)
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(InputError, match=r"b.gguf exists already; name a new file"):
        grail.export_imatrix(folder, tmp_path / "b.gguf", progress=False)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        grail.export_imatrix(tmp_path / "nowhere", tmp_path / "a.gguf", progress=False)


def test_infinite_activations_are_refused(make, text, tmp_path):
    folder = make()
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[4] = 1e25
    folder = grail.export(model, tokenizer, tmp_path / "large")
    words = grail.Text(str(text), **FEW)
    with pytest.raises(NonFiniteError, match=r"the input of model.layers.0.mlp.down_proj: 1 value"):
        grail.export_imatrix(folder, tmp_path / "a.gguf", words, progress=False)
    assert not (tmp_path / "a.gguf").exists()


def test_a_file_that_differs_is_not_kept(make, text, tmp_path, monkeypatch):
    folder = make()
    calibrated(folder, text)
    write = imatrix._write

    def damaging(path, *arguments):
        write(path, *arguments)
        sums = gguf.GGUFReader(path).tensors[0]
        with open(path, "r+b") as file:
            file.seek(sums.data_offset)
            file.write(b"1234")

    monkeypatch.setattr(imatrix, "_write", damaging)
    with pytest.raises(grail.errors.ExportError, match="does not hold the sums"):
        grail.export_imatrix(folder, tmp_path / "a.gguf", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_command_writes_both_files(make, tiny_model, text, tmp_path):
    folder = make(keep=BLOCKS)
    calibrated(folder, text)
    like = files.dense_file(tiny_model("llama"), tmp_path / "dense.gguf")
    gguf_file, matrix = tmp_path / "small.gguf", tmp_path / "small.imatrix.gguf"
    options = ["--gguf", gguf_file, "--imatrix", matrix, "--like", like, "--no-verify"]
    result = run("export", folder, *options)
    assert result.exit_code == 0, result.output
    assert f"gguf    {gguf_file} (" in result.stdout
    assert f"imatrix {matrix} (" in result.stdout
    assert f"14 matrices, 128 tokens of {text})" in result.stdout
    other = ["--imatrix", tmp_path / "b.gguf", "--calibration", text]
    result = run("export", folder, *other, "--tokens", 64, "--sequence-length", 16, "--json")
    facts = json.loads(result.stdout)
    assert (facts["imatrix"]["matrices"], facts["imatrix"]["tokens"]) == (14, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--imatrix", "a.gguf", "--check", "b.gguf"], "give --gguf FILE, --imatrix FILE"),
        (["--gguf", "a.gguf", "--calibration", "t.txt"], "--calibration is used with --imatrix or"),
        (["--imatrix", "a.gguf", "--tokens", "64"], "--tokens is used with --calibration: give"),
        (["--imatrix", "a.gguf", "--no-verify"], "--verify is used with --gguf or --onnx: give"),
        (["--imatrix", "a.gguf", "--calibration", "t.txt"], "--calibration: t.txt: no such file"),
        (["--gguf", "a.gguf", "--imatrix", "a.gguf"], "--gguf and --imatrix name the same file"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, text, tmp_path, monkeypatch, options, message):
    folder = make()
    calibrated(folder, text)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(run("export", folder, *options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
