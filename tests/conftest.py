"""Small random models and inputs that every test may use; nothing here is downloaded.

Each fixture is a factory, so that a test says what it needs:

    def test_something(tiny_llama, tiny_batches):
        model = tiny_llama(num_hidden_layers=1)
        batches = tiny_batches(count=2)
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grail_kernels as gk
from bench.tools import tiny
from bench.tools.tiny import VOCABULARY
from tests import counting
from tests.counting import (  # noqa: F401, hooks of pytest
    pytest_addoption,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DECODERS = (
    *FAMILIES,
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "olmo",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "smollm3",
    "stablelm",
    "starcoder2",
)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
TEXT_ENCODERS = (
    "bert",
    "camembert",
    "clip_text_model",
    "distilbert",
    "electra",
    "roberta",
    "siglip_text_model",
    "xlm-roberta",
)
VISION_ENCODERS = ("clip_vision_model", "deit", "dinov2", "siglip_vision_model", "vit")
# Of the sizes of `bench.tools.tiny`, those that every family is given.
_NAMED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
# Other names of those sizes in a family, or settings of its own.
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 80},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.1},
    "gpt_neox": {"partial_rotary_factor": 0.5},
    "granite": {"residual_multiplier": 0.5},
    "distilbert": {"hidden_dim": 80},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS,
    "dinov2": {"mlp_ratio": 2},
}
# Families whose head_dim is hidden_size / heads: 48 / 6 is 8 as well.
_DERIVED_HEAD_DIM = ("qwen2", "qwen2_moe", "mixtral", "gpt2", "opt", "gpt_neox", "phi", "stablelm")


def pytest_configure(config):
    counting.count_refusals()
    if share := getattr(config, "workerinput", None):  # several processes share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // share["workercount"]))
    # A command that a test starts rounds as the test itself does.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family, seed=0, **config)`: a random fp32 model of one of the families above.

    Two layers, 48 wide, MLP 80, six query heads of 8 in three KV groups, unless `config` says else.
    Weights are wide enough (std 0.1), norms and biases far enough from one and zero, that every
    part of the network shows in the logits.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, SiglipTextModel

    def make(family: str, seed: int = 0, **config: Any) -> Any:
        shared = {name: tiny.SIZES[name] for name in _NAMED}
        settings = {**shared, **_OWN_SIZES.get(family, {}), **config}
        if family in _DERIVED_HEAD_DIM:
            settings.pop("head_dim")
        if family in VISION_ENCODERS:
            settings |= {"image_size": 16, "patch_size": 4}
        kind = AutoModelForCausalLM if family in (*DECODERS, *MIXTURES) else AutoModel
        if family == "siglip_text_model":  # AutoModel does not know it
            kind = SimpleNamespace(from_config=SiglipTextModel)
        made = AutoConfig.for_model(family, **settings)
        return tiny.randomised(lambda: kind.from_config(made), seed)

    return make


@pytest.fixture
def ragged_launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token counts by expert of each ragged Gram call, as they come."""
    counts: list[list[int]] = []
    kernel = gk.gram_ragged_

    def counting(out: Any, x: Any, offsets: Any, **rest: Any) -> Any:
        counts.append(offsets.diff().tolist())
        return kernel(out, x, offsets, **rest)

    monkeypatch.setattr(gk, "gram_ragged_", counting)
    return counts


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_llama(seed=0, **config)`: `tiny_model` of the Llama family."""
    return lambda seed=0, **config: tiny_model("llama", seed, **config)


@pytest.fixture(scope="session")
def tiny_batches() -> Callable[..., list[torch.Tensor]]:
    """`tiny_batches(count=3, rows=2, length=16, seed=0)`: random tokens [rows, length] each."""

    def make(count: int = 3, rows: int = 2, length: int = 16, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size = (rows, length)
        return [torch.randint(3, VOCABULARY, size, generator=generator) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def tiny_inputs(tiny_batches: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """`tiny_inputs(family, count=3)`: batches of a family as keyword arguments of its models.

    Tokens of encoders are padded at the end: their last row has five tokens only.
    """

    def make(family: str, count: int = 3) -> list[dict[str, Any]]:
        if family in VISION_ENCODERS:
            generator = torch.Generator().manual_seed(0)
            images = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(count))
            return [{"pixel_values": image} for image in images]
        batches = [{"input_ids": tokens} for tokens in tiny_batches(count)]
        if family in TEXT_ENCODERS:
            for batch in batches:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                batch["attention_mask"][-1, 5:] = 0
        return batches

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[], Any]:
    """`tiny_tokenizer()`: a word tokenizer that fits the tiny models.

    Token i (3 ≤ i < 97) is the word "w<i>", any other word is 0, `<s>` 1 and `</s>` 2.
    """
    return tiny.tokenizer


@pytest.fixture
def tiny_folder(
    tmp_path: Any, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> Any:
    """Path of a `save_pretrained` folder with `tiny_llama()` and `tiny_tokenizer()`."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def no_rehearsal(monkeypatch):
    """Lets runs start without the rehearsal that predicts their memory, to count calls once."""
    monkeypatch.setattr("grail.run.peak_memory.predict", lambda *_, **__: None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model):
    """The files that pages and examples name, of small models, made once they are asked for."""
    from tests.prepared import Prepared

    return Prepared(tmp_path_factory.mktemp("prepared"), tiny_model)
