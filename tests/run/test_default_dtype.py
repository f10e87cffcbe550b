"""torch's default dtype changes no bit: every tensor of the package has a dtype of its own."""

import ast
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import grail
import grail_kernels as gk
from grail import select
from tests import convnets

ROOT = Path(__file__).parents[2]
# Of torch's factories those whose dtype follows the default for some arguments.
FACTORIES = {"as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones"}
FACTORIES |= {"rand", "randn", "scalar_tensor", "tensor", "zeros"}
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def numbers(report: grail.Report) -> list[tuple]:
    return [(s.name, s.error, s.baseline_error, s.alpha, s.damping) for s in report.sites]


def assert_same_bits(model, dtype, run) -> None:
    """`run(model)` gives the same numbers and weights with another default dtype."""
    other = copy.deepcopy(model)
    expected = run(model)
    with default_dtype(dtype):
        found = run(other)
    assert repr(found) == repr(expected)
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def compressing(batches, **settings):
    def run(model):
        return numbers(grail.compress(model, batches, 0.5, progress=False, **settings))

    return run


SETTINGS = {
    "defaults": {},
    "heads": {"sites": "mlp,heads"},
    "open": {"closed_loop": False, "drift_correction": 0},
    "bias": {"fit_bias": True},
    "zero": {"toward": "zero"},
    "dropping": {"non_finite": "drop"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_decoder(name, dtype, tiny_llama, tiny_batches):
    assert_same_bits(tiny_llama(), dtype, compressing(tiny_batches(6), **SETTINGS[name]))


@pytest.mark.parametrize("family", ["mixtral", "granite", "gpt_neox"])
def test_other_families(family, dtype, tiny_model, tiny_batches):
    assert_same_bits(tiny_model(family), dtype, compressing(tiny_batches(6)))


@pytest.mark.parametrize("name", ["torchvision-basic", "torchvision-mobilenet"])
@pytest.mark.parametrize("settings", [{}, {"repair": True, "selector": "folding"}], ids=str)
def test_a_convolutional_network(name, settings, dtype):
    model, images = convnets.network(name), convnets.images()
    assert_same_bits(model, dtype, compressing(images, **settings))


@pytest.mark.parametrize("selector", select.names())
def test_every_selector(selector, tiny_llama, tiny_batches):
    run = compressing(tiny_batches(4), selector=selector)
    assert_same_bits(tiny_llama(num_hidden_layers=1), torch.bfloat16, run)


def test_a_model_of_that_dtype_keeps_it(dtype, tiny_llama, tiny_batches):
    if dtype == torch.float64:
        pytest.skip("activations of fp64 are refused, whatever the default")
    model = tiny_llama().to(dtype)
    assert_same_bits(model, dtype, compressing(tiny_batches(6)))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_sensitivity(dtype, tiny_llama, tiny_batches):
    def run(model):
        measured = grail.sensitivity(model, tiny_batches(6), progress=False)
        return measured.losses, measured.shares()

    assert_same_bits(tiny_llama(), dtype, run)


def test_tracing_and_a_network_that_was_saved(dtype, tmp_path):
    model, images = convnets.network("cifar"), convnets.images()
    folders = iter([tmp_path / "a", tmp_path / "b"])

    def run(model):
        sites = grail.trace(model)
        found = numbers(grail.compress(model, images, 0.5, sites, progress=False))
        folder = grail.save(model, next(folders))
        loaded = grail.load(folder, lambda: convnets.network("cifar"))
        with torch.no_grad():
            assert torch.equal(loaded(images[0]), model(images[0]))
        return found

    assert_same_bits(model, dtype, run)


@pytest.mark.parametrize("uneven", [False, True])
def test_an_exported_model(uneven, dtype, tiny_llama, tiny_batches, tiny_tokenizer, tmp_path):
    model, tokens = tiny_llama(), tiny_batches()[0]
    with default_dtype(dtype):
        keep = {"mlp": [0.5, 0.8] if uneven else 0.5}
        grail.compress(model, tiny_batches(), keep, progress=False)
        grail.export(model, tiny_tokenizer(), tmp_path / "out", uneven=uneven)
        loaded, _ = grail.load_model(tmp_path / "out")
        with torch.no_grad():
            found, expected = loaded(tokens).logits, model(tokens).logits
    assert expected.dtype == found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_fit_and_the_kernels(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700, 37, generator=generator, dtype=torch.float32)
    weight = torch.randn(5, 37, generator=generator, dtype=torch.float32)
    keep = torch.arange(0, 37, 3)

    def run():
        gram, held_out = (grail.Gram(37, "cpu", buffer=1000) for _ in range(2))
        gram.update(x[:2], mask=x[:2, :, 0] > 0, drift=x[:2, :, :5])
        held_out.update(x[2], drift=x[2, :, :5])
        settings = {"alpha": "auto", "drift_correction": "auto", "fit_bias": True}
        fits = [
            grail.fit(gram, reduction, weight, held_out=held_out, **settings)
            for reduction in (
                grail.Selection(keep, 37),
                grail.Folding(torch.arange(37) // 4),
                grail.Selection(range(37), 37),
            )
        ]
        out = torch.zeros(gk.packed_numel(37), dtype=torch.float32)
        gk.gram_(out, x, weights=x[..., 0].abs())
        gk.gram_swiglu_(out, x, x)
        absorbed = gk.absorb(weight, out, keep), gk.absorb(weight, gk.unpack(out, 37), keep)
        shifts = [fit.shifts[0] for fit in fits]
        return [fit.weight for fit in fits] + shifts + [out, *absorbed, gram.matrix(), gram.sum]

    expected = run()
    with default_dtype(dtype):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("package", ["grail", "grail_kernels"])
def test_every_factory_call_names_its_dtype(package):
    calls, missing = 0, []
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in of_torch()):
                continue
            calls += 1
            if "dtype" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert calls > 1
    assert not missing


def of_torch() -> set[str]:
    return {f"torch.{name}" for name in FACTORIES}
