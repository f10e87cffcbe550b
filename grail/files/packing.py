"""Packs documents into batches of token sequences; reads only as far as needed."""

import math
import random
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grail.arguments import require_whole
from grail.errors import EmptyCalibrationError, InputError, one_line
from grail.files.documents import (
    Document,
    Split,
    has_lines_for_rows,
    is_chat,
    is_plain_text,
    load_texts,
)
from grail_kernels import check_kind, kind_of

Join = Literal["eos", "blank", "none"]

_POOL = 8  # a seeded draw chooses among this many times the sequences that it returns
_CHARACTERS = 8  # of text for each token, if documents are joined before they are tokenised
_SEPARATORS = {"blank": "\n\n", "none": ""}


def token_batches(
    source: str | Path | Iterable[Document],
    tokenizer: Any,
    *,
    tokens: int | None,
    sequence_length: int = 1024,
    batch_size: int = 4,
    seed: int | None = None,
    field: str | None = None,
    split: Split | None = None,
    join: Join | None = None,
) -> list[Tensor]:
    """Packs text into sequences of exactly `sequence_length` tokens; nothing is padded.

    Documents are joined and cut where a sequence is full; a rest shorter than a sequence is
    dropped. Chats are rendered by the tokenizer's chat template.

    Args:
        source: see `load_texts`.
        tokenizer: a transformers tokenizer.
        tokens: number of tokens, one sequence or more, rounded up to whole sequences; None takes
            the whole source.
        sequence_length: tokens in a sequence.
        batch_size: sequences in a batch; the last batch may hold fewer.
        seed: draws the sequences at random from the first 8 · `tokens` of the source;
            None takes the first ones.
        field: see `load_texts`.
        split: see `load_texts`.
        join: "eos" ends each document with the tokenizer's end-of-text token. "blank" puts a blank
            line between documents, "none" nothing; they are then tokenised as one text, which
            begins with the tokenizer's own special tokens, as perplexity on WikiText-2 is measured
            in the literature. None takes "blank" where the rows of a dataset are lines of
            documents, as those of WikiText are, else "eos".

    Returns:
        int64 batches [at most batch_size, sequence_length]. A source that holds fewer tokens than
        wanted gives what it has, and a warning.

    Raises:
        InputError: a size that is not positive, a source that cannot be read, chats and a tokenizer
            without a chat template for them, or join "eos" and one without an end-of-text token.
        EmptyCalibrationError: no text, or less than one sequence of it.
    """
    _require_kinds(source, tokenizer, tokens, seed)
    _check_sizes(tokens, sequence_length, batch_size)
    if join not in (None, *get_args(Join)):
        raise InputError(f"join must be one of {', '.join(get_args(Join))}; got {join!r}")
    if join == "eos" and tokenizer.eos_token_id is None:
        raise InputError(
            'the tokenizer has no end-of-text token for join "eos"; give "blank" or "none"'
        )
    join = join or ("blank" if has_lines_for_rows(source) else "eos")
    wanted = None if tokens is None else math.ceil(tokens / sequence_length)
    limit = wanted if wanted is None or seed is None else _POOL * wanted
    limit = None if limit is None else min(limit, sys.maxsize)  # islice takes no more
    documents = load_texts(source, field=field, split=split)
    texts = _not_blank(_render(document, tokenizer) for document in documents)
    if join == "eos":
        chunks = _ended(texts, tokenizer, is_plain_text(source))
    else:
        separator = "" if is_plain_text(source) else _SEPARATORS[join]
        enough = None if limit is None else limit * sequence_length * _CHARACTERS
        chunks = _as_one_text(texts, tokenizer, separator, enough)
    sequences = list(islice(_pack(chunks, sequence_length), limit))
    if seed is not None:
        count = len(sequences) if wanted is None else min(wanted, len(sequences))
        sequences = random.Random(seed).sample(sequences, count)
    if wanted is not None and len(sequences) < wanted:
        warnings.warn(
            f"the text holds {len(sequences) * sequence_length} tokens in whole sequences, "
            f"fewer than the {tokens} asked for; all of them are used",
            stacklevel=2,
        )
    rows = torch.tensor(sequences, dtype=torch.int64)
    return list(rows.split(batch_size))


def _require_kinds(source: object, tokenizer: object, tokens: object, seed: object) -> None:
    """Raises InputError for arguments of `token_batches` of a wrong kind."""
    check_kind("source", source, (Path, Iterable), "a path, the name of a dataset or documents")
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise InputError(f"tokenizer must be one of transformers; got {kind_of(tokenizer)}")
    for name, number in (("tokens", tokens), ("seed", seed)):
        if number is not None:
            require_whole(name, number, 0)


