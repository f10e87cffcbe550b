"""Uneven widths as remote code: stock transformers loads, saves and runs what grail wrote."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import grail
from bench.quality import families
from bench.tools.assets import smollm2
from grail.errors import ExportError, InputError, ModelError
from grail.files import block_widths, remote_code
from grail.files.load import load_model, read_model
from tests.conftest import DECODERS, MIXTURES

ROOT = Path(__file__).parents[2]

# Loads, runs, saves again and generates with transformers alone, in a process without grail.
STOCK = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
result, tokens, *folders = sys.argv[1:]
ids = torch.load(tokens)

def loaded(folder):
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()

def generated(model, **options):
    return model.generate(ids[:, :5], max_new_tokens=8, do_sample=False, **options)

def tried(folder):
    model = loaded(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder + "-again")
    found = {
        "logits": model(ids).logits,
        "again": loaded(folder + "-again")(ids).logits,
        "cached": generated(model),
        "uncached": generated(model, use_cache=False),
        "static": generated(model, cache_implementation="static", disable_compile=True),
        "causal": type(model).__name__,
        "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
        "experts": model.config._experts_implementation,
    }
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    found["attentions"] = [weights is not None for weights in attentions]
    return found

with torch.inference_mode():
    found = [tried(folder) for folder in folders]
assert "grail" not in sys.modules
torch.save(found, result)
"""


def by_transformers(ids, tmp_path, *folders):
    """What transformers alone finds in each folder."""
    torch.save(ids, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "found.pt", tmp_path / "ids.pt", *folders],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**found) for found in torch.load(tmp_path / "found.pt")]


def logits(model, ids):
    with torch.inference_mode():
        return model.eval()(ids).logits


def narrowed(model, batches, keep, **options):
    """The model, narrowed to shares by kind and block."""
    settings = {"multiple": 8 if "experts" in keep else 2, "progress": False, **options}
    grail.compress(model, batches, keep, tuple(keep), **settings)
    return model


def made(tiny_model, family, settings):
    """A tiny model of a listed family, or of another one."""
    if family in (*DECODERS, *MIXTURES):
        return tiny_model(family, **settings)
    return families.tiny(family, **settings)


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.py"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


MLP = {"mlp": [0.5, 0.75]}
BOTH = {"heads": [0.5, 2 / 3], "mlp": [0.5, 0.75]}
EXPERTS = {"experts": [0.5, 0.75]}


# Family, shares by kind and block, settings, and the beginning of the class that is written.
CASES = [
    ("llama", MLP, {}, "DeciLM"),
    ("llama", MLP, {"mlp_bias": True}, "DeciLM"),
    ("llama", MLP, {"mlp_bias": True, "attention_bias": True}, "DeciLM"),
    ("llama", MLP, {"tie_word_embeddings": True}, "DeciLM"),
    ("llama", BOTH, {}, "UnevenLlama"),
    ("mistral", MLP, {"sliding_window": None}, "DeciLM"),
    ("mistral", MLP, {}, "UnevenMistral"),
    ("qwen2", MLP, {}, "DeciLM"),
    ("qwen3", BOTH, {}, "UnevenQwen3"),
    ("gemma", BOTH, {}, "UnevenGemma"),
    ("gemma3_text", MLP, {}, "UnevenGemma3Text"),
    ("phi", BOTH, {}, "UnevenPhi"),
    ("phi3", MLP, {}, "UnevenPhi3"),
    ("gpt2", MLP, {}, "UnevenGPT2"),
    ("gpt_neox", MLP, {}, "UnevenGPTNeoX"),
    ("opt", MLP, {}, "UnevenOPT"),
    ("qwen3_moe", EXPERTS, {}, "UnevenQwen3Moe"),
    ("arcee", BOTH, {}, "UnevenArcee"),
]


