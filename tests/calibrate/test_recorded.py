"""Arguments that are recorded once serve every pass, or are refused."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail.calibrate.recorded import state_of
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from tests.conftest import VOCABULARY


class Wrapped(nn.Module):
    """A model behind a forward whose signature says nothing."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.base_model_prefix = f"model.{model.base_model_prefix}"

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("asked", ["by config", "by batch"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt"]
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_key_value_cache_changes_nothing(family, wrapped, asked, tiny_model, tiny_batches):
    found = []
    for use_cache in (True, False):
        model = tiny_model(family, num_hidden_layers=3, use_cache=use_cache)
        extra = {"use_cache": use_cache} if asked == "by batch" else {}
        batches = [{"input_ids": ids, **extra} for ids in tiny_batches(4)]
        grail.compress(Wrapped(model) if wrapped else model, batches, 0.5, progress=False)
        assert model.config.use_cache is use_cache
        found.append(model.state_dict())
    assert all(map(torch.equal, *(state.values() for state in found)))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_decoders_that_answer_questions_run_without_their_cache(family, tiny_batches):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"{family}ForQuestionAnswering")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=VOCABULARY,
        intermediate_size=40,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    dense = kind(config).eval()
    found = []
    for use_cache in (True, False):
        model = copy.deepcopy(dense)
        model.config.use_cache = use_cache
        grail.compress(model, tiny_batches(4), 0.5, progress=False)
        found.append(model.state_dict())
    assert all(map(torch.equal, *(state.values() for state in found)))


class Block(nn.Module):
    """Adds up what it is called with, in an object that it is given."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 6), use

    def forward(self, x, memory):
        return self.layer(x) + self.use(memory)


class Chain(nn.Module):
    def __init__(self, use, make):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.make = nn.ModuleList(Block(use) for _ in range(2)), make

    def forward(self, x):
        memory = self.make()
        for block in self.blocks:
            x = block(x, memory)
        return x


class Cache:
    def __init__(self):
        self.seen, self.count = [torch.zeros(1)], 0

    def more(self):
        self.count += 1
        return self.count

    def append(self):
        self.seen.append(torch.ones(1))
        return len(self.seen)

    def write(self):
        return self.seen[0].add_(1)


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 0


def set_slot(memory):
    memory.value += 1
    return memory.value


MUTATED = {
    "a number": (Cache.more, Cache),
    "a list": (Cache.append, Cache),
    "a tensor": (Cache.write, Cache),
    "a slot": (set_slot, Slots),
    "a nested object": (lambda m: m["deep"][0].more(), lambda: {"deep": [Cache()]}),
    "a dict": (lambda m: m.setdefault("count", 3), dict),
    "a set": (lambda m: m.add(len(m)) or len(m), set),
}


@pytest.mark.parametrize(("use", "make"), MUTATED.values(), ids=MUTATED)
def test_an_argument_that_a_block_changes_is_refused(use, make):
    model = Chain(use, make).eval()
    with torch.no_grad():
        stream = Stream(model, model.blocks, [torch.randn(3, 5, 6)])
        with pytest.raises(ModelError, match="block 1 changes an argument of its own"):
            stream.run(1, 0)


@pytest.mark.parametrize(
    "make",
    [lambda: iter([1, 2]), lambda: (n for n in (1, 2)), torch.Generator],
    ids=["iterator", "generator", "random numbers"],
)
def test_an_argument_that_is_used_up_is_refused(make):
    model = Chain(lambda _: 1, make).eval()
    with torch.no_grad(), pytest.raises(ModelError, match="used up by the first of several passes"):
        Stream(model, model.blocks, [torch.randn(3, 5, 6)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 1.5,
        lambda: float("nan"),
        lambda: "words",
        lambda: (torch.ones(2), [torch.zeros(1), {"a": 1}]),
        lambda: nn.Linear(2, 2),
        Cache,
        Slots,
        lambda: torch.float32,
        lambda: len,
    ],
)
def test_arguments_that_stay_as_they_are_serve_every_pass(make):
    argument = make()
    assert state_of(argument) == state_of(argument)
    model = Chain(lambda _: 1, lambda: argument).eval()
    with torch.no_grad():
        stream = Stream(model, model.blocks, [torch.randn(3, 5, 6)])
        assert torch.equal(stream.run(1, 0), stream.run(1, 0))


def test_an_object_that_refers_to_itself_has_a_state():
    cache = Cache()
    cache.seen.append(cache)
    before = state_of(cache)
    assert state_of(cache) == before
    cache.more()
    assert state_of(cache) != before
