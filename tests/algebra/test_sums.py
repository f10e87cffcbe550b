"""Sums over tokens on a CPU, on the calling thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grail.algebra.sums import channel_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 1000, 7), (20, 40000)])
def test_channel_sums_match_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.rand(shape).to(dtype)
    tokens = x.reshape(-1, shape[-1]).double()
    found = channel_sums(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), tokens.sum(0), rtol=1e-6, atol=0)


def test_strided_tokens_are_summed_as_they_are() -> None:
    x = torch.rand(30, 9, 40)[::2, :, ::3].mT
    torch.testing.assert_close(channel_sums(x), x.sum((0, 1)))


def test_a_value_that_is_not_finite_shows() -> None:
    x = torch.zeros(9000, 6)
    x[7000, 2], x[10, 4] = torch.nan, torch.inf
    assert channel_sums(x).isfinite().tolist() == [True, True, False, True, False, True]


def test_no_sum_is_so_long_that_torch_shares_it_among_threads() -> None:
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            sizes.extend(a.numel() for a in args[:1] if function.overloadpacket.__name__ == "sum")
            return function(*args, **kwargs or {})

    with Watch():
        channel_sums(torch.ones(4000, 300))
    assert len(sizes) > 10
    assert max(sizes) < 32768