def test_transformers_alone_loads_saves_and_generates(tiny_model, tiny_batches, tmp_path):
    ids, models, folders = tiny_batches()[0], [], []
    for number, (family, keep, settings, _) in enumerate(CASES):
        models.append(narrowed(made(tiny_model, family, settings), tiny_batches(), keep))
        written = grail.export(models[-1], None, tmp_path / f"{number}-first", uneven=True)
        folders.append(written.rename(tmp_path / str(number)))
    results = by_transformers(ids, tmp_path, *folders)
    for case, model, folder, found in zip(CASES, models, folders, results, strict=True):
        family, _, _, kind = case
        expected = logits(model, ids)
        assert (found.base, found.causal) == (f"{kind}Model", f"{kind}ForCausalLM")
        assert torch.equal(found.logits, expected), case
        assert torch.equal(found.again, expected), case
        assert torch.equal(found.cached, found.uncached), case
        assert torch.equal(found.cached, found.static), case
        assert found.experts == model.config._experts_implementation, case
        if family != "phi3":  # its blocks keep configurations of their own
            assert found.attentions == [True, True], case
        for written in (folder, folder.with_name(f"{folder.name}-again")):
            assert lines(written) <= 80
            assert not (written / "grail.json").exists()
            assert remote_code.edited(written) is None
            again, _ = read_model(written)
            assert (type(again), type(again.config)) == (type(model), type(model.config))
            assert again.config.model_type == family
            assert torch.equal(logits(again, ids), expected), case


@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES, "exaone4", "falcon", "glm", "nemotron"])
def test_every_family_is_expressed_and_read_back(family, tiny_model, tiny_batches, tmp_path):
    model, batches = made(tiny_model, family, {}), tiny_batches()
    narrowed(model, batches, EXPERTS if family in MIXTURES else MLP)
    folder = grail.export(model, None, tmp_path / "out", uneven=True)
    again, found = read_model(folder)
    assert not any(found.values())
    assert type(again) is type(model)
    assert torch.equal(logits(again, batches[0]), logits(model, batches[0]))
    assert {layer.shape for layer in again.parameters()} == {p.shape for p in model.parameters()}


def test_three_blocks_of_smollm2(tmp_path):
    try:
        model, tokenizer = load_model(smollm2())
    except (InputError, ModelError) as error:
        pytest.skip(str(error))
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    ids = torch.tensor([tokenizer("The residual stream of a transformer is a sum.").input_ids])
    narrowed(model, [ids, ids + 1], {"mlp": [0.25, 0.5, 0.7]}, multiple=256, selector="wanda")
    folder = grail.export(model, tokenizer, tmp_path / "out", uneven=True)
    assert all("ffn_mult" in block["ffn"] for block in config_of(folder)["block_configs"])
    (found,) = by_transformers(ids, tmp_path, folder)
    assert torch.equal(found.logits, logits(model, ids))
    assert torch.equal(found.cached, found.uncached)
    again, words = load_model(folder)
    assert words("a b").input_ids == tokenizer("a b").input_ids
    assert torch.equal(logits(again, ids), logits(model, ids))


