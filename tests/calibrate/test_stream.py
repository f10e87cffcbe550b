import pytest
import torch
from torch import nn

import grail
from grail.calibrate.hidden_states import OutputCache
from grail.calibrate.stream import Stream
from grail.errors import EmptyCalibrationError, InputError, ModelError
from grail.networks import find
from tests.conftest import FAMILIES
from tests.hooks import hooks_of
from tests.reported import (
    assert_errors_are_those_of_the_network,
    assert_errors_of_a_run_are_those_of_the_network,
)


def stream_of(model, batches) -> Stream:
    with torch.no_grad():
        return Stream(model, find(model).blocks, batches)


def run_through(stream: Stream) -> list[list[torch.Tensor]]:
    """Hidden states of every batch at the entry of each block."""
    seen = [[hidden.clone() for hidden in stream.hidden]]
    with torch.no_grad():
        for block in range(len(stream.blocks)):
            for batch in range(len(stream)):
                stream.store(batch, stream.run(block, batch))
            seen.append([hidden.clone() for hidden in stream.hidden])
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_alone_give_the_models_own_hidden_states(family, tiny_model, tiny_batches):
    extra = {}
    if family in ("qwen2", "qwen3"):  # a sliding window in one of the layers: masks differ by layer
        extra = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    if family == "mistral":
        extra = {"sliding_window": 4}
    model = tiny_model(family, num_hidden_layers=3, **extra)
    batches = tiny_batches(count=2)
    states = run_through(stream_of(model, batches))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            own = model(batch, output_hidden_states=True).hidden_states
            for block in range(3):
                assert torch.equal(states[block][number], own[block])
            last = model.get_decoder().norm(states[3][number])
            assert torch.equal(last, own[3])


def test_the_model_is_as_before_after_the_calls_were_recorded(tiny_llama, tiny_batches):
    model, batch = tiny_llama(), tiny_batches(count=1)[0]
    before = model(batch).logits
    stream_of(model, [batch])
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(batch).logits, before)


def test_equal_tables_are_held_once(tiny_llama, tiny_batches):
    stream = stream_of(tiny_llama(), tiny_batches(count=3))
    tables = []
    stream.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: tables.append(kwargs["position_embeddings"][0]),
        with_kwargs=True,
    )
    for batch in range(3):
        stream.run(0, batch)
    assert len(tables) == 3
    assert len({table.data_ptr() for table in tables}) == 1


def test_an_output_cache_replays_what_was_recorded_in_order(tiny_llama, tiny_batches):
    model = tiny_llama()
    stream = stream_of(model, tiny_batches())
    block = stream.blocks[0]
    cache = OutputCache(stream.device, stream.storage)
    with torch.no_grad():
        with cache.recording([block.self_attn]):
            expected = [stream.run(0, batch) for batch in range(len(stream))]
        block.self_attn.o_proj.weight.zero_()  # would show if attention ran again
        with cache.replaying():
            replayed = [stream.run(0, batch) for batch in range(len(stream))]
    assert all(map(torch.equal, expected, replayed))
    assert not hooks_of(block.self_attn)
    assert "forward" not in block.self_attn.__dict__


