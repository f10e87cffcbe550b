"""Operators are called without Dynamo, the import of which takes a second, and never compiled."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor
from torch.fx import GraphModule

import grail_kernels as gk
from tests.kernels.cases import positive

EVERY_OPERATOR = """
import sys, torch, grail_kernels as gk
x, out = torch.ones(50, 7), torch.zeros(gk.packed_numel(7))
gk.gram_(out, x)
gk.gram_batched_(out[None], x[None])
gk.gram_ragged_(out[None], x, torch.tensor([0, 50]))
gk.gram_swiglu_(out, x, x)
gk.absorb(x, out, torch.tensor([1, 3]))
torch.ops.grail.gram_(out, x, None, None, None, None)
assert "torch._dynamo" not in sys.modules
"""


def test_no_first_call_imports_dynamo() -> None:
    subprocess.run([sys.executable, "-c", EVERY_OPERATOR], check=True)


def test_dynamo_compiles_no_kernel_from_a_frame_that_it_skips() -> None:
    graphs: list[GraphModule] = []

    def collect(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    @torch.compiler.disable
    def break_graph() -> None:
        pass

    out = torch.zeros(gk.packed_numel(7))

    def skipped(x: Tensor) -> Tensor:
        try:
            break_graph()
            torch.ops.grail.gram_(out, x, None, None, None, None)
            return x + 1
        finally:
            pass

    torch.compiler.reset()
    x = positive(50, 7)
    torch.compile(skipped, backend=collect)(x)
    assert graphs == []
    assert torch.equal(gk.unpack(out, 7), gk.unpack(gk.gram_(torch.zeros_like(out), x), 7))
