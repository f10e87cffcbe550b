"""From a source of text to batches of token sequences, read only as far as they are needed."""

import json
import math
import random
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail.arguments import require_whole
from grail.errors import EmptyCalibrationError, InputError
from grail_kernels.arguments import check_kind, kind_of

_PIECE = 1 << 20  # characters of a plain text file that are read and tokenised at a time
_POOL = 8  # a seeded draw chooses among this many times the sequences it returns


def load_texts(
    source: str | Path | Iterable[str], *, field: str = "text", split: str = "train"
) -> Iterator[str]:
    """Documents of a source, one by one, without holding the source in memory.

    Args:
        source: a path ending in `.jsonl` or `.json` (one object a line) or in `.parquet`, in any
            case; any other file, as plain UTF-8 text; the name of a dataset, `NAME` or
            `NAME:CONFIG`; or an iterable of documents. A text file longer than 2²⁰ characters comes
            in several pieces.
        field: where JSON lines, Parquet and datasets keep the text.
        split: which split of a dataset is read.

    Raises:
        InputError: the source cannot be read, or has no such field.
    """
    if not isinstance(source, str | Path):
        return iter(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _require_file(path)
        return _from_datasets(str(source), "parquet", field, split, data_files=str(path))
    if suffix in (".json", ".jsonl"):
        _require_file(path)
        return _read_json_lines(path, field)
    if suffix == ".txt" or path.is_file() or (path.is_absolute() and not path.exists()):
        _require_file(path)
        return _read_text(path)
    name, _, config = str(source).partition(":")
    return _from_datasets(str(source), name, field, split, name=config or None)


def token_batches(
    source: str | Path | Iterable[str],
    tokenizer: Any,
    *,
    tokens: int | None,
    sequence_length: int = 1024,
    batch_size: int = 4,
    seed: int | None = None,
    field: str = "text",
    split: str = "train",
) -> list[Tensor]:
    """Packs text into sequences of exactly `sequence_length` tokens; nothing is padded.

    Documents are joined with the tokenizer's end-of-text token and cut wherever a sequence is full;
    a rest shorter than a sequence is dropped.

    Args:
        source: see `load_texts`.
        tokenizer: a transformers tokenizer.
        tokens: how many are wanted, one sequence or more, rounded up to whole ones; None takes
            the whole source.
        sequence_length: tokens in a sequence.
        batch_size: sequences in a batch; the last batch may hold fewer.
        seed: draws the sequences at random from the first 8 · `tokens` of the source;
            None takes the first ones.
        field: see `load_texts`.
        split: see `load_texts`.

    Returns:
        int64 batches [at most batch_size, sequence_length]. A source that holds fewer tokens than
        wanted gives what it has, and a warning.

    Raises:
        InputError: a size that is not positive, or a source that cannot be read.
        EmptyCalibrationError: no text, or less than one sequence of it.
    """
    _require_kinds(source, tokenizer, tokens, seed)
    require_whole("sequence_length", sequence_length, 1)
    require_whole("batch_size", batch_size, 1)
    if tokens is not None and tokens < sequence_length:
        raise InputError(
            f"tokens is {tokens}, less than one sequence of {sequence_length}; "
            "ask for more tokens or for shorter sequences."
        )
    wanted = None if tokens is None else math.ceil(tokens / sequence_length)
    limit = wanted if wanted is None or seed is None else _POOL * wanted
    texts = load_texts(source, field=field, split=split)
    sequences = list(islice(_pack(texts, tokenizer, sequence_length), limit))
    if seed is not None:
        count = len(sequences) if wanted is None else min(wanted, len(sequences))
        sequences = random.Random(seed).sample(sequences, count)
    if wanted is not None and len(sequences) < wanted:
        warnings.warn(
            f"The text holds {len(sequences) * sequence_length} tokens in whole sequences, "
            f"fewer than the {tokens} asked for; all of them are used.",
            stacklevel=2,
        )
    rows = torch.tensor(sequences, dtype=torch.int64)
    return list(rows.split(batch_size))


def _require_kinds(source: object, tokenizer: object, tokens: object, seed: object) -> None:
    """Raises InputError for arguments of `token_batches` that are of no kind that it takes."""
    check_kind("source", source, (Path, Iterable), "a path, the name of a dataset or documents")
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise InputError(f"tokenizer must be one of transformers; got {kind_of(tokenizer)}")
    for name, number in (("tokens", tokens), ("seed", seed)):
        if number is not None:
            require_whole(name, number, 0)


def _pack(texts: Iterable[str], tokenizer: Any, sequence_length: int) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    buffer: list[int] = []
    characters = full = 0
    for text in texts:
        check_kind("a document", text, str, "text")
        if not text.strip():
            continue
        characters += len(text)
        # verbose=False: a document longer than the model's context is normal here, it gets cut.
        buffer += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
        whole = len(buffer) - len(buffer) % sequence_length
        for start in range(0, whole, sequence_length):
            full += 1
            yield buffer[start : start + sequence_length]
        del buffer[:whole]
    if not characters:
        raise EmptyCalibrationError("The text is empty; give text of at least one sequence.")
    if not full:
        raise EmptyCalibrationError(
            f"The text has {len(buffer)} tokens, less than one sequence of {sequence_length}; "
            "give more text or ask for shorter sequences."
        )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give text, JSON lines, Parquet or a dataset name.")


def _read_text(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            while piece := lines.readlines(_PIECE):
                yield "".join(piece)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # too many digits, or levels, as well
            raise InputError(
                f"{path}, line {number} is not JSON that can be read: {error}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object with a field {field!r}.")
        yield _text_of(row, field, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[str]:
    for piece in _read_text(path):
        yield from piece.removesuffix("\n").split("\n")  # splitlines cuts at U+2028 too


def _from_datasets(
    source: str, builder: str, field: str, split: str, **options: Any
) -> Iterator[str]:
    """Streams a dataset; `datasets` raises errors of many unrelated types, all mean the same."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"Reading {source} needs datasets: pip install 'grail-kernels[llm]'; "
            "text and JSON lines work without."
        ) from error
    rows: Iterator[dict[str, Any]] | None = None
    while True:
        try:
            rows = rows or iter(
                datasets.load_dataset(builder, split=split, streaming=True, **options)
            )
            row = next(rows, None)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{source} cannot be read as a file or a dataset: {reason}") from error
        if row is None:
            return
        yield _text_of(row, field, source)


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} holds half of a surrogate pair in field {field!r}."
            ) from error
        return text
    kind = "has no field" if field not in row else "holds no text in field"
    found = ", ".join(map(repr, row)) or "none"
    raise InputError(f"{where} {kind} {field!r}; fields found: {found}.")
