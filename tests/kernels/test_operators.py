"""torch.ops.grail.*: the kernels as operators that torch.compile can carry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from tests.kernels.cases import positive

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
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for expected, got in zip(function(x), compiled(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (torch.ops.grail.gram_, lambda: (zeros(), positive(50, CHANNELS), *[None] * 4)),
        (
            torch.ops.grail.gram_swiglu_,
            lambda: (zeros(), positive(50, CHANNELS), positive(50, CHANNELS), *[None] * 4),
        ),
        (
            torch.ops.grail.gram_ragged_,
            lambda: (zeros()[None], positive(50, CHANNELS), torch.tensor([0, 50]), None, None),
        ),
        (
            torch.ops.grail.gram_batched_,
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
    ids=["gram_", "gram_swiglu_", "gram_ragged_", "gram_batched_", "absorb"],
)
def test_operators_declare_what_they_do(
    operator: Callable[..., None], arguments: Callable[[], tuple[Tensor, ...]]
) -> None:
    torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize("name", ["gram_", "gram_batched_", "gram_ragged_", "gram_swiglu_"])
def test_what_is_written_has_no_default(name: str) -> None:
    # torch 2.11 strips trailing defaults from a call, and then misses them among what is written.
    schema = getattr(torch.ops.grail, name).default._schema
    written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert [a.name for a in written] == ["out", "sums", "nonfinite"]
    assert not [a.name for a in written if a.has_default_value()]


def test_a_wrong_shape_is_refused_while_tracing() -> None:
    fake = torch.zeros(5, 3, device="meta")
    with pytest.raises(gk.InputError, match="3 channels has"):
        torch.ops.grail.gram_(torch.zeros(4, device="meta"), fake, None, None, None, None)
    with pytest.raises(gk.InputError, match="3 channels has"):
        torch.ops.grail.absorb(fake, torch.zeros(4, device="meta"), fake[0].long())
