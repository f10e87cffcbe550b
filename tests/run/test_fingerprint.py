"""Fingerprints: equal for equal batches, models and recipes, other for any change."""

import copy
from pathlib import Path

import pytest
import torch

from grail.errors import InputError
from grail.recipe import Recipe
from grail.run.fingerprint import (
    HashedBatches,
    model_fingerprint,
    require_same_run,
    run_fingerprint,
    with_calibration,
)


def hash_of(batches):
    hashed = HashedBatches(batches)
    assert [id(batch) for batch in hashed] == [id(batch) for batch in batches]
    return hashed.sha256


BATCHES = [{"input_ids": torch.arange(6).view(2, 3)}, {"input_ids": torch.arange(4).view(2, 2)}]


@pytest.mark.parametrize(
    "other",
    [
        BATCHES[::-1],
        BATCHES[:1],
        [{"tokens": batch["input_ids"]} for batch in BATCHES],
        [{"input_ids": batch["input_ids"].T.contiguous()} for batch in BATCHES],
        [{"input_ids": batch["input_ids"].int()} for batch in BATCHES],
        [batch | {"use_mask": True} for batch in BATCHES],
    ],
    ids=["order", "fewer", "names", "shapes", "dtypes", "values"],
)
def test_batches_with_any_difference_have_another_hash(other):
    assert hash_of(BATCHES) == hash_of(copy.deepcopy(BATCHES))
    assert hash_of(other) != hash_of(BATCHES)


def test_the_hash_is_that_of_the_batches_read_so_far():
    hashed = HashedBatches(iter(BATCHES))
    reading = iter(hashed)
    next(reading)
    next(reading)  # the first is hashed before it is given out, the second too
    assert hashed.sha256 == hash_of(BATCHES)
    with pytest.raises(StopIteration):
        next(reading)
    assert hashed.sha256 == hash_of(BATCHES)


def test_a_model_is_known_by_weights_structure_and_configuration():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == before
    model[1].running_mean[2] = 1.0
    changed = model_fingerprint(model)
    assert {name for name in before if before[name] != changed[name]} == {"weights"}


def test_another_run_is_named_by_what_differs():
    model, hashed = torch.nn.Linear(3, 4), HashedBatches(BATCHES)
    list(hashed)
    run = with_calibration(run_fingerprint(model, Recipe(keep=0.5)), hashed)
    require_same_run(Path("d"), dict(run), run)
    other = with_calibration(run_fingerprint(model, Recipe(keep=0.7)), HashedBatches([]))
    with pytest.raises(InputError, match=r"keep was 0\.5 and is 0\.7, calibration differs"):
        require_same_run(Path("d"), run, other)