def test_attention_that_returns_more_than_its_block_drops_runs_again(tiny_llama, tiny_batches):
    from transformers.models.llama import modeling_llama as llama

    class Attention(llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            output, _ = super().forward(hidden_states=hidden_states, **kwargs)
            return output, hidden_states.roll(1, -1)

    class Layer(llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            x = hidden_states
            h, extra = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)
            h = x + h if extra is None else x + h + 2 * extra
            return h + self.mlp(self.post_attention_layernorm(h))

    model = tiny_llama()
    for layer in model.model.layers:
        layer.__class__, layer.self_attn.__class__ = Layer, Attention
    settings = {"selector": "magnitude", "alpha": 1e-3}
    assert_errors_are_those_of_the_network(model, tiny_batches(8), ("mlp",), **settings)
    assert_errors_of_a_run_are_those_of_the_network(model, tiny_batches(8), ("mlp",), **settings)


@pytest.mark.parametrize("kept", ["attribute", "buffer", "chance"])
def test_a_block_that_does_not_repeat_itself_is_refused(kept, tiny_llama, tiny_batches):
    from transformers.models.llama import modeling_llama as llama

    class Layer(llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            if kept == "chance":
                hidden_states = nn.functional.dropout(hidden_states, 0.2)
            elif kept == "attribute":
                self.past = getattr(self, "past", 0) + hidden_states.mean((0, 1))
                hidden_states = hidden_states + self.past
            else:
                self.state += hidden_states.mean((0, 1))
                hidden_states = hidden_states + self.state
            return super().forward(hidden_states, **kwargs)

    model = tiny_llama()
    for layer in model.model.layers:
        layer.__class__ = Layer
        layer.register_buffer("state", torch.zeros(48))
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ModelError, match="block 0 returns something else when it runs again"):
        grail.compress(model, tiny_batches(4), 0.5, progress=False)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_an_attention_mask_decides_which_tokens_count(tiny_llama, tiny_batches):
    batch = tiny_batches(count=1, rows=2, length=8)[0]
    mask = torch.ones_like(batch)
    mask[0, 5:] = 0
    stream = stream_of(tiny_llama(), [{"input_ids": batch, "attention_mask": mask}, batch])
    assert stream.tokens == 13 + 16
    assert torch.equal(stream.mask(0), mask.bool())
    assert stream.mask(1) is None


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], EmptyCalibrationError),
        ([torch.empty(0, 4, dtype=torch.int64)], EmptyCalibrationError),
        ([torch.randn(2, 4)], InputError),
        ([torch.ones(4, dtype=torch.int64)], InputError),
        ([["text"]], InputError),
    ],
    ids=["none", "no token", "float", "vector", "text"],
)
def test_batches_of_another_kind_are_refused(batches, error, tiny_llama):
    with pytest.raises(error):
        stream_of(tiny_llama(), batches)


def test_a_mask_counts_wherever_it_stands_among_the_arguments(tiny_llama, tiny_batches):
    ids = tiny_batches(count=1)[0]
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    counted = [
        stream_of(tiny_llama(), [batch]).tokens
        for batch in ((ids, mask), {"attention_mask": mask, "input_ids": ids})
    ]
    assert counted == [20, 20]


def test_masks_of_encoder_and_decoder_are_not_mixed_up():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    decoder = "decoder.block.0.layer.2.DenseReluDense"
    site = grail.Site(producers=[f"{decoder}.wi"], consumers=[f"{decoder}.wo"])

    def tokens_of(length: int, **masks) -> int:
        ids = torch.arange(2 * 8).view(2, 8)
        batch = {"input_ids": ids, "decoder_input_ids": ids[:, :length], **masks}
        report = grail.compress(model, [batch, batch], 0.5, [site], progress=False)
        return report.sites[0].tokens

    padded = torch.ones(2, 8, dtype=torch.long)
    padded[1, 5:] = 0
    every = torch.ones_like(padded)
    assert tokens_of(8, attention_mask=padded) == 32
    assert tokens_of(8, attention_mask=padded, decoder_attention_mask=every) == 32
    assert tokens_of(8, attention_mask=every, decoder_attention_mask=padded) == 26
    assert tokens_of(8, attention_mask=padded, decoder_attention_mask=padded) == 26
    assert tokens_of(7, attention_mask=padded) == 28


