"""A caller's permission to round its own products does not reach the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import grail_kernels as gk
from grail_kernels.precision import full_fp32


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_a_lower_precision_changes_no_bit_and_stays_set(setting: str) -> None:
    x, keep = torch.randn(500, 300), torch.arange(0, 300, 2)

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        gram = gk.unpack(gk.gram_(torch.zeros(gk.packed_numel(300)), x), 300)
        return gram, gk.absorb(x, gram, keep)

    expected = results()
    torch.set_float32_matmul_precision(setting)
    for got, right in zip(results(), expected, strict=True):
        assert torch.equal(got, right)
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "mkldnn"), ("cuda", "cuda")])
def test_the_setting_is_put_back_when_an_error_passes(kind: str, backend: str) -> None:
    torch.set_float32_matmul_precision("medium")
    matmul = getattr(torch.backends, backend).matmul
    before = matmul.fp32_precision

    def fail() -> None:
        with full_fp32(torch.device(kind)):
            assert matmul.fp32_precision == "ieee"
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert matmul.fp32_precision == before != "ieee"
