"""docs/serving/index.md: its commands run as typed, as far as their runtimes are installed."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import grail
from grail.serving import gguf_check, vllm_check
from tests.commands.test_cli import grail as command

pytest.importorskip("gguf")
from tests.commands.test_export import write_whole

PAGE = (Path(__file__).parents[2] / "docs" / "serving" / "index.md").read_text(encoding="utf-8")
LINES = [line.split() for line in PAGE.splitlines() if line.startswith("    ")]
FEW = ["--tokens", "128", "--sequence-length", "16"]
OF_VISION = "net/"
QUANTISED = "small-q8_0.gguf"
NETWORKS = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""


def tool(name):
    """A program of the environment that runs this, or of the system."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def runs(*words):
    """Runs a command of grail; what it prints."""
    name, *rest = words
    result = command(name, *rest)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_command_is_of_a_known_program():
    assert {line[0] for line in LINES} == {"grail", "llama-quantize", "vllm"}
    assert {line[1] for line in LINES if line[0] == "grail"} == {"compress", "export", "bench"}
    (served,) = (line for line in LINES if line[0] == "vllm")  # test_vllm.py runs it
    assert served == ["vllm", "serve", "out", "--trust-remote-code"]


def test_its_commands_for_language_models_run(tiny_llama, tmp_path, monkeypatch):
    """The source is GGUF, so that the report names the template."""
    monkeypatch.chdir(tmp_path)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_llama(hidden_size=64, intermediate_size=1024, tie_word_embeddings=True, **heads)
    write_whole(model, tmp_path / "dense.gguf")
    (tmp_path / "text.txt").write_text("abcd e hijk cd abba xyz " * 200)
    printed = {}
    for program, *words in LINES:
        text = " ".join(words)
        if program == "vllm" or OF_VISION in words:
            continue
        if program == "llama-quantize":
            if tool(program) is None:
                shutil.copy("small.gguf", QUANTISED)
            else:
                subprocess.run([tool(program), *words], check=True, capture_output=True)
        elif words[0] == "bench":
            if find_spec("llama_cpp"):
                rounds = ["--rounds", "1", "--prompt", "8", "--new", "2", "--batch", "1"]
                printed[text] = runs(*words, *rounds)
        else:
            printed[text] = runs(*words, *(FEW if words[0] == "compress" else ()))
    assert "architecture deci" in printed["export out/ --gguf small.gguf"]
    checked = printed[f"export out/ --check {QUANTISED}"]
    known = "reported and not judged" if tool("llama-quantize") else "check   "
    assert (known if gguf_check.runtime() else "not verified in llama.cpp") in checked
    in_vllm = printed["export out/ --check out/"]
    assert ("" if vllm_check.vllm_runtime() else "not verified in vLLM") in in_vllm


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs onnxscript")
def test_its_commands_for_vision_networks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)  # of another test
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    names: dict[str, object] = {}
    exec(NETWORKS, names)
    net = names["make"]()
    assert isinstance(net, nn.Module)
    images = [torch.randn(4, 3, 32, 32)]
    grail.compress(net.eval(), images, 0.5, grail.trace(net), multiple=1, progress=False)
    grail.save(net, "net")
    lines = [words for _, *words in LINES if OF_VISION in words]
    assert len(lines) == 2
    for words in lines:
        assert "check" in runs(*words)