@pytest.mark.parametrize("length", [5, 7, 8], ids=lambda n: f"{n} decoder tokens")
@pytest.mark.parametrize("kind", ["T5", "Bart", "Marian"])
def test_layers_of_encoder_and_decoder_count_their_own_tokens(kind, length):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "vocab_size": 40, "pad_token_id": 0, "decoder_start_token_id": 0}
    if kind == "T5":
        sizes |= {"d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        layers = "{0}.block.0.layer.{1}.DenseReluDense.wi {0}.block.0.layer.{1}.DenseReluDense.wo"
        names = [layers.format("encoder", 1).split(), layers.format("decoder", 2).split()]
    else:
        sizes |= {
            f"{s}_{n}": v
            for s in ("encoder", "decoder")
            for n, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
        }
        config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=32)
        name = {"Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}[kind]
        model = getattr(transformers, name)(config)
        layers = "model.{0}.layers.0.fc1 model.{0}.layers.0.fc2"
        names = [layers.format(side).split() for side in ("encoder", "decoder")]
    sites = [grail.Site([up], [down]) for up, down in names]
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 40, (4, n), generator=generator) for n in (8, length))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    labels[2, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    report = grail.compress(model.eval(), [batch] * 3, 0.5, sites, progress=False)
    assert [row.tokens for row in report.sites] == [3 * 27, 3 * (3 * length + 4)]


def test_a_layer_counts_the_tokens_that_it_reads_wherever_it_hangs():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 40))
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 40, (4, 8), generator=generator) for _ in range(2))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    labels[2, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    site = grail.Site(["lm_head.0"], ["lm_head.2"])
    report = grail.compress(model, [batch] * 3, 0.5, [site], progress=False)
    assert report.sites[0].tokens == 3 * 28  # the decoder's, though it is no part of it


class OverTime(nn.Module):
    """Two convolutions over the frames of [B, T, C, H, W], sample by sample or time by time."""

    def __init__(self, time_first):
        super().__init__()
        torch.manual_seed(0)
        self.time_first = time_first
        self.up, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        x = (x.transpose(0, 1) if self.time_first else x).flatten(0, 1)
        return self.down(self.up(x).relu())


def test_frames_that_do_not_lie_sample_by_sample_are_refused():
    site = grail.Site(producers=["up"], consumers=["down"])
    batches = [torch.randn(5, 5, 3, 6, 6) for _ in range(3)]
    report = grail.compress(OverTime(False), batches, 0.5, [site], progress=False)
    assert report.sites[0].error is not None
    with pytest.raises(ModelError, match=r"down: which sample .* give alpha, drift_correction=0"):
        grail.compress(OverTime(True), batches, 0.5, [site], progress=False)


def test_a_callers_cache_is_refused_before_anything_is_written_to_it(tiny_llama, tiny_batches):
    transformers = pytest.importorskip("transformers")
    model, cache = tiny_llama(), transformers.DynamicCache()
    batch = {"input_ids": tiny_batches(1)[0], "past_key_values": cache}
    with pytest.raises(InputError, match="leave them out"):
        grail.compress(model, [batch], 0.5, progress=False)
    assert cache.get_seq_length() == 0


def test_frames_of_sound_count_as_its_samples_do():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    layer = "encoder.layers.0.feed_forward."
    site = grail.Site([layer + "intermediate_dense"], [layer + "output_dense"])
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[1, 200:] = 0
    frames = 3 * 39 + 19  # kernels of 10 and 3, strides of 5 and 2: 400 samples make 39, 200 19
    batch = {"input_values": torch.randn(4, 400), "attention_mask": mask}
    report = grail.compress(model, [batch] * 3, 0.5, [site], progress=False)
    assert report.sites[0].tokens == 3 * frames


def test_a_mask_that_is_not_one_value_a_token_is_refused(tiny_llama, tiny_batches):
    ids = tiny_batches(count=1)[0]
    for mask in (torch.ones(2, 1, 16, 16, dtype=torch.bool), torch.zeros(2, 1, 16, 16)):
        with pytest.raises(InputError, match=r"must be \[B, L\].*got \[2, 1, 16, 16\]"):
            stream_of(tiny_llama(), [{"input_ids": ids, "attention_mask": mask}])


class Convolutions(nn.Module):
    """Blocks of two convolutions with whatever `forward` makes of them."""

    def __init__(self, forward, widths=(4, 4)):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.between = nn.Conv2d(1, widths[0], 1), nn.Conv2d(*widths, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 6, 1), nn.ReLU(), nn.Conv2d(6, n, 1)) for n in widths
        )
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def in_order(network, x):
    return network.blocks[1](network.blocks[0](network.stem(x)))


@pytest.mark.parametrize(
    ("forward", "widths", "message"),
    [
        (lambda n, x: in_order(n, x) - in_order(n, x + 1), (4, 4), "or a block runs again"),
        (lambda n, x: n.blocks[1](n.blocks[0](n.stem(x)) * 2), (4, 4), "between block 1 and the"),
        (
            lambda n, x: n.blocks[1](n.between(n.blocks[0](n.stem(x)).mean((2, 3), True)[:, :4])),
            (4, 8),
            "between block 1 and the",
        ),
        (lambda n, x: n.blocks[0](n.stem(x)), (4, 4), "block 1 of 2 does not run"),
    ],
    ids=["twice", "between", "another shape", "one only"],
)
def test_blocks_that_are_no_chain_are_refused(forward, widths, message):
    network = Convolutions(forward, widths)
    images = [torch.randn(2, 1, 5, 5)]
    with torch.no_grad(), pytest.raises(ModelError, match=message):
        Stream(network, network.blocks, images)