def vllm_width(ffn, hidden_size):
    """The intermediate size as vLLM's DeciLM computes it from a block's configuration."""
    if not hasattr(ffn, "ffn_mult"):
        return ffn.intermediate_size
    width = int(2 * ffn.ffn_mult * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden_size", [48, 576, 2048, 4096, 5120, 8192])
def test_ffn_mult_gives_every_multiple_of_256_back(hidden_size):
    for width in range(256, 32768 + 1, 256):
        ffn = block_widths._ffn(width, hidden_size)
        assert list(ffn) == ["ffn_mult"]
        assert vllm_width(SimpleNamespace(**ffn), hidden_size) == width
    assert block_widths._ffn(255, hidden_size) == {"intermediate_size": 255}


def test_block_configs_are_as_decilm_reads_them(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama(intermediate_size=1024)
    narrowed(model, tiny_batches(), {"mlp": [0.25, 0.4]})
    expressed = block_widths.express(model)
    folder = grail.export(model, None, tmp_path / "out", uneven=True)
    config_class, _ = remote_code._classes(remote_code._code_of(folder))
    config = config_class.from_pretrained(folder)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert config.model_type == "nemotron-nas"
    assert [vllm_width(b.ffn, config.hidden_size) for b in config.block_configs] == [256, 410]
    assert [hasattr(b.ffn, "ffn_mult") for b in config.block_configs] == [True, False]
    assert not expressed.by_ffn_mult
    for block in config.block_configs:
        assert block.attention.n_heads_in_group == 2
        assert not any((block.attention.no_op, block.ffn.no_op, block.ffn.replace_with_linear))
    config.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["block_configs"] == config_of(folder)["block_configs"]


def test_groups_of_heads_that_differ_by_block_are_decilms(tiny_model, tiny_batches, tmp_path):
    # 4 query heads in each block: in 4 groups of one, and in 2 groups of two.
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=4, hidden_size=32)
    attention = model.model.layers[1].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        projection.weight = nn.Parameter(projection.weight[:16].clone())
    attention.num_key_value_groups = 2
    ids = tiny_batches()[0]
    folder = grail.export(model, None, tmp_path / "out", uneven=True)
    blocks = config_of(folder)["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [1, 2]
    again, _ = read_model(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    own = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **own), again.generate(ids, use_cache=False, **own))


def test_fitted_biases(tiny_llama, tiny_batches, tmp_path):
    model, batches = tiny_llama(), tiny_batches()
    narrowed(model, batches, MLP, fit_bias=True)
    folder = grail.export(model, None, tmp_path / "out", uneven=True)
    assert config_of(folder)["mlp_bias"] is True
    again, _ = read_model(folder)
    assert again.model.layers[0].mlp.down_proj.bias.any()
    assert torch.equal(logits(again, batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("mistral", {}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen3", {}, "not of the Llama shape"),
    ],
)
def test_what_decilm_does_not_have_gets_a_class_of_its_own(
    family, settings, why, tiny_model, tiny_batches
):
    model = narrowed(tiny_model(family, **settings), tiny_batches(), MLP)
    expressed = block_widths.express(model)
    assert why in expressed.not_decilm
    assert expressed.code.form == f"uneven_{family}"
    assert expressed.settings["block_widths"] == [
        {"intermediate_size": 40},
        {"intermediate_size": 60},
    ]


def test_query_heads_that_differ_by_block_get_a_class_of_their_own(tiny_llama, tiny_batches):
    expressed = block_widths.express(narrowed(tiny_llama(), tiny_batches(), BOTH))
    assert "num_attention_heads differs by block" in expressed.not_decilm
    assert expressed.code.form == "uneven_llama"


@pytest.mark.parametrize(
    ("family", "keep", "settings", "why"),
    [
        (
            "gpt2",
            {"heads": 0.5},
            {},
            r"attn\.\S+ of block 0 is \[.+a stock GPT2Block can only have",
        ),
        ("opt", {"heads": 0.5}, {}, "a stock OPTDecoderLayer can only have"),
        ("bloom", {"mlp": 0.5}, {"n_head": 6, "n_layer": 2}, "a stock BloomBlock can only have"),
    ],
)
def test_what_cannot_be_expressed_is_named_and_written_for_grail(
    family, keep, settings, why, tiny_model, tiny_tokenizer, tiny_batches, tmp_path
):
    model, batches = tiny_model(family if family != "bloom" else "gpt2"), tiny_batches()
    if family == "bloom":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, **settings)
        model = AutoModelForCausalLM.from_config(config).eval()
    narrowed(model, batches, keep)
    with pytest.raises(InputError, match=why):
        block_widths.express(model)
    folder = grail.export(model, tiny_tokenizer(), tmp_path / "out", uneven=True)
    assert (folder / "grail.json").is_file()
    assert not list(folder.glob("*.py"))
    again, _ = load_model(folder)
    assert torch.equal(logits(again, batches[0]), logits(model, batches[0]))


def test_a_subclass_of_a_stock_model_is_not_expressed(tiny_llama):
    model = tiny_llama()
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(InputError, match="Mine is not LlamaForCausalLM"):
        block_widths.express(model)


@pytest.fixture
def written(tiny_llama, tiny_batches, tiny_tokenizer, tmp_path):
    """A folder of DeciLM with a tokenizer."""
    model = narrowed(tiny_llama(), tiny_batches(), MLP)
    return grail.export(model, tiny_tokenizer(), tmp_path / "out", uneven=True)


@pytest.mark.parametrize("change", ["configuration", "modeling", "missing", "auto_map"])
def test_edited_code_is_refused_and_not_run(change, written, tmp_path, own_modules):
    name = "configuration_decilm.py" if change == "configuration" else "modeling_decilm.py"
    if change == "missing":
        (written / name).unlink()
    elif change == "auto_map":
        name, config = "config.json", config_of(written)
        config["auto_map"]["AutoModelForCausalLM"] = "mine.Mine"
        (written / name).write_text(json.dumps(config))
    else:
        with open(written / name, "a") as file:
            file.write(f"\nopen({str(tmp_path / 'run')!r}, 'w')\n")
    with pytest.raises(ModelError, match=rf"{name} is not as grail writes it.*trust-remote-code"):
        load_model(written)
    assert not (tmp_path / "run").exists()
    if change == "modeling":  # told to, it runs what is there
        model, _ = load_model(written, trust_remote_code=True)
        assert type(model).__name__ == "DeciLMForCausalLM"
        assert (tmp_path / "run").exists()


def test_an_unknown_family_is_left_to_transformers(written):
    config = config_of(written)
    config[remote_code.STOCK] = "llama; import os"
    (written / "config.json").write_text(json.dumps(config))
    assert not remote_code.is_written(written)
    with pytest.raises(ModelError, match="needs Python code of its own"):
        load_model(written)


def test_weights_of_other_widths_are_refused(written):
    config = config_of(written)
    config["block_configs"][0]["ffn"]["intermediate_size"] = 38
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"other shape than config.json gives.*layers\.0\.mlp"):
        load_model(written)


