"""The way of a call to its kernel: what later calls of a form skip, and what they never skip."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import grail_kernels as gk
from grail_kernels import gram_serve
from grail_kernels.backend import interpreting
from grail_kernels.gram_call import GramCall
from grail_kernels.operators import needs_operator
from tests.kernels.cases import positive

CHANNELS = 67

compiles = pytest.mark.skipif(interpreting(), reason="interpreted kernels do not compile")


def zeros() -> Tensor:
    return torch.zeros(gk.packed_numel(CHANNELS))


class Watch(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_that_watches_sees_the_operator() -> None:
    out, x = zeros(), positive(5, CHANNELS)
    gk.gram_(out, x)
    with Watch() as watch:
        gk.gram_(out, x)
    assert "grail.gram_.default" in watch.seen


def test_a_fake_call_computes_nothing() -> None:
    with FakeTensorMode():
        out = gk.gram_(zeros(), positive(5, CHANNELS))
    assert tuple(out.shape) == (gk.packed_numel(CHANNELS),)


class Kind(Tensor):
    """A tensor of its own class."""


X = positive(5, CHANNELS)
COMPLEX = torch.complex(X, X)
# Tensors that a kernel cannot read by their address, or that somebody watches.
OTHERS = {
    "a class of its own": X.as_subclass(Kind),
    "a negated view": COMPLEX.conj().imag,
    "no memory": X.to("meta"),
    "sparse": X.to_sparse(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_go_through_the_operator(name: str) -> None:
    assert needs_operator([zeros(), OTHERS[name]], [])
    assert not needs_operator([zeros(), X, torch.nn.Parameter(X), None], [None])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_skip_the_operator() -> None:
    assert not needs_operator([X.cuda(), zeros().cuda()], [])
    with torch.inference_mode():
        assert not needs_operator([positive(5, CHANNELS).cuda()], [])


def test_tensors_made_for_inference_skip_the_operator() -> None:
    with torch.inference_mode():
        x, out = positive(5, CHANNELS), zeros()
        assert not needs_operator([x, out], [out])
        gk.gram_(out, x)
    assert torch.equal(out, gk.gram_(zeros(), x.clone()))


def test_a_negated_view_counts_as_what_it_shows() -> None:
    expected = gk.gram_(zeros(), -X)
    assert torch.equal(gk.gram_(zeros(), OTHERS["a negated view"]), expected)


@pytest.mark.parametrize(
    "run",
    [
        lambda note: torch.func.vmap(note)(X),
        lambda note: torch.jit.trace(note, X, check_trace=False),
        lambda note: torch.func.functionalize(note)(X),
    ],
    ids=["vmap", "trace", "functionalize"],
)
def test_what_traces_or_transforms_goes_through_the_operator(run: Callable[[Any], object]) -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(needs_operator([X], []))
        return x

    run(note)
    assert seen == [True]


def test_a_function_mode_goes_through_the_operator() -> None:
    with TorchFunctionMode():
        assert needs_operator([X], [])


def test_gradients_are_refused_of_what_is_written_and_ignored_of_what_is_read() -> None:
    out = zeros()
    assert needs_operator([out], [out.clone().requires_grad_()])
    gk.gram_(out, X.clone().requires_grad_())
    assert not out.requires_grad
    assert torch.equal(out, gk.gram_(zeros(), X))


def test_autograd_hears_of_what_is_written() -> None:
    out, sums = zeros().requires_grad_(False), torch.zeros(CHANNELS)
    before = out._version, sums._version
    gk.gram_(out, X, sums=sums)
    assert out._version > before[0]
    assert sums._version > before[1]


@pytest.fixture
def form() -> Iterator[Callable[[], int]]:
    """The number of forms that were kept."""
    gram_serve.forget_forms()
    yield lambda: len(gram_serve._FORMS)
    gram_serve.forget_forms()


def test_a_form_is_checked_once_and_values_at_every_call(form: Callable[[], int]) -> None:
    memory = torch.zeros(gk.packed_numel(CHANNELS) + 5 * CHANNELS)
    out, x = memory[: gk.packed_numel(CHANNELS)], memory[-5 * CHANNELS :].view(5, CHANNELS)
    gk.gram_(out, x)
    overlapping = memory[4 : 4 + gk.packed_numel(CHANNELS)]  # as aligned as the first
    with pytest.raises(gk.InputError, match="overlaps x in memory"):
        gk.gram_(overlapping, x)
    offsets = torch.tensor([0, 5])
    gk.gram_ragged_(out[None], x, offsets)
    kept = form()
    offsets[1] = 6
    with pytest.raises(gk.InputError, match="at most the 5 tokens"):
        gk.gram_ragged_(out[None], x, offsets)
    assert form() == kept


@pytest.mark.parametrize("bad", [zeros().double(), zeros()[:-1]], ids=["dtype", "shape"])
def test_a_bad_form_is_refused_at_every_call(bad: Tensor, form: Callable[[], int]) -> None:
    for _ in range(2):
        with pytest.raises(gk.InputError):
            gk.gram_(bad, X)
    assert form() == 0


def test_no_more_forms_are_kept_than_allowed(
    form: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_serve, "_MOST_FORMS", 3)
    for tokens in range(1, 9):
        gk.gram_(zeros(), positive(tokens, CHANNELS))
        assert 1 <= form() <= 3


def arguments(launched: Any, call: GramCall) -> list[Any]:
    """What a launch was given: an address by the tensor of the call that is there, if any."""
    names = {
        t.data_ptr(): name
        for name, t in zip(call._fields, call.tensors, strict=False)
        if t is not None
    }
    plain = []
    for value in launched.arguments:
        if hasattr(value, "block_shape"):
            base = names.get(value.base.data_ptr(), "scratch")
            plain.append((base, value.shape, value.strides, value.block_shape))
            continue
        address = value.data_ptr() if isinstance(value, Tensor) else value
        large = isinstance(address, int) and address > 2**24  # no size or stride here is
        plain.append(names.get(address, "scratch") if large else address)
    return plain


@compiles
@pytest.mark.parametrize(
    "case", ["bf16, 4096 channels", "bf16, 1024 channels, tokens split", "fp32, 1024 channels"]
)
def test_later_launches_are_those_of_the_first_on_other_tensors(case: str) -> None:
    launching = pytest.importorskip("bench.kernels.launching")
    with launching.silent_h100() as driver:
        noted = []
        kept = []
        for _ in range(3):
            call = launching.CASES[case]()
            kept.append(call)  # so that no two have the same addresses
            gk.gram_(*call[:6])
            noted.append([(*each[:3], arguments(each, call)) for each in driver.launched])
            driver.launched.clear()
    assert noted[0] == noted[1] == noted[2]
    named = {str(argument) for launch in noted[0] for argument in launch[3]}
    assert "out" in named
    assert any("x" in str(argument) for argument in named)


@compiles
def test_experts_offsets_reach_the_gpu_at_every_call() -> None:
    launching = pytest.importorskip("bench.kernels.launching")
    with launching.silent_h100() as driver:
        out, x = torch.zeros(2, gk.packed_numel(64)), torch.zeros(20, 64, dtype=torch.bfloat16)
        for offsets in (torch.tensor([0, 5, 20]), torch.tensor([0, 9, 20])):
            gk.gram_ragged_(out, x, offsets)
            given = [
                v.data_ptr() if isinstance(v, Tensor) else v for v in driver.launched[-1].arguments
            ]
            assert offsets.data_ptr() in given


@compiles
@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("bf16, 4096 channels", 110),
        ("bf16, 1024 channels, tokens split", 125),
        ("bf16, 4096 channels, mask, sums, counts", 150),
        ("fp32, 1024 channels", 125),
    ],
)
def test_a_call_makes_few_calls_on_the_host(case: str, most: int) -> None:
    # In the place of its time, which other programs change: 115 calls took 14 microseconds
    # (bench/results/launching.csv).
    launching = pytest.importorskip("bench.kernels.launching")
    with launching.silent_h100():
        call = launching.CASES[case]()
        assert min(_calls_of(lambda: gk.gram_(*call[:6])) for _ in range(5)) <= most


def _calls_of(function: Callable[[], object]) -> int:
    """Counts the calls of functions of Python and C that a function makes."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")
