"""The check of token ids against the rows of a model's input embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grail.errors import InputError

_SHOWN = 4  # ids that a message names


def check_token_ids(model: Any, batch: Any, tokenizer: Any = None) -> None:
    """Checks that the model's input embedding has a row for each token id.

    Args:
        model: a network; without an input embedding it takes any batch.
        batch: token ids, a tuple that begins with them, or keyword arguments of the model.
        tokenizer: which made the ids, for the message.

    Raises:
        InputError: an id is negative, or not less than the embedding's rows. On a GPU the forward
            pass would fail with an assertion that ends the process.
    """
    rows = _embedding_rows(model)
    if rows is None:
        return
    for name, ids in _token_ids(batch):
        unknown = ids[(ids < 0) | (ids >= rows)]
        if len(unknown):
            found = unknown.unique().tolist()
            raise InputError(_refusal(name, found, rows, tokenizer))


def _embedding_rows(model: Any) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows: int | None = getattr(embedding, "num_embeddings", None)
    return rows


def _token_ids(batch: Any) -> list[tuple[str, Tensor]]:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    given = batch if isinstance(batch, Mapping) else {"input_ids": first}
    names = [name for name in ("input_ids", "decoder_input_ids") if name in given]
    found = [(name, given[name]) for name in names if isinstance(given[name], Tensor)]
    return [(name, ids) for name, ids in found if ids.dtype in (torch.int64, torch.int32)]


def _refusal(name: str, found: list[int], rows: int, tokenizer: Any) -> str:
    shown = [str(token) for token in found[:_SHOWN]]
    source = name
    if tokenizer is not None:
        source = f"the text, by a tokenizer of {len(tokenizer)} tokens,"
        shown = [f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{source} holds token ids that the model's embedding of {rows} rows does not have: "
        f"{', '.join(shown)}{more}; use the tokenizer that the model was trained with, or first "
        "give the embedding more rows (model.resize_token_embeddings)"
    )
