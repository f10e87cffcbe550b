"""The Grams of a layer's experts: tokens wait together, and reading brings all up to date."""

import gc
import weakref

import pytest
import torch

import grail_kernels as gk
from grail.algebra.expert_grams import RaggedGrams
from grail.algebra.gram import Gram
from grail.algebra.sums import rows_of
from grail.errors import InputError, NonFiniteError, StateError

H = 24
NAMES = ["layer.0", "layer.1", "layer.2"]


def calls_of(seed=0, dtype=torch.float32):
    """(expert, x) in the order of a router: uneven, one call without tokens, one expert unasked."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(0, 5), (2, 9), (0, 1), (2, 0), (0, 17), (2, 3), (0, 2)]
    return [(n, torch.randn(size, H, generator=generator).to(dtype)) for n, size in sizes]


@pytest.mark.parametrize("buffer", [None, 1, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gram_equals_fp64_however_many_tokens_wait(buffer, dtype):
    ragged = RaggedGrams(NAMES, H, buffer=buffer)
    for number, x in calls_of(dtype=dtype):
        ragged.grams[number].update(x)
    for number, gram in enumerate(ragged.grams):
        x = torch.cat([torch.zeros(0, H), *(x for n, x in calls_of(dtype=dtype) if n == number)])
        assert gram.tokens == len(x)
        if not len(x):
            continue
        exact = x.double().T @ x.double()
        # fp32 sums of at most 25 products.
        torch.testing.assert_close(gram.matrix().double(), exact, rtol=0, atol=2e-5)
        torch.testing.assert_close(gram.sum.double(), x.double().sum(0), rtol=0, atol=2e-5)
        assert torch.equal(gram.matrix(), gram.matrix().T)


def test_what_waits_goes_in_one_call_sorted_by_expert(ragged_launches):
    ragged = RaggedGrams(NAMES, H, buffer=40)
    for number, x in calls_of():
        ragged.grams[number].update(x)
    assert ragged_launches == []  # 37 tokens wait
    ragged.grams[0].matrix()
    ragged.grams[2].matrix()  # the first read brought all up to date
    assert ragged_launches == [[25, 0, 12]]


def test_more_than_can_wait_is_multiplied_before_it_comes_in(ragged_launches):
    ragged = RaggedGrams(NAMES, H, buffer=8)
    for number, size in ((0, 6), (1, 2), (0, 3), (2, 9)):
        ragged.grams[number].update(torch.ones(size, H))
    assert ragged_launches == [[6, 2, 0], [0, 0, 9]]  # nine never wait
    assert [gram.matrix()[0, 0] for gram in ragged.grams] == [9, 2, 9]
    assert ragged_launches[2:] == [[3, 0, 0]]


def test_tokens_that_wait_are_the_callers_to_overwrite():
    ragged = RaggedGrams(NAMES, H, buffer=8)
    x = torch.ones(2, H)
    ragged.grams[0].update(x)
    x.fill_(7)
    assert ragged.grams[0].matrix()[0, 0] == 2


def test_masks_and_dropped_tokens_do_not_wait():
    ragged = RaggedGrams(NAMES, H, buffer=8, non_finite="drop")
    x = torch.ones(2, 3, H)
    x[1, 2, 5] = float("nan")
    ragged.grams[1].update(x, torch.tensor([[True, False, True], [True, True, True]]))
    gram = ragged.grams[1]
    assert (gram.tokens, gram.dropped, float(gram.matrix()[0, 0])) == (4, 1, 4)


def test_a_non_finite_value_is_refused_by_the_name_of_its_expert():
    ragged = RaggedGrams(NAMES, H, buffer=8)
    ragged.grams[0].update(torch.ones(2, H))
    with pytest.raises(NonFiniteError, match=r"layer\.1"):
        ragged.grams[1].update(torch.full((1, H), float("inf")))
    assert ragged.grams[0].matrix()[0, 0] == 2
    assert ragged.grams[1].tokens == 0


def test_a_failed_call_spoils_all_grams_whose_tokens_waited(monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    ragged = RaggedGrams(NAMES, H, buffer=8)
    ragged.grams[0].update(torch.ones(2, H))
    ragged.grams[1].update(torch.ones(2, H))
    monkeypatch.setattr(gk, "gram_ragged_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        ragged.grams[1].matrix()
    monkeypatch.undo()
    for gram in ragged.grams:
        with pytest.raises(StateError, match="half-way"):
            gram.matrix()


def test_a_saved_expert_is_a_gram_like_any_other(tmp_path):
    ragged = RaggedGrams(NAMES, H, buffer=100)
    for number, x in calls_of():
        ragged.grams[number].update(x)
    ragged.grams[2].save(tmp_path / "2.state")
    loaded = Gram.load(tmp_path / "2.state")
    assert torch.equal(loaded.matrix(), ragged.grams[2].matrix())
    loaded.merge(ragged.grams[0])
    total = ragged.grams[0].matrix() + ragged.grams[2].matrix()
    assert torch.equal(loaded.matrix(), total)


@pytest.mark.parametrize(
    ("names", "buffer", "message"), [([], None, "names is empty"), (NAMES, -1, "tokens ≥ 0")]
)
def test_what_cannot_be_is_refused(names, buffer, message):
    with pytest.raises(InputError, match=message):
        RaggedGrams(names, H, buffer=buffer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("buffer", [None, 64])
def test_on_a_gpu_each_gram_equals_fp64_and_bad_values_are_refused_when_read(buffer):
    channels = 256
    ragged = RaggedGrams(NAMES, channels, "cuda", buffer=buffer)
    calls = [(n, torch.randn(size, channels)) for n, size in ((0, 40), (1, 3), (0, 50), (1, 9))]
    for number, x in calls:
        ragged.grams[number].update(x.cuda())
    ragged.grams[2].update(torch.full((1, channels), float("nan"), device="cuda"))
    for number in (0, 1):
        exact = torch.cat([x for n, x in calls if n == number]).double()
        gram = ragged.grams[number]
        torch.testing.assert_close(gram.matrix().cpu().double(), exact.T @ exact, rtol=0, atol=1e-4)
        torch.testing.assert_close(gram.sum.cpu().double(), exact.sum(0), rtol=0, atol=1e-4)
    with pytest.raises(NonFiniteError, match=r"layer\.2"):
        ragged.grams[2].matrix()


def test_the_sums_are_freed_with_the_last_gram():
    gc.disable()
    try:
        ragged = RaggedGrams(NAMES, H)
        packed = weakref.ref(ragged.packed.untyped_storage())
        first, *others = ragged.take()
        del ragged, others
        first.update(torch.ones(2, H))
        assert packed() is not None
        del first
        assert packed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (1, 3), (3, 1), (0, 1, 3), (2,)], ids=str)
def test_sums_of_experts_are_rows_of_one_tensor(numbers):
    table = torch.randn(4, 3, 5)
    found = rows_of([table[number] for number in numbers])
    assert torch.equal(found, table[list(numbers)])
    evenly = numbers not in {(3, 1), (0, 1, 3)}
    shared = found.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    assert shared == evenly
    apart = [torch.randn(2, 3) for _ in range(3)]
    assert torch.equal(rows_of(apart), torch.stack(apart))
