"""Wanda++'s regional gradients against autograd, sequence by sequence, at the dense inputs."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail import select
from grail.errors import ModelError, NonFiniteError


class Listening:
    """A selector that remembers the gradients it saw, by the channels of the site."""

    needs_gradient = True

    def __init__(self):
        self.seen = {}

    def __call__(self, view):
        self.seen.setdefault(view.width.channels, []).append(view.gradient)
        return view.width.best(view.gram.energy)


def seen(model, batches, **settings):
    listening = Listening()
    settings = {"sites": ("mlp",), "compensate": False, **settings}
    grail.compress(
        copy.deepcopy(model), batches, 0.5, selector=listening, progress=False, **settings
    )
    return listening.seen


def expected(network, block, layer, batches, rows=lambda batch, output: output):
    """√(mean over sequences of (∂‖rows of the block's output‖/∂W)²), by whole forward passes."""
    squares, count = 0, 0
    for batch in batches:
        outputs = []
        handle = block.register_forward_hook(lambda *args, to=outputs: to.append(args[2]))
        network(**batch) if isinstance(batch, dict) else network(batch)
        handle.remove()
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        for sequence in rows(batch, output):
            (gradient,) = torch.autograd.grad(sequence.norm(), layer.weight, retain_graph=True)
            squares, count = squares + gradient.double().square(), count + 1
    return (squares / count).sqrt()


def assert_close(gradient, reference):
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_gradients_are_those_of_each_sequence_at_the_blocks_input(closed, tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=3)
    layers = model.model.layers
    gradients = seen(model, batches, closed_loop=closed)[80]
    for layer, gradient in list(zip(layers, gradients, strict=True))[: 1 if closed else 2]:
        assert_close(gradient, expected(model, layer, layer.mlp.down_proj, batches))


def test_an_open_loop_takes_them_before_anything_is_narrowed(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=1), tiny_batches(count=2)
    layer = model.model.layers[0]
    both = seen(model, batches, sites=("heads", "mlp"), closed_loop=False)
    assert_close(both[80][0], expected(model, layer, layer.mlp.down_proj, batches))
    assert_close(both[48][0], expected(model, layer, layer.self_attn.o_proj, batches))


def test_held_out_sequences_have_no_say(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=1), tiny_batches(count=3, rows=2)
    others = [batch.clone() for batch in batches]
    others[2][0] = others[2][0].flip(0)  # the fifth of six sequences
    chosen = {"compensate": True, "alpha": "auto"}
    ours, theirs = (seen(model, given, **chosen)[80][0] for given in (batches, others))
    assert torch.equal(ours, theirs)
    ours, theirs = (seen(model, given)[80][0] for given in (batches, others))  # none is held out
    assert not torch.equal(ours, theirs)


def test_nothing_before_the_consumer_is_kept_for_autograd(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=1), tiny_batches(count=1)
    trained = [p.requires_grad for p in model.parameters()]
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seen(model, batches)
    assert kept
    assert not [t.shape for t in kept if sorted(t.shape) == [48, 80]]  # what gates and ups are of
    assert [p.requires_grad for p in model.parameters()] == trained


def test_padding_has_no_say(tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=1)
    layer = model.model.layers[0]
    mask = torch.ones(tiny_batches()[0].shape, dtype=torch.long)
    mask[0, 5:], mask[1] = 0, 0
    batches = [{"input_ids": ids, "attention_mask": mask} for ids in tiny_batches(count=2)]
    reference = expected(
        model,
        layer,
        layer.mlp.down_proj,
        batches,
        lambda batch, output: [
            o[m] for o, m in zip(output, batch["attention_mask"] > 0, strict=True) if m.any()
        ],
    )
    assert_close(seen(model, batches)[80][0], reference)


class Images(nn.Module):
    """Convolutions, of which one with a stride reads the site, and a linear layer behind them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return {"scores": self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_convolutions_and_outputs_by_name(closed):
    network = Images()
    batches = [torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    sites = [
        grail.Site(producers=["first"], consumers=["second"]),
        grail.Site(producers=["second"], consumers=["last"]),
    ]
    gradients = seen(network, batches, sites=sites, closed_loop=closed)
    by_tap = expected(
        network, network, network.second, batches, lambda _, output: list(output["scores"])
    )
    assert_close(gradients[6][0], by_tap.movedim(1, -1).flatten(0, -2))
    if not closed:
        rows = expected(
            network, network, network.last, batches, lambda _, output: list(output["scores"])
        )
        assert_close(gradients[4][0], rows)


def test_a_block_without_a_tensor_is_refused():
    class Silent(Images):
        def forward(self, x):
            super().forward(x)
            return {"scores": None}

    with pytest.raises(ModelError, match="no tensor to take a gradient of"):
        seen(Silent(), [torch.randn(2, 1, 9, 9)], sites=[grail.Site(["first"], ["second"])])


def test_scores_of_nan_choose_nothing(tiny_llama, tiny_batches):
    def broken(view):
        return view.gram.energy.log() * torch.nan

    scored = select.Registered("broken", broken)
    with pytest.raises(NonFiniteError, match="scores of selector 'broken'"):
        grail.compress(tiny_llama(), tiny_batches(), 0.5, selector=scored, progress=False)