def require_text(
    source: str | Path,
    *,
    tokens: int | None = None,
    sequence_length: int | None,
    field: str | None = None,
    split: Split | None = None,
) -> None:
    """Checks, without a tokenizer, that a source may hold text for one sequence.

    Raises:
        InputError: the source cannot be read, or fewer tokens are wanted than a sequence has.
        EmptyCalibrationError: no text, or fewer bytes of it than a sequence has tokens.
    """
    if sequence_length is not None:
        _check_sizes(tokens, sequence_length)
    most = 0
    for document in _not_blank(load_texts(source, field=field, split=split)):
        if not isinstance(document, str):
            return  # the chat template adds text
        most += _most_tokens(document)
        if most >= (sequence_length or 1):
            return
    raise EmptyCalibrationError(
        f"the text has at most {most} tokens, less than one sequence of {sequence_length}; "
        "give more text or ask for shorter sequences"
    )


def _most_tokens(text: str) -> int:
    """Bounds the tokens of a text: one for each byte, and two that begin and end it.

    Tokenizers may normalise a text first; NFKD is the longest of the Unicode forms.
    """
    longest = max(text, unicodedata.normalize("NFKD", text), key=lambda form: len(form.encode()))
    return len(longest.encode()) + 2 if text.strip() else 0


def _check_sizes(tokens: int | None, sequence_length: int, batch_size: int = 1) -> None:
    require_whole("sequence_length", sequence_length, 1)
    require_whole("batch_size", batch_size, 1)
    if tokens is not None and tokens < sequence_length:
        raise InputError(
            f"tokens is {tokens}, less than one sequence of {sequence_length}; "
            "ask for more tokens or for shorter sequences"
        )


def _render(document: Document, tokenizer: Any) -> str:
    """Returns the text of a document; a chat is rendered by the tokenizer's template."""
    if isinstance(document, str):
        return document
    if not is_chat(document):
        raise InputError(
            f"a document is {type(document).__name__}; give texts, or lists of messages with role "
            "and content"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chats need a tokenizer with a chat template, and this one has none; give plain text, "
            "or the tokenizer of a chat model"
        )
    try:
        rendered: str = tokenizer.apply_chat_template(list(document), tokenize=False)
    except Exception as error:  # of jinja, or raised by the template itself
        raise InputError(
            f"the tokenizer's chat template does not render a chat of the text: {one_line(error)}; "
            "give messages as it wants them"
        ) from error
    return rendered


def _not_blank(texts: Iterable[Document]) -> Iterator[Any]:
    """Yields the same texts; raises at their end if all are blank."""
    blank = True
    for text in texts:
        blank = blank and isinstance(text, str) and not text.strip()
        yield text
    if blank:
        raise EmptyCalibrationError("the text is empty; give text of at least one sequence")


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    # verbose=False: a document longer than the model's context is normal here, it gets cut.
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair
        raise InputError(f"a document is no text that can be encoded: {one_line(error)}") from error
    return ids


def _ended(texts: Iterable[str], tokenizer: Any, pieces: bool) -> Iterator[list[int]]:
    """Yields the tokens of each text and an end-of-text token; for pieces of a text one end."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        if text.strip():
            yield _ids(tokenizer, text) + ([] if pieces else end)
    if pieces:
        yield end


def _as_one_text(
    texts: Iterable[str], tokenizer: Any, separator: str, enough: int | None
) -> Iterator[list[int]]:
    """Yields the tokens of all texts joined, or of stretches of `enough` characters."""
    held: list[str] = []
    characters, begins = 0, True
    for text in texts:
        held.append(text)
        characters += len(text)
        if enough is not None and characters >= enough:
            yield _ids(tokenizer, separator.join(held), special=begins)
            held, characters, begins = [""], 0, False
    if any(held):
        yield _ids(tokenizer, separator.join(held), special=begins)


def _pack(chunks: Iterable[list[int]], sequence_length: int) -> Iterator[list[int]]:
    buffer: list[int] = []
    full = 0
    for chunk in chunks:
        buffer += chunk
        whole = len(buffer) - len(buffer) % sequence_length
        for start in range(0, whole, sequence_length):
            full += 1
            yield buffer[start : start + sequence_length]
        del buffer[:whole]
    if not full:
        raise EmptyCalibrationError(
            f"the text has {len(buffer)} tokens, less than one sequence of {sequence_length}; "
            "give more text or ask for shorter sequences"
        )
