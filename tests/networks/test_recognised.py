"""Transformers that are recognised by the form of their blocks."""

import copy
import re

import pytest
import torch
from torch import nn

import grail
from bench.quality import families
from grail.errors import InputError, ModelError
from grail.networks import decoders, encoders, find, structure, supported
from grail.statistics.observing import watch
from tests.conftest import DECODERS as DECODER_FAMILIES
from tests.conftest import MIXTURES
from tests.hooks import hooks_of
from tests.reported import (
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
)

ROWS = re.findall(
    r"^\| `([^`]+)` \|(.*)\|$", families.PAGE.read_text(encoding="utf-8"), re.MULTILINE
)
CELLS = {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in ROWS}
NARROWED = {name: cells for name, cells in CELLS.items() if len(cells) == len(families.KINDS) + 1}
RECOGNISED = [name for name in NARROWED if name not in {*decoders.LAYOUTS, *encoders.LAYOUTS}]
# What takes a name: heads in one matrix of all projections, or those of layers called otherwise.
NOT_FOUND = {family: {"heads"} for family in ("gpt2", "gpt_neox", "phi3")}
CASES = [
    (name, kind)
    for name in RECOGNISED
    for kind, cell in zip(families.KINDS, NARROWED[name], strict=False)
    if cell != "–"
]


@pytest.fixture(scope="module", autouse=True)
def in_silence():
    families.quiet()


def batches(count=5):
    return [families.tokens(seed) for seed in range(count)]


def test_the_page_names_every_type_once_and_all_that_are_supported():
    text = families.PAGE.read_text(encoding="utf-8")
    untried = re.findall(r"`([^`]+)`", text.rpartition("by sizes alone: ")[2])
    assert sorted([*CELLS, *untried]) == families.model_types()
    assert len(CELLS) == len(ROWS)
    assert set(structure.LAYOUTS) <= set(supported())
    known = {*decoders.LAYOUTS, *encoders.LAYOUTS} & {*families.model_types()}
    assert known <= {*NARROWED}


@pytest.mark.parametrize("model_type", NARROWED)
def test_the_page_is_in_step(model_type):
    found = find(families.tiny(model_type)).kinds
    said = zip(families.KINDS, NARROWED[model_type], strict=False)
    assert {kind for kind, cell in said if cell != "–"} == set(found)


@pytest.mark.parametrize(("model_type", "kind"), CASES, ids=[" ".join(case) for case in CASES])
def test_reported_errors_are_those_of_the_network(model_type, kind):
    dense = families.tiny(model_type)
    check = assert_errors_of_a_run_are_those_of_the_network
    if "experts" in kind:  # each token's drift is shared among them, see test_experts.py
        check = assert_errors_are_those_of_the_network
    check(dense, batches(), (kind,))


def without_names(monkeypatch):
    """Lets only the form of a model's blocks decide."""
    for listed in (decoders, encoders):
        monkeypatch.setattr(listed, "LAYOUTS", {})


def seen_by(model, block, site, batch):
    """Returns what a site's consumer reads, and what its probe shows after."""
    read, observed = [], []
    with torch.no_grad(), watch(site, block, lambda _, x, __: read.append(x), observed.append):
        model(**batch)
    return read, observed


@pytest.mark.parametrize("family", [*DECODER_FAMILIES, *MIXTURES])
def test_what_a_list_says_of_a_family_is_found_without_it(
    family, tiny_model, tiny_inputs, monkeypatch
):
    model, batch = tiny_model(family), {**tiny_inputs(family, 1)[0], "use_cache": False}
    named = find(model)
    without_names(monkeypatch)
    found = find(model)
    kinds = set(named.kinds) - NOT_FOUND.get(family, set())
    assert kinds <= set(found.kinds)
    for kind in kinds:
        pairs = zip(named.sites((kind,)), found.sites((kind,)), strict=True)
        for block, (ours, theirs) in zip(found.blocks, pairs, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.name == other.name
                assert mine.channels == other.channels
                assert list(mine.modules()) == list(other.modules())
                assert [c.shape for c in mine.weights()] == [c.shape for c in other.weights()]
                if mine.probe is None:
                    assert other.probe is None
                    continue
                first, second = (seen_by(model, block, site, batch) for site in (mine, other))
                for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
                    assert torch.equal(a, b)
                assert (mine.probe.scale is None) == (other.probe.scale is None)


class NormInside(nn.Module):
    """An MLP whose hidden activation passes a norm without weights."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        hidden = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(nn.functional.normalize(hidden, dim=-1))


class TopHalf(NormInside):
    """One of which the larger half of the channels counts."""

    def forward(self, x):
        hidden = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        least = hidden.abs().median(-1, keepdim=True).values
        return self.mlp.down_proj(hidden.where(hidden.abs() > least, 0))


class Reversed(NormInside):
    """One whose gate is of another channel."""

    def forward(self, x):
        hidden = self.mlp.act_fn(self.mlp.gate_proj(x).flip(-1)) * self.mlp.up_proj(x)
        return self.mlp.down_proj(hidden)


@pytest.mark.parametrize("kind", [NormInside, TopHalf, Reversed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_channels_that_depend_on_each_other_are_refused(kind, dtype, tiny_llama, monkeypatch):
    model = tiny_llama().to(dtype)
    without_names(monkeypatch)
    assert "mlp" in find(model).kinds
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
    with pytest.raises(ModelError, match="depends on the other channels"):
        find(model)


def test_heads_behind_a_norm_over_all_are_refused_with_the_reason(
    tiny_model, tiny_inputs, monkeypatch
):
    model = tiny_model("olmo2")
    without_names(monkeypatch)
    with pytest.raises(InputError, match=r"q_norm\.weight of its attention has values for all"):
        grail.compress(model, tiny_inputs("olmo2"), sites=("heads",), progress=False)


def test_finding_sites_leaves_a_model_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("qwen2_moe")
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    without_names(monkeypatch)
    model.train()
    find(model)
    assert model.training
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    for name, module in model.named_modules():
        after = dict(vars(module))
        assert {k: v for k, v in after.items() if isinstance(v, int)} == {
            k: v for k, v in attributes[name].items() if isinstance(v, int)
        }
        assert not hooks_of(module)


def test_settings_that_experts_share_are_written_when_all_are_narrow(tmp_path):
    model = families.tiny("glm4_moe")
    narrow = copy.deepcopy(model)
    kinds = ("shared_experts", "experts")
    report = grail.compress(narrow, batches(), keep=0.5, sites=kinds, progress=False)
    assert report.notes == [note for note in report.notes if "configuration" not in note]
    assert narrow.config.moe_intermediate_size == model.config.moe_intermediate_size // 2
    narrow.save_pretrained(tmp_path)
    again = type(narrow).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batches()[0]).logits, narrow(**batches()[0]).logits)


def test_a_model_of_several_stacks_names_them():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
    sizes |= {"num_hidden_layers": 1}
    config = LlavaConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 97},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 16},
        image_token_index=96,
    )
    model = LlavaForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"2 stacks of blocks, .*language_model\.layers"):
        find(model)
    assert "mlp" in find(model.model.language_model).kinds