def test_what_a_network_does_behind_its_blocks_is_no_matter():
    # It would fail, for it gets what the blocks got.
    network = Convolutions(lambda n, x: in_order(n, x).reshape(2, 7))
    with torch.no_grad():
        assert len(Stream(network, network.blocks, [torch.randn(2, 1, 5, 5)])) == 1


class Towers(nn.Module):
    """Tells two inputs apart by one layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)

    def embed(self, x):
        return self.down(self.up(x).relu())

    def forward(self, first, second):
        return self.embed(first) - self.embed(second)


def test_a_layer_that_runs_more_than_once_for_a_batch_is_refused():
    network, site = Towers(), grail.Site(producers=["up"], consumers=["down"])
    batches = [(torch.randn(5, 6), torch.randn(5, 6)) for _ in range(3)]
    before = network.up.weight.clone()
    for settings in ({}, {"closed_loop": False}, {"drift_correction": 0.0}):
        with pytest.raises(ModelError, match="down runs more than once for a batch"):
            grail.compress(network, batches, 0.5, sites=[site], progress=False, **settings)
    assert torch.equal(network.up.weight, before)


class Layouts(nn.Module):
    """One MLP that reads the tokens of [B, L, C] in the order of `layout`."""

    def __init__(self, layout="batch first"):
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x, attention_mask=None):
        b, n, _ = x.shape
        if self.layout in ("sequence first", "one row, sequence first"):
            x = x.transpose(0, 1)
        if self.layout in ("one row", "one row, sequence first"):
            x = x.flatten(0, 1)
        if self.layout == "across":
            x = x.reshape(-1, 4, 6)
        if self.layout == "mixed":
            x = x + x.mean(0)
        y = self.down(self.up(x).relu())
        if self.layout == "one row, sequence first":
            y = y.unflatten(0, (n, b))
        if self.layout in ("sequence first", "one row, sequence first"):
            y = y.transpose(0, 1)
        return y.reshape(b, -1, 6)


LAYOUTS = ("batch first", "sequence first", "one row", "one row, sequence first")
SHAPES = [(8, 8), (4, 8), (8, 4), (5, 7), (7, 14), (1, 6), (6, 1)]


@pytest.mark.parametrize("selector", ["greedy", "wanda++"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_one_network_gets_one_result_in_every_layout_of_its_tokens(layout, shape, masked, selector):
    site = grail.Site(producers=["up"], consumers=["down"])
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (1, *[shape[0]] * 4):
        batch = {"x": torch.randn(size, shape[1], 6, generator=generator)}
        if masked:
            batch["attention_mask"] = torch.ones(size, shape[1])
            batch["attention_mask"][: size // 2 + 1, 1 + shape[1] // 2 :] = 0
            batch["x"][batch["attention_mask"] == 0] *= 20
        batches.append(batch)
    alike = shape[0] == 1 or (shape[1] == 1 and layout == LAYOUTS[-1])
    if selector == "wanda++" and "sequence first" in layout and not alike:
        with pytest.raises(ModelError, match="choose another selector"):
            grail.compress(Layouts(layout), batches, 0.5, [site], selector, progress=False)
        return
    found = []
    for network in (Layouts(layout), Layouts()):
        report = grail.compress(network, batches, 0.5, [site], selector, progress=False)
        found.append((network.down.weight, report.sites[0]))
    (weight, row), (expected, other) = found
    # Sums of the same tokens in another order.
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    assert row.tokens == other.tokens
    assert row.alpha == other.alpha


@pytest.mark.parametrize("layout", ["across", "mixed"])
def test_tokens_that_cannot_be_told_apart_are_refused_unless_nothing_hangs_on_it(layout):
    network, site = Layouts(layout), grail.Site(producers=["up"], consumers=["down"])
    batches = [torch.randn(6, 6, 6) for _ in range(3)]
    with pytest.raises(ModelError, match=r"down: which sample .* give alpha, drift_correction=0"):
        grail.compress(network, batches, 0.5, sites=[site], progress=False)
    settings = {"alpha": 1e-3, "drift_correction": 0.0}
    report = grail.compress(network, batches, 0.5, sites=[site], progress=False, **settings)
    assert report.sites[0].tokens == 3 * 36


class Shorter(nn.Module):
    """An MLP that reads every second token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x, attention_mask=None):
        return self.down(self.up(x[:, ::2]).relu())


