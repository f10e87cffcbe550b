"""The kernel that reads by descriptors: what it reads in place, what is laid out, and how."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import grail_kernels as gk
from grail_kernels import reference
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from tests.kernels.cases import positive
from tests.kernels.conftest import BACKENDS, Runner

gram_tma = pytest.importorskip("grail_kernels.gram_tma")

runs = pytest.mark.parametrize("runner", [b for b in BACKENDS if b != "torch"], indirect=True)


def strided(dtype: torch.dtype, start: int = 0, width: int = 64) -> Callable[[Tensor], Tensor]:
    """[1, 1, 10, 48] out of rows of `width`, from `start` on."""
    return lambda x: x[: 10 * width].to(dtype).view(1, 1, 10, width)[..., start : start + 48]


# Activations out of a flat tensor of enough numbers, and whether they are read in place.
IN_PLACE = {
    "contiguous": (strided(torch.bfloat16, width=48), True),
    "columns of wider rows": (strided(torch.float16, start=8), True),
    "heads beside each other": (
        lambda x: x[:240].half().view(10, 3, 8).transpose(0, 1)[:, None],
        True,
    ),
    "a base between two addresses": (strided(torch.bfloat16, start=3), False),
    "rows of a width of their own": (strided(torch.bfloat16, width=49), False),
    "channels apart": (lambda x: x[:480].half().view(48, 10).T[None, None], False),
    "one token for all": (lambda x: x[:48].half().expand(1, 1, 10, 48), False),
    "fp32": (strided(torch.float32), False),
}


class Reader:
    """Stands for a kernel, and keeps what its launches would read."""

    arg_names = ("x_desc",)

    def __init__(self) -> None:
        self.read: list[Tensor] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(x_desc: Any) -> None:
            is_laid = x_desc.base.data_ptr() != self.given.data_ptr()
            self.read.append(x_desc.base.clone() if is_laid else x_desc.base)

        return note

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The tensors [E * parts, T, H or more] that launches read of `x` [E, outer, inner, H]."""
        self.given = x
        flags = None if mask is None else mask.view(torch.uint8)
        call = GramCall(torch.zeros(1, device=x.device), x, mask, None, None, None)
        plan = Plan(call)
        launch = SimpleNamespace(
            plan=plan,
            batch=call,
            config=SimpleNamespace(block_tokens=16, block_channels=16),
            add=lambda *_, x_desc, **__: plan.launch(self, (1,), x_desc=x_desc),
        )
        gram_tma.add_tokens(launch, x, flags)
        plan(call, [0 if t is None else t.data_ptr() for t in call.tensors])
        return self.read


@runs
@pytest.mark.parametrize("case", IN_PLACE)
def test_only_rows_of_aligned_16_bits_are_read_in_place(case: str, runner: Runner) -> None:
    make, expected = IN_PLACE[case]
    x = make(torch.randn(640, device=runner.device))
    (read,) = Reader()(x)
    assert (read.data_ptr() == x.data_ptr()) == expected
    parts = read.unflatten(0, (len(x), -1))[..., : x.shape[-1]]
    assert torch.equal(parts.float().flip(1).sum(1), x[:, 0].float())


@runs
def test_fp32_is_laid_out_as_three_parts_and_masked_tokens_as_zeros(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grail_kernels.tuning.BUFFER_TOKENS", 40)
    x = torch.randn(2, 3, 20, 67, device=runner.device) * 1e3
    mask = torch.rand(60, device=runner.device) > 0.4
    laid = Reader()(x, mask)
    assert [part.shape for part in laid] == [(6, 40, 72), (6, 20, 72)]
    assert {part.dtype for part in laid} == {torch.bfloat16}
    parts = torch.cat(laid, dim=1).unflatten(0, (2, 3)).float()
    assert torch.equal(parts[..., :67].flip(1).sum(1), x.flatten(1, 2) * mask[:, None])
    assert not parts[..., 67:].any()


@runs
@pytest.mark.parametrize("channels", [64, 67], ids=["in place", "laid out"])
def test_a_launch_takes_some_of_the_tokens(
    channels: int, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    add = gram_tma.Launch.add

    def spy(launch: object, tokens: int, /, *rest: int, **read: object) -> None:
        launched.append(tokens)
        add(launch, tokens, *rest, **read)

    monkeypatch.setattr(gram_tma.Launch, "add", spy)
    monkeypatch.setattr("grail_kernels.tuning.LAUNCHED_TOKENS", 50)
    monkeypatch.setattr("grail_kernels.tuning.BUFFER_TOKENS", 50)
    x = positive(130, channels).half()
    sums = torch.zeros(channels, device=runner.device)
    out = torch.zeros(gk.packed_numel(channels), device=runner.device)
    gk.gram_(out, x.to(runner.device), sums=sums, backend=runner.backend)
    assert launched == [50, 50, 30]
    result = gk.unpack(out.cpu(), channels)
    magnitude = reference.gram(x.abs())
    assert reference.error_ratio(result, reference.gram(x), magnitude) < reference.ERROR_LIMIT
    assert torch.allclose(sums.cpu().double(), x.double().sum(0), rtol=1e-5)


@pytest.mark.parametrize(("outer", "inner"), [(1, 7), (1, 250), (7, 30), (2, 250), (3, 100)])
def test_launches_take_every_token_once_and_not_too_many(
    outer: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Tensor] = []

    def noted(*_: object, x_ptr: Tensor, weights_ptr: Tensor, **__: object) -> None:
        assert torch.equal(x_ptr.flatten(), weights_ptr)
        launched.append(weights_ptr)

    monkeypatch.setattr(gram_tma.Launch, "add", noted)
    monkeypatch.setattr("grail_kernels.tuning.LAUNCHED_TOKENS", 100)
    monkeypatch.setattr("grail_kernels.gram_serve.resolve_backend", lambda x, backend: "triton")
    numbers = torch.arange(outer * inner).float().view(outer, inner)
    x = torch.zeros(outer, inner + 1, 1)[:, :inner]  # no view has one dimension for all tokens
    x[..., 0] = numbers
    gk.gram_(torch.zeros(gk.packed_numel(1)), x, weights=numbers)
    assert all(0 < len(tokens) <= 100 for tokens in launched)
    assert torch.equal(torch.cat(launched), numbers.flatten())