def test_without_trust_transformers_asks_for_it(written):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(written, trust_remote_code=False)


def test_it_loads_without_trust_and_warnings(written, capfd):
    model, tokenizer = load_model(written)
    assert "nemotron-nas" not in capfd.readouterr().err
    assert tokenizer("w5").input_ids == [5]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.to_dict()["model_type"] == "llama"
    assert vars(model.config).keys().isdisjoint(("block_configs", "auto_map", remote_code.STOCK))
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_what_was_loaded_is_compressed_and_exported_again(written, tiny_batches, tmp_path):
    model, tokenizer = load_model(written)
    narrowed(model, tiny_batches(), {"mlp": [0.5, 0.7]})
    folder = grail.export(model, tokenizer, tmp_path / "again", uneven=True)
    again, _ = load_model(folder)
    ids = tiny_batches()[0]
    assert [layer.mlp.down_proj.in_features for layer in again.model.layers] == [20, 42]
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_loading_twice_shares_no_configuration(written):
    first, second = read_model(written)[0], read_model(written)[0]
    assert first.config is not second.config
    first.config.intermediate_size = 1
    assert read_model(written)[0].config.intermediate_size == 80
    assert type(first) is type(second)


def test_a_model_that_reloads_differently_is_refused(tiny_llama, tiny_batches, tmp_path):
    model = narrowed(tiny_llama(), tiny_batches(), MLP).to(torch.bfloat16)
    with pytest.raises(ExportError, match="rotary"):
        grail.export(model, None, tmp_path / "out", uneven=True)
    assert not list(tmp_path.iterdir())


def test_old_folders_are_read(tiny_llama, tiny_batches, tiny_tokenizer, tmp_path):
    model, ids = narrowed(tiny_llama(), tiny_batches(), MLP), tiny_batches()[0]
    folder = grail.save(model, tmp_path / "old")
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    again, _ = load_model(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_serving_page_runs(written, tiny_batches, tmp_path):
    page = (ROOT / "docs" / "serving" / "transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code += "print(type(model).__name__, tokenizer('w5').input_ids)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=written.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "DeciLMForCausalLM [5]\n", done.stderr
    assert "You are using a model of type" not in done.stderr


def test_the_templates_ship():
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = config["tool"]["setuptools"]["package-data"]["grail"]
    inside = [path for pattern in patterns for path in (ROOT / "grail").glob(pattern)]
    assert set(remote_code._TEMPLATES.iterdir()) <= set(inside)
