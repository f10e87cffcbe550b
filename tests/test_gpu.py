"""What a whole run gives on a GPU is what it gives on the CPU, for every family and selector."""

import copy

import pytest
import torch

import grail
from grail.select import names
from grail_kernels.products import add_products

FAMILIES = ("llama", "gpt2", "qwen2_moe", "bert", "vit")


def errors(model, batches, **options):
    report = grail.compress(model, batches, keep=0.5, progress=False, **options)
    return {row.name: row.error for row in report.sites}


def moved(batches, device):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def assert_a_gpu_agrees(model, batches, **options):
    there = copy.deepcopy(model).to("cuda")
    here = errors(model, batches, **options)
    assert errors(there, moved(batches, "cuda"), **options) == pytest.approx(here, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_restores_every_family_as_the_cpu_does(family, tiny_model, tiny_inputs):
    assert_a_gpu_agrees(tiny_model(family), tiny_inputs(family))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("selector", names())
def test_a_gpu_chooses_and_restores_as_the_cpu_does(selector, tiny_model, tiny_inputs):
    assert_a_gpu_agrees(tiny_model("llama"), tiny_inputs("llama"), selector=selector)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_gpu_corrects_attention_as_the_cpu_does(family, tiny_model, tiny_inputs):
    assert_a_gpu_agrees(tiny_model(family), tiny_inputs(family), correct_attention=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_measures_what_sites_cost_as_the_cpu_does(family, tiny_model, tiny_inputs):
    model, batches = tiny_model(family), tiny_inputs(family)
    here = grail.sensitivity(model, batches, progress=False)
    there = copy.deepcopy(model).to("cuda")
    found = grail.sensitivity(there, moved(batches, "cuda"), progress=False)
    assert found.losses == pytest.approx(here.losses, rel=1e-2)  # differences of nearby outputs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "outputs", "channels"), [(0, 3, 5), (70, 1, 33), (300, 40, 64)])
def test_a_gpu_adds_products_of_16_bits_where_they_belong(dtype, tokens, outputs, channels):
    left = torch.randn(tokens, outputs, device="cuda")
    right = torch.randn(tokens, channels, device="cuda").to(dtype)
    total = torch.randn(outputs, channels, device="cuda")
    before, place = total.double(), total.data_ptr()
    add_products(total, left, right)
    exact = before + left.double().T @ right.double()
    bound = 2**-16 * (before.abs() + left.double().abs().T @ right.double().abs())
    assert total.data_ptr() == place
    assert ((total.double() - exact).abs() <= bound).all()
