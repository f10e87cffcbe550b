"""Blocks brought to a device one at a time: on a CPU to copies beside what the host holds."""

import copy
import itertools
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch

import grail
from grail.errors import InputError
from grail.runtime.onload import Onloader, require_usable
from tests.convnets import images, network
from tests.run.test_compress import assert_interrupted_and_untouched

CPU = torch.device("cpu")


@pytest.fixture
def apart(monkeypatch):
    """While a block is on the device, what the host holds of it is spoiled."""
    bring = Onloader.__call__

    @contextmanager
    def brought(self, number):
        block = self._blocks[number]
        host = [t.data for t in itertools.chain(block.parameters(), block.buffers())]
        with bring(self, number):
            kept = [data.clone() for data in host]
            for data in host if self._device else ():
                data.fill_(float("nan") if data.is_floating_point() else 0)
            try:
                yield
            finally:
                for data, was in zip(host, kept, strict=True):
                    data.copy_(was)

    monkeypatch.setattr(Onloader, "__call__", brought)


def assert_same_bits(model, batches, **settings):
    """Compresses a model where it is, and a copy block by block."""
    other = copy.deepcopy(model)
    expected = grail.compress(model, batches, keep=0.5, progress=False, **settings)
    report = grail.compress(other, batches, keep=0.5, progress=False, onload="cpu", **settings)
    assert [row.error for row in report.sites] == [row.error for row in expected.sites]
    found = other.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"closed_loop": False},
        {"selector": "wanda++"},
        {"fit_bias": True},
        {"selector": "folding", "sites": ("mlp",)},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_only_the_copies_are_read_and_the_bits_are_the_same(
    family, settings, tiny_model, tiny_inputs
):
    model = tiny_model(family, **({"mlp_bias": True} if family == "llama" else {}))
    settings = {"sites": ("mlp", "heads"), **settings}
    assert_same_bits(model, tiny_inputs(family), **settings)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("settings", [{}, {"repair": True}], ids=["default", "repair"])
def test_convolutional_blocks_and_their_batch_norms_travel_too(settings):
    assert_same_bits(network("torchvision-basic"), images(), **settings)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_become_the_same(family, tiny_model, tiny_batches):
    assert_same_bits(tiny_model(family), tiny_batches(), sites=("experts",))


@pytest.fixture
def copied(monkeypatch):
    """`copied(blocks)`: lists, by address on the host, weights that are copied; how many are held.

    With the list comes a condition to wait for it to grow.
    """
    to = torch.Tensor.to

    def watch(blocks):
        homes = {parameter.data_ptr() for parameter in blocks.parameters()}
        held, seen, grown = weakref.WeakSet(), [], threading.Condition()

        def noted(tensor, *args, **options):
            made = to(tensor, *args, **options)
            if options.get("copy") and tensor.data_ptr() in homes:
                with grown:
                    held.add(made)
                    seen.append((tensor.data_ptr(), len(held)))
                    grown.notify_all()
            return made

        monkeypatch.setattr(torch.Tensor, "to", noted)
        return seen, grown

    return watch


def test_two_blocks_are_on_the_device_at_most(tiny_llama, tiny_batches, copied):
    model = tiny_llama(num_hidden_layers=5)
    seen, _ = copied(model.model.layers)
    each = len(list(model.model.layers[0].parameters()))
    grail.compress(model, tiny_batches(), keep=0.5, progress=False, onload="cpu")
    homes, held = zip(*seen, strict=True)
    assert max(held) == 2 * each
    # One block of the five is rehearsed, then each weight comes once.
    assert len(homes) == 6 * each
    assert len(set(homes[each:])) == 5 * each
    assert held[each - 1 :: each] == (each, each, *(2 * each for _ in range(4)))


def test_the_next_block_is_on_its_way_while_one_works(tiny_llama, copied):
    blocks = tiny_llama(num_hidden_layers=3).model.layers
    seen, grown = copied(blocks)
    first, second = ({p.data_ptr() for p in block.parameters()} for block in blocks[:2])
    bring = Onloader(blocks, CPU)
    with bring(0), grown:
        assert grown.wait_for(lambda: {home for home, _ in seen} == first | second, timeout=30)
    with bring(1), bring(2):
        assert len(seen) == 3 * len(first)  # each weight once


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_the_host_as_it_was(error, tiny_llama, tiny_batches):
    assert_interrupted_and_untouched(
        tiny_llama(),
        tiny_batches(),
        error,
        last=2,  # in the second block
        onload="cpu",
    )


@pytest.mark.usefixtures("apart")
def test_statistics_are_collected_block_by_block(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama()
    for name, place in (("a", None), ("b", "cpu")):
        grail.collect(model, tiny_batches(), output=tmp_path / name, progress=False, onload=place)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.train.state"))
    assert len(files) == 2
    for name in files:
        ours, theirs = (grail.Gram.load(tmp_path / folder / name) for folder in "ab")
        assert torch.equal(ours.matrix(), theirs.matrix())


def test_what_cannot_be_brought_is_refused(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches()
    with pytest.raises(InputError, match="device 'abacus' cannot be used here"):
        grail.compress(model, batches, onload="abacus")
    model.model.layers[1].to("meta")  # as accelerate leaves what it offloads
    for place in (None, "cpu"):
        with pytest.raises(InputError, match=r"weights are on cpu, meta: load it .* onload='cuda'"):
            grail.compress(model, batches, onload=place)
    with pytest.raises(InputError, match=r"weights are on meta"):
        grail.compress(model.to("meta"), batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_weights_block_by_block(tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=4)
    there = copy.deepcopy(model).to("cuda")
    settings = {"keep": 0.5, "sites": ("mlp", "heads"), "progress": False}
    grail.compress(model, tiny_batches(), onload="cuda", **settings)
    grail.compress(there, [batch.to("cuda") for batch in tiny_batches()], **settings)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for name, weight in there.named_parameters():
        # Not bit for bit: embeddings and rotary angles are the host's here, the GPU's there.
        torch.testing.assert_close(model.get_parameter(name), weight.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "built", "count", "said"),
    [
        ("cuda", False, 0, "is built for the CPU alone"),
        ("cuda", True, 0, "torch sees no GPU or no driver for one"),
        ("cuda:2", True, 2, "there are 2 GPUs, cuda:0 to cuda:1"),
        ("gpu", True, 2, "torch calls a GPU cuda"),
        ("meta", True, 2, "it holds no values"),
        ("abacus", True, 2, "Expected one of cpu, cuda"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_with_the_reason(
    monkeypatch, device, built, count, said
):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(torch, "empty", fail)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(InputError, match=f"'{device}' cannot be used here: .*{said}.*; choose cpu"):
        require_usable(device)
