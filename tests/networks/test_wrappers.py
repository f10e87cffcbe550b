"""Wrapped models are refused by the name of the wrapper, wherever it is."""

import pytest
import torch
from torch import nn

import grail
from grail.errors import ModelError


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compile": (compiled, r"is compiled.*_orig_mod"),
    "data parallel": (nn.DataParallel, r"is wrapped in DataParallel.*model\.module"),
}
WRAPPERS_OF_ANY = {**WRAPPERS, "script": (torch.jit.script, "is a TorchScript module")}
VERBS = {
    "compress": lambda model, batches: grail.compress(model, batches, 0.5, progress=False),
    "sensitivity": lambda model, batches: grail.sensitivity(model, batches, progress=False),
    "inspect": lambda model, batches: grail.inspect(model),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(("wrap", "message"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_refused(wrap, message, verb, tiny_llama, tiny_batches):
    with pytest.raises(ModelError, match=message):
        verb(wrap(tiny_llama()), tiny_batches())


@pytest.mark.parametrize(("wrap", "message"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_with_a_wrapped_part_is_refused(wrap, message, tiny_llama, tiny_batches):
    model = tiny_llama()
    model.model.layers[1].mlp = wrap(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp {message}"):
        grail.compress(model, tiny_batches(), 0.5, progress=False)


def test_a_network_of_named_sites_is_refused_too():
    model = compiled(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    with pytest.raises(ModelError, match="is compiled"):
        grail.compress(model, [torch.randn(9, 4)], 0.5, [grail.Site(["0"], ["2"])], progress=False)


@pytest.mark.parametrize("inside", [False, True], ids=["PeftModel", "injected"])
def test_adapters_are_to_be_merged_first(inside, tiny_llama, tiny_batches):
    peft = pytest.importorskip("peft")
    config, model = peft.LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_llama()
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ModelError, match="merge_and_unload"):
        grail.compress(model if inside else wrapped, tiny_batches(), 0.5, progress=False)
    report = grail.compress(wrapped.merge_and_unload(), tiny_batches(), 0.5, progress=False)
    assert all(row.kept < row.channels for row in report.sites)


def perceptron(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 3)).to(dtype)


@pytest.mark.parametrize(("wrap", "message"), WRAPPERS_OF_ANY.values(), ids=WRAPPERS_OF_ANY)
def test_a_trace_refuses_wrapped_models_in_the_same_words(wrap, message):
    with pytest.raises(ModelError, match=message):
        grail.trace(wrap(perceptron()))


def quantised():
    return torch.ao.quantization.quantize_dynamic(perceptron(), {nn.Linear})


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
@pytest.mark.parametrize(
    ("make", "message"),
    [(quantised, "has a quantised layer, 0"), (nn.ReLU, "ReLU has no parameters")],
)
def test_a_model_without_parameters_is_refused(make, message):
    sites = [grail.Site(["0"], ["2"])]
    with pytest.raises(ModelError, match=message):
        grail.compress(make(), [torch.randn(7, 5)], 0.5, sites, progress=False)


VERBS_OF_ANY = {
    **VERBS,
    "collect": lambda model, batches: grail.collect(model, batches, output="none"),
}


def unread():
    raise AssertionError("a batch was read")
    yield


@pytest.mark.parametrize("verb", [v for v in VERBS_OF_ANY if v != "sensitivity"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_model_in_float64_is_refused_before_any_work(family, verb, tiny_model):
    with pytest.raises(ModelError, match=r"computes in float64.*model\.float\(\)"):
        VERBS_OF_ANY[verb](tiny_model(family).double(), unread())


@pytest.mark.parametrize("named", [True, False])
def test_other_networks_in_float64_are_refused_too(named):
    from tests.convnets import images, network

    model, batches, sites = network("cifar").double(), images(), None
    if named:
        model, sites = perceptron(torch.float64), [grail.Site(["0"], ["2"])]
        batches = [torch.randn(7, 5, dtype=torch.float64)]
    for verb in (grail.compress, grail.sensitivity):
        with pytest.raises(ModelError, match=r"computes in float64.*model\.float\(\)"):
            verb(model, batches, sites=sites, progress=False)
