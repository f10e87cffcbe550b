"""`grail.accumulate`: any loop, one Gram for each input, against products in fp64."""

import pytest
import torch
from torch import nn

import grail
from grail.errors import EmptyCalibrationError, InputError, ModelError, NonFiniteError
from tests import processes


def expected(model, batches, name, window=lambda x: x):
    """Σ x xᵀ of what a layer reads, in fp64."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(window(args[0])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    tokens = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    return tokens.T @ tokens


def run(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(batch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_layers_of_one_input_share_the_gram_of_what_they_read(tiny_llama, tiny_batches, mode):
    model, batches = tiny_llama(), tiny_batches(count=3)
    with grail.accumulate(model) as grams, mode():
        for batch in batches:
            model(batch)
    block = "model.layers.0."
    assert tuple(block + f"self_attn.{n}_proj" for n in "qkv") in grams.groups
    assert (block + "mlp.gate_proj", block + "mlp.up_proj") in grams.groups
    assert len(grams.groups) == 4 * 2 + 1  # of two blocks, and the head
    assert grams[block + "self_attn.q_proj"] is grams[block + "self_attn.v_proj"]
    for name in grams:
        reference = expected(model, batches, name)
        error = (grams[name].matrix() - reference).norm() / reference.norm()
        assert error < 1e-6
        assert grams[name].samples == sum(len(batch) for batch in batches)
        assert grams[name].tokens == sum(batch.numel() for batch in batches)


def test_without_sharing_every_layer_has_its_own(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=2)
    with grail.accumulate(model, share=False) as own:
        run(model, batches)
    with grail.accumulate(model) as shared:
        run(model, batches)
    assert len(own.groups) == len(own) == len(shared)
    for name in own:
        assert torch.equal(own[name].matrix(), shared[name].matrix())


def test_names_and_filters_choose_layers(tiny_llama, tiny_batches):
    model = tiny_llama()
    names = ["model.layers.1.mlp.down_proj", "lm_head"]
    with grail.accumulate(model, names) as grams:
        run(model, tiny_batches(count=1))
    assert list(grams) == names
    with grail.accumulate(model, lambda name, _: name.endswith("o_proj")) as grams:
        pass
    assert list(grams) == [f"model.layers.{n}.self_attn.o_proj" for n in range(2)]
    with pytest.raises(EmptyCalibrationError):
        grams[next(iter(grams))].matrix()


class Branches(nn.Module):
    """Two layers of one input, which may change between them or differ from call to call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)
        self.between = lambda x: x

    def forward(self, x):
        return self.one(x) + self.two(self.between(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_changed_in_place_is_another(mode):
    model = Branches()
    model.between = lambda x: x.mul_(2)
    with mode():
        x = torch.randn(5, 6)
        with grail.accumulate(model) as grams:
            model(x.clone())
    assert len(grams.groups) == 2
    torch.testing.assert_close(grams["two"].matrix(), 4 * grams["one"].matrix())


def test_layers_that_part_later_have_the_sum_of_what_each_read():
    model, first, second = Branches(), torch.randn(5, 6), torch.randn(7, 6)
    with grail.accumulate(model) as grams:
        run(model, [first])
        assert len(grams.groups) == 1
        model.between = lambda x: 2 * x
        run(model, [second])
        model.one(first)
    assert grams.groups == [("one",), ("two",)]
    for name, read in (("one", [first, second, first]), ("two", [first, 2 * second])):
        tokens = torch.cat(read).double()
        reference = tokens.T @ tokens
        assert (grams[name].matrix() - reference).norm() < 1e-6 * reference.norm()
        assert grams[name].tokens == len(tokens)


def test_a_layer_that_the_last_call_left_out_has_no_part_of_it():
    model, first, last = Branches(), torch.randn(5, 6), torch.randn(3, 6)
    with grail.accumulate(model) as grams:
        run(model, [first])
        model.one(last)
    assert (grams["one"].tokens, grams["two"].tokens) == (8, 5)
    torch.testing.assert_close(grams["two"].matrix(), first.T @ first)


def test_an_input_that_changes_between_two_readers_of_a_gram_is_an_error():
    model, x = Branches(), torch.randn(5, 6)
    hooked = grail.accumulate(model)
    hooked.__enter__()
    run(model, [x])
    model.between = lambda x: x.mul_(2)
    with pytest.raises(ModelError, match="changed in place before all of 2 layers") as found:
        run(model, [x])
    assert not hooked.__exit__(found.type, found.value, found.tb)
    assert not model.one._forward_pre_hooks  # hooks are gone after the error, too


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Conv3d(4, 2, 2, dilation=2),
    ],
    ids=str,
)
def test_the_gram_of_a_convolution_says_what_its_outputs_are(layer):
    """wᵀ G w is the energy of a group's outputs, for any weight of its columns."""
    axes = layer.weight.dim() - 2
    x = torch.randn(3, 4, *[7] * axes)
    with grail.accumulate(nn.Sequential(layer)) as grams, torch.no_grad():
        layer(x)
    gram = grams["0"]
    weight = torch.randn(layer.weight.shape[2:].numel() * 4 // layer.groups)
    with torch.no_grad():
        shape = (1, 4 // layer.groups, *layer.weight.shape[2:])
        kernel = weight.view(shape).expand(layer.groups, *shape[1:])
        one = type(layer)(
            4,
            layer.groups,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            groups=layer.groups,
            dilation=layer.dilation,
            bias=False,
        )
        if layer.transposed:
            kernel = kernel.flip(tuple(range(2, kernel.dim()))).reshape(4, 1, *shape[2:])
        one.weight = nn.Parameter(kernel.clone())
        energy = one(x).double().square().sum()
    assert gram.samples == 3
    found = weight.double() @ gram.matrix().double() @ weight.double()
    torch.testing.assert_close(found, energy, rtol=1e-5, atol=0)


def test_two_convolutions_of_one_input_share_only_with_the_same_windows():
    class Two(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3, stride=stride)

        def forward(self, x):
            return self.one(x).sum() + self.two(x).sum()

    for stride, groups in ((1, 1), (2, 2)):
        model = Two(stride)
        with grail.accumulate(model) as grams:
            run(model, [torch.randn(2, 3, 8, 8)])
        assert len(grams.groups) == groups


def test_bad_input_is_refused(tiny_llama):
    model = tiny_llama()
    for layers, message in (
        (["nowhere"], "has no layer 'nowhere'"),
        ([], "layers is empty"),
        (lambda *_: False, "no layer of LlamaForCausalLM"),
    ):
        with pytest.raises(InputError, match=message), grail.accumulate(model, layers):
            pass
    with (
        pytest.raises(ModelError, match="LlamaMLP has no weight"),
        grail.accumulate(model, ["model.layers.0.mlp"]),
    ):
        pass


def test_nan_is_refused_or_propagated(tiny_llama):
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(5, 4)
    x[2, 1] = float("nan")
    with pytest.raises(NonFiniteError), grail.accumulate(model):
        run(model, [x])
    with grail.accumulate(model, non_finite="propagate") as grams:
        run(model, [x])
    assert grams["0"].hessian(per="token").isnan().any()
    assert grams["0"].hessian()[0, 0] == pytest.approx((x[:, 0] ** 2).sum().item(), rel=1e-6)


def _share(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(10 * (number + 1), 6, generator=generator)


def _all_reduced(number):
    torch.manual_seed(0)
    model = Branches()
    with grail.accumulate(model) as grams:
        run(model, [_share(number)])
    grams.all_reduce()
    return {name: gram.matrix() for name, gram in grams.items()}


def test_processes_have_the_sums_of_all():
    found = processes.run(2, _all_reduced)
    x = torch.cat([_share(number) for number in range(2)]).double()
    for grams in found:
        for matrix in grams.values():
            torch.testing.assert_close(matrix.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def _one_without_a_batch(number):
    model = Branches()
    with grail.accumulate(model) as grams:
        run(model, [_share(0)][number:])
    grams.all_reduce()


def test_processes_that_share_otherwise_are_refused():
    for message in processes.run(2, _one_without_a_batch):
        assert message.startswith("InputError: the layers that share a Gram must be the same")
