"""torch.ops.grail.*: the kernels as operators that torch.compile can carry."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference
from tests.kernels.cases import positive
from tests.kernels.conftest import Runner, every_runner

CHANNELS = 67


def zeros() -> Tensor:
    return torch.zeros(gk.packed_numel(CHANNELS))


def gram(x: Tensor) -> tuple[Tensor, ...]:
    out, sums = zeros(), torch.zeros(CHANNELS)
    gk.gram_(out, x.tanh(), mask=x[..., 0] > 0, sums=sums)
    return gk.unpack(out, CHANNELS), sums


def gram_of_operator(x: Tensor) -> tuple[Tensor, ...]:
    out, sums = zeros(), torch.zeros(CHANNELS)
    torch.ops.grail.gram_(out, x.tanh(), x[..., 0] > 0, None, sums, None)
    return gk.unpack(out, CHANNELS), sums


def gram_swiglu(x: Tensor) -> tuple[Tensor, ...]:
    out = zeros()
    gk.gram_swiglu_(out, x, x.tanh())
    return (gk.unpack(out, CHANNELS),)


def gram_ragged(x: Tensor) -> tuple[Tensor, ...]:
    out = torch.zeros(2, gk.packed_numel(CHANNELS))
    gk.gram_ragged_(out, x.tanh(), torch.tensor([0, 20, 50]))
    return (gk.unpack(out, CHANNELS),)


def gram_batched(x: Tensor) -> tuple[Tensor, ...]:
    out, sums = torch.zeros(5, gk.packed_numel(CHANNELS)), torch.zeros(5, CHANNELS)
    heads = x.tanh().view(10, 5, CHANNELS).transpose(0, 1)
    gk.gram_batched_(out, heads, mask=x[:10, 0] > 0, sums=sums)
    return gk.unpack(out, CHANNELS), sums


def absorb(x: Tensor) -> tuple[Tensor, ...]:
    out, keep = zeros(), x[0].argsort()[:20]
    gk.gram_(out, x)
    return gk.absorb(x.tanh(), out, keep), torch.ops.grail.absorb(x, gk.unpack(out, CHANNELS), keep)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function", [gram, gram_of_operator, gram_swiglu, gram_ragged, gram_batched, absorb]
)
def test_compiled_code_gives_the_same_bits(
    function: Callable[[Tensor], tuple[Tensor, ...]], backend: str
) -> None:
    x = positive(50, CHANNELS)
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for expected, got in zip(function(x), compiled(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (torch.ops.grail.gram_, lambda: (zeros(), positive(50, CHANNELS), *[None] * 4)),
        (
            torch.ops.grail.gram_,
            lambda: (zeros(), positive(50, CHANNELS), *[None] * 4, positive(50, CHANNELS)),
        ),
        (
            torch.ops.grail.gram_,
            lambda: (
                zeros()[None],
                positive(50, CHANNELS),
                *[None] * 5,
                torch.tensor([0, 50]),
            ),
        ),
        (
            torch.ops.grail.gram_,
            lambda: (
                zeros().expand(2, -1).clone(),
                positive(50, 2, CHANNELS).transpose(0, 1),
                *[None] * 4,
            ),
        ),
        (
            torch.ops.grail.absorb,
            lambda: (positive(5, CHANNELS), zeros() + 1, torch.tensor([66, 0, 3])),
        ),
    ],
    ids=["gram_", "gated", "ragged", "batched", "absorb"],
)
def test_operators_declare_what_they_do(
    operator: Callable[..., None], arguments: Callable[[], tuple[Tensor, ...]]
) -> None:
    torch.library.opcheck(operator, arguments())


def test_what_is_written_has_no_default() -> None:
    # torch 2.11 strips trailing defaults from a call, and then misses them among what is written.
    schema = torch.ops.grail.gram_.default._schema
    written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert [a.name for a in written] == ["out", "sums", "nonfinite"]
    assert not [a.name for a in written if a.has_default_value()]


def test_a_wrong_shape_is_refused_while_tracing() -> None:
    fake = torch.zeros(5, 3, device="meta")
    with pytest.raises(gk.InputError, match="3 channels has"):
        torch.ops.grail.gram_(torch.zeros(4, device="meta"), fake, None, None, None, None)
    with pytest.raises(gk.InputError, match="3 channels has"):
        torch.ops.grail.absorb(fake, torch.zeros(4, device="meta"), fake[0].long())


FORMS = {
    "single": ((3, 40, CHANNELS), None),
    "batched": ((3, 40, CHANNELS), None),
    "ragged": ((120, CHANNELS), torch.tensor([0, 30, 30, 100])),
}


@every_runner
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", ["like", "unlike"])
def test_gate_mask_and_weights_go_with_every_form(form: str, strides: str, runner: Runner) -> None:
    shape, offsets = FORMS[form]
    gate, up = positive(*shape), positive(*shape)
    gate = gate if strides == "like" else gate.mT.contiguous().mT
    tokens = shape[1:-1] if form == "batched" else shape[:-1]
    mask, weights = torch.rand(tokens) < 0.7, torch.rand(tokens)
    hidden = torch.nn.functional.silu(gate) * up
    expected = []
    if offsets is not None:
        cuts = [slice(*pair) for pair in pairwise(offsets.tolist())]
        expected = [(hidden[cut], mask[cut], weights[cut]) for cut in cuts]
    elif form == "batched":
        expected = [(matrix, mask, weights) for matrix in hidden]
    else:
        expected = [(hidden, mask, weights)]
    out = zeros() if form == "single" else zeros().repeat(len(expected), 1)
    out, up, mask, weights, gate = (t.to(runner.device) for t in (out, up, mask, weights, gate))
    torch.ops.grail.gram_(out, up, mask, weights, None, None, gate, offsets, backend=runner.backend)
    for packed, (x, counts, scales) in zip(
        out.cpu().view(-1, out.shape[-1]), expected, strict=True
    ):
        exact = reference.gram(x, counts, scales)
        magnitude = reference.gram(x.abs(), counts, scales)
        # exp differs by an ulp between libraries: twice that for a product of two activations.
        limit = reference.ERROR_LIMIT + 2
        assert reference.error_ratio(gk.unpack(packed, CHANNELS), exact, magnitude) < limit


@pytest.mark.parametrize("out", [zeros(), torch.zeros(1, 1)], ids=["one matrix", "another width"])
def test_offsets_need_an_accumulator_for_each_expert(out: Tensor) -> None:
    offsets = torch.zeros(len(out) + 1, dtype=torch.int64)
    with pytest.raises(gk.InputError, match="packed"):
        torch.ops.grail.gram_(out, positive(5, CHANNELS), *[None] * 5, offsets)


@pytest.mark.parametrize("call", [gk.gram_, gk.gram_batched_, gk.gram_swiglu_])
def test_an_accumulator_of_another_form_is_refused(call: Callable[..., Tensor]) -> None:
    single = call is not gk.gram_batched_
    out = zeros().repeat(2, 1) if single else zeros()
    x = positive(2, 5, CHANNELS)
    shape = r"shape \[packed_numel" if single else r"shape \[matrices, packed_numel"
    with pytest.raises(gk.InputError, match=shape):
        call(out, x, x) if call is gk.gram_swiglu_ else call(out, x)
    assert not out.any()
