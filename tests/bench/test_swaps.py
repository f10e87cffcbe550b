"""The bench of swaps: its closed forms against brute force, and its errors against tokens."""

import itertools

import pytest
import torch
from torch import Tensor

import grail
from bench.quality import swaps
from grail.algebra.gram import Gram
from grail.algebra.width import ChannelWidth
from grail.select import View

CHANNELS, KEPT, OUTPUTS, TOKENS = 9, 4, 5, 60


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


@pytest.fixture
def sums() -> swaps.Sums:
    x, weight = normal(TOKENS, CHANNELS).double(), normal(OUTPUTS, CHANNELS).double()
    target = x @ weight.mT + 0.5 * normal(TOKENS, OUTPUTS)
    return swaps.Sums(x.mT @ x, target.mT @ x, float(target.square().sum()), weight)


def least_error(sums: swaps.Sums, kept: list[int]) -> float:
    index = torch.tensor(kept)
    gram, cross = sums.gram[index][:, index], sums.cross[:, index]
    return sums.energy - float((cross @ torch.linalg.inv(gram) * cross).sum())


def test_the_best_swap_is_that_of_all_pairs(sums):
    kept = list(range(KEPT))
    mask = torch.arange(CHANNELS) < KEPT
    pairs = itertools.product(kept, range(KEPT, CHANNELS))
    before = least_error(sums, kept)
    gains = {(i, j): before - least_error(sums, [*(set(kept) - {i}), j]) for i, j in pairs}
    gain, dropped, added = swaps.best_swap(sums.gram, sums.cross, mask)
    assert (dropped, added) == max(gains, key=gains.get)
    assert gain == pytest.approx(gains[dropped, added], rel=1e-9)


def test_swaps_end_where_no_pair_lowers_the_error(sums):
    kept, count = swaps.swapped(sums, torch.arange(KEPT))
    assert count > 0
    assert len(kept) == KEPT
    reached = least_error(sums, kept.tolist())
    assert reached < least_error(sums, list(range(KEPT)))
    for i, j in itertools.product(kept.tolist(), set(range(CHANNELS)) - set(kept.tolist())):
        other = least_error(sums, [*(set(kept.tolist()) - {i}), j])
        assert other > reached * (1 - 1e-3)  # DAMPING


@pytest.mark.parametrize("of_target", [False, True])
def test_errors_are_those_of_the_tokens(of_target):
    x, weight, share = normal(TOKENS, CHANNELS), normal(OUTPUTS, CHANNELS), 0.7
    drift = 0.3 * normal(TOKENS, OUTPUTS)
    gram = Gram(CHANNELS)
    if of_target:
        gram.update(x, target=x @ weight.mT + drift)
    else:
        gram.update(x, drift=drift)
    width, kept = ChannelWidth(CHANNELS, KEPT), torch.tensor([1, 3, 4, 8])
    generator = torch.Generator()
    found = swaps.Sums.of(View((), weight, gram, width, generator, drift_correction=share))
    target = (x @ weight.mT + share * drift).double()
    fitted = found.ridge(kept, 0.1)
    lost = target - x.double()[:, kept] @ fitted.mT
    expected = float(lost.square().sum() / target.square().sum())
    assert found.error(kept, fitted) == pytest.approx(expected, rel=1e-5)


def test_the_change_is_the_mean_over_sites():
    rows = [
        {"block": block, "choice": choice, "brown": error}
        for block, choice, error in (
            *(("2", "greedy", "0.5"), ("2", "swaps", "0.4")),
            *(("6", "greedy", "0.2"), ("6", "swaps", "0.22")),
        )
    ]
    assert swaps.change(rows, "brown") == pytest.approx((-0.2 + 0.1) / 2)


def test_held_out_texts_pass_through_the_network_that_greedy_narrowed(
    monkeypatch, tiny_llama, tiny_batches
):
    class Subject:
        def batches(self, text: str, half: str, tokens: int) -> list[Tensor]:
            return tiny_batches(6, seed=len(text) + len(half))

        def compressed(self, batches: list[Tensor], **settings) -> None:
            models.append(tiny_llama())
            grail.compress(models[-1], batches, progress=False, **settings)

    models: list = []
    monkeypatch.setattr(swaps, "Subject", Subject)
    monkeypatch.setattr(swaps, "BLOCKS", (1, 2))
    found = swaps.captured()
    assert len(models) == 1 + len(swaps.TEXTS)
    expected = models[0].state_dict()
    for model in models[1:]:
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name
    for seen, held_out, index in found:
        assert index.equal(index.unique())
        assert len(index) == len(seen.gram) // 2
        assert list(held_out) == list(swaps.TEXTS)
        for sums in held_out.values():
            assert sums.gram.shape == seen.gram.shape
            assert not torch.equal(sums.gram, seen.gram)
        row = swaps.errors(seen, held_out, index)
        assert 0 < row["fitted"] < 1
