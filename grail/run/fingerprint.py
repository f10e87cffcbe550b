"""Fingerprints of a model, its calibration and a run: a run resumes only where all are the same."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from grail.calibrate.batches import Batch
from grail.errors import InputError
from grail.recipe import Recipe
from grail.runtime import state

# Entries of a configuration on which no result depends.
_UNIMPORTANT = {"_name_or_path", "transformers_version"}
_HASH = "sha256:"


class HashedBatches:
    """Batches that are hashed while they are read.

    Args:
        batches: read once.
        needed: whether the hash is asked for at all; else nothing is hashed.
    """

    def __init__(self, batches: Iterable[Batch], needed: bool = True):
        self._batches, self._hash, self._needed = batches, hashlib.sha256(), needed

    def __iter__(self) -> Iterator[Batch]:
        if not self._needed:
            yield from self._batches
            return
        for batch in self._batches:
            leaves, form = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
            hashes = [state.digest(x) if isinstance(x, Tensor) else repr(x) for x in leaves]
            self._hash.update(f"{form}{hashes}".encode())
            yield batch

    @property
    def sha256(self) -> str:
        """The hash of all batches that were read."""
        return self._hash.hexdigest()


def model_fingerprint(model: Any) -> dict[str, str]:
    """Returns the SHA-256 of a model's weights, structure and configuration."""
    weights = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        weights.update(f"{name} {state.digest(tensor)}".encode())
    config = getattr(getattr(model, "config", None), "__dict__", {})
    config = {key: value for key, value in config.items() if key not in _UNIMPORTANT}
    return {
        "weights": weights.hexdigest(),
        "structure": _hash_of_text(repr(model)),
        "configuration": _hash_of_text(repr(config)),
    }


def run_fingerprint(model: Any, recipe: Recipe) -> dict[str, str]:
    """Returns what identifies a run but for its calibration: the model's hashes and the recipe."""
    hashes = model_fingerprint(model).items()
    return {
        **{f"the model's {part}": _HASH + found for part, found in hashes},
        **{name: repr(value) for name, value in vars(recipe).items()},
    }


def with_calibration(
    run: Mapping[str, str],
    batches: HashedBatches,
    others: Mapping[str, HashedBatches] = MappingProxyType({}),
) -> dict[str, str]:
    """Returns the fingerprint of a run with that of its batches, once all of them were read.

    Args:
        others: batches with another purpose, by name.
    """
    texts = {"calibration": batches, **others}
    return {**run, **{name: _HASH + text.sha256 for name, text in texts.items()}}


def require_same_run(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises InputError if the state in a folder has the fingerprint of another run."""
    different = [
        f"{name} differs"
        if now.get(name, _HASH).startswith(_HASH)
        else f"{name} was {before.get(name)} and is {now[name]}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]
    if different:
        raise InputError(
            f"{folder} holds the state of another run: {', '.join(different)}; give another "
            "folder, or delete it"
        )


def _hash_of_text(text: str) -> str:
    """Returns the SHA-256 of a text without the addresses of objects."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()
