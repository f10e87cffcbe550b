"""A folder is the same network in vLLM, whose own classes load uneven widths too."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import grail
from bench.quality.vllm import CASES, write_tiny
from bench.tools import tiny
from grail.errors import ExportError, InputError, ModelError
from grail.files.load import load_model
from grail.serving import vllm_check
from grail.serving.vllm_check import check_vllm
from tests.commands.test_cli import grail as command
from tests.commands.test_cli import refusal

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
MLP = {"mlp": [0.9, 0.4]}
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


@pytest.fixture
def folder(tiny_model, tiny_batches, tmp_path):
    return written(tiny_model("llama"), tiny_batches(), tmp_path / "out", MLP)


def written(model, batches, path, keep, **settings):
    report = grail.compress(model, batches, keep, tuple(keep), progress=False, **settings)
    uneven = bool(report.model["beyond_configuration"])
    return grail.export(model, tiny.tokenizer(), path, report, uneven=uneven)


@pytest.fixture
def vllm(monkeypatch):
    """Lets transformers answer for vLLM, with changes by key."""

    def answers(**changes):
        def computed(path, tokens, scratch):
            model, _ = load_model(path)
            with torch.no_grad():
                after = model.generate(
                    tokens, max_new_tokens=16, min_new_tokens=16, do_sample=False
                )[:, tokens.shape[1] :]
                likely = model(tokens).logits[:, :-1].log_softmax(-1).topk(20)
            found = {"ids": likely.indices, "values": likely.values, "generated": after}
            found = {name: value.numpy() for name, value in found.items()} | {"form": "A"}
            return found | {name: change(found[name]) for name, change in changes.items()}

        monkeypatch.setattr(vllm_check, "vllm_runtime", lambda: "vllm 1.2.3")
        monkeypatch.setattr(vllm_check, "_in_vllm", computed)

    return answers


def test_says_how_close_the_folder_is(folder, vllm):
    vllm()
    result = command("export", folder, "--check", folder)
    assert result.exit_code == 0, result.output
    assert "100.0% of 252 positions, 100.0% of 64 generated tokens the same" in result.stdout
    assert "(vllm 1.2.3, A)" in result.stdout
    assert check_vllm(folder).share < 1e-5


DAMAGE = {
    "a probability": {"values": lambda values: values - 5e-3},
    "not a number": {"values": lambda values: np.full_like(values, np.nan)},
    "the most likely tokens": {"ids": lambda ids: np.roll(ids, 1, axis=2)},
    "a generated token": {"generated": lambda tokens: np.where(np.arange(16) == 9, 3, tokens)},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_another_network_is_an_error(folder, vllm, case):
    vllm(**DAMAGE[case])
    said = refusal(command("export", folder, "--check", folder))
    assert "is another network in vLLM than in transformers: largest difference" in said


def test_without_vllm_the_folder_is_not_verified(folder, monkeypatch):
    monkeypatch.setattr(vllm_check, "vllm_runtime", lambda: None)
    assert check_vllm(folder) is None
    result = command("export", folder, "--check", folder)
    assert "check   not verified in vLLM: install vLLM" in result.stdout


def test_a_runtime_that_fails_is_quoted(folder, monkeypatch):
    monkeypatch.setattr(vllm_check, "vllm_runtime", lambda: "vllm 1.2.3")
    monkeypatch.setattr(vllm_check, "_GENERATED", "many")
    with pytest.raises(ExportError, match=r"vLLM does not run out .*it says: \w+Error: "):
        vllm_check._in_vllm(folder, torch.ones(1, 4, dtype=torch.int64), folder.parent)


def test_what_vllm_cannot_or_should_not_load_is_refused(folder, tiny_model, tiny_batches, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        check_vllm(folder, tmp_path / "nowhere")
    heads = {"heads": [1.0, 1 / 3]}
    alone = written(tiny_model("gpt2"), tiny_batches(), tmp_path / "alone", heads)
    with pytest.raises(ModelError, match="only grail reads"):
        check_vllm(alone)
    code = folder / "modeling_decilm.py"
    code.write_text(code.read_text() + "print('edited')\n")
    with pytest.raises(ModelError, match=r"modeling_decilm.py is not as grail writes it"):
        check_vllm(folder)


def test_only_code_of_its_own_needs_the_transformers_backend(
    folder, tiny_model, tiny_batches, tmp_path
):
    other = written(tiny_model("qwen3"), tiny_batches(), tmp_path / "other", MLP)
    assert vllm_check._implementation(folder) == "auto"
    assert vllm_check._implementation(other) == "transformers"


@needs_vllm
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.refused])
def test_vllm_agrees(case, tmp_path):
    found = check_vllm(write_tiny(case, tmp_path))
    assert found.is_close
    assert found.form == CASES[case].form


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.refused])
def test_what_crashes_vllm_is_refused_before(case, tmp_path):
    with pytest.raises(ModelError, match=CASES[case].refused):
        check_vllm(write_tiny(case, tmp_path))


@needs_vllm
def test_vllm_tells_another_network(tmp_path):
    first, other = (write_tiny("llama, uneven", tmp_path / str(seed), seed) for seed in (0, 1))
    with pytest.raises(ExportError, match="is another network in vLLM"):
        check_vllm(first, other)


@needs_vllm
def test_the_server_of_the_page_answers_as_transformers(tmp_path):
    """Runs `vllm serve` as docs/serving/index.md types it, at a free port."""
    write_tiny("llama, uneven", tmp_path).rename(tmp_path / "out")
    page = (ROOT / "docs" / "serving" / "index.md").read_text(encoding="utf-8")
    (words,) = (line.split() for line in page.splitlines() if line.startswith("    vllm serve "))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name(words[0])
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    options += ["--max-model-len", "64", "--enforce-eager"]
    log = tmp_path / "log"
    with log.open("wb") as said:
        server = subprocess.Popen(
            [str(program), *words[1:], *options],
            cwd=tmp_path,
            env={**os.environ, **vllm_check._SETTINGS, "HF_MODULES_CACHE": str(tmp_path / "hf")},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            text = asked(f"http://127.0.0.1:{port}/v1/completions", server, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(120)
    model, tokenizer = load_model(tmp_path / "out")
    tokens = torch.tensor([tokenizer("w5 w7 w9")["input_ids"]])
    own = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.split() == tokenizer.decode(own[0, tokens.shape[1] :]).split()


def asked(url, server, log):
    """What a server completes "w5 w7 w9" with, once it answers."""
    body = {"model": "out", "prompt": "w5 w7 w9", "max_tokens": 4, "temperature": 0}
    body |= {"min_tokens": 4, "skip_special_tokens": False}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(900):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:  # it does not listen yet
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