def test_a_mask_that_does_not_say_which_tokens_of_a_layer_count_is_refused():
    network, site = Shorter(), grail.Site(producers=["up"], consumers=["down"])
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 5:] = 0
    batch = {"x": torch.randn(4, 10, 6), "attention_mask": mask}
    with pytest.raises(ModelError, match=r"down.* reads tokens \[4, 5\].* without padding"):
        grail.compress(network, [batch], 0.5, sites=[site], progress=False)


@pytest.mark.parametrize(
    ("rows", "held"),
    [([1], []), ([2], [1]), ([1, 1, 1], [2]), ([4, 4, 4], [4, 9]), ([3, 0, 9], [4, 9])],
    ids=str,
)
def test_every_fifth_sequence_is_held_out_or_the_last_of_fewer(
    rows, held, tiny_llama, tiny_batches
):
    stream = stream_of(tiny_llama(), [torch.full((n, 4), 5) for n in rows])
    masks = [stream.held_out(batch) for batch in range(len(rows))]
    flags = [torch.zeros(n) if m is None else m for m, n in zip(masks, rows, strict=True)]
    assert torch.cat(flags).nonzero().flatten().tolist() == held


def test_a_fork_moves_on_its_own(tiny_llama, tiny_batches):
    stream = stream_of(tiny_llama(), tiny_batches(count=2))
    first = [hidden.clone() for hidden in stream.hidden]
    other = stream.fork()
    assert all(map(torch.equal, other.hidden, first))
    with torch.no_grad():
        other.store(0, other.run(0, 0))
    assert all(map(torch.equal, stream.hidden, first))
    assert not torch.equal(other.hidden[0], first[0])


def test_sequences_without_a_counted_token_are_not_held_out(tiny_llama):
    ids = torch.full((3, 4), 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    stream = stream_of(tiny_llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert stream.held_out(0).tolist() == [False, True, False]
    alone = stream_of(tiny_llama(), [{"input_ids": ids[1:], "attention_mask": mask[1:]}])
    assert alone.held_out(0) is None


def test_a_block_that_writes_on_its_input_leaves_the_hidden_states_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    with torch.no_grad():
        stream = Stream(model, list(model), [torch.randn(3, 5, 4)])
        before = stream.hidden[0].clone()
        stream.run(0, 0)
    assert torch.equal(stream.hidden[0], before)


def test_hidden_states_go_on_to_wait_elsewhere(tiny_llama, tiny_batches):
    stream = stream_of(tiny_llama(), tiny_batches(count=2))
    before, meta = [hidden.clone() for hidden in stream.hidden], torch.device("meta")
    stream.rest_on(torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(stream.hidden, before, strict=True))
    stream.rest_on(meta)
    stream.store(0, before[0])
    assert stream.storage == meta
    assert [hidden.device for hidden in stream.hidden] == [meta, meta]
    assert [hidden.shape for hidden in stream.hidden] == [hidden.shape for hidden in before]


@pytest.mark.parametrize(("batches", "moved"), [(2, 0), (3, 1)], ids=["fit", "are more"])
def test_batches_leave_for_the_cpu_once_they_outgrow_their_room(
    batches, moved, tiny_llama, tiny_batches, monkeypatch
):
    places = []
    monkeypatch.setattr(Stream, "rest_on", lambda stream, place: places.append(place))
    model, found = tiny_llama(), tiny_batches(count=batches)
    size = found[0].numel() * model.config.hidden_size * 4
    with torch.no_grad():
        Stream(model, find(model).blocks, found, room=2 * size)
    assert places == moved * [torch.device("cpu")]
