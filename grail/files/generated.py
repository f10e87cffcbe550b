"""JSON lines of text that a model wrote, with the settings in the first of them.

{"text": "…", "sequence": 0, "made": {…}}
{"text": "…", "sequence": 0}

A document a line; `made` is what the text depends on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grail.errors import ExportError, InputError
from grail.runtime.folder import complete_file

SUFFIX = ".jsonl"
_CUT = "\ufffd"  # decoded from a part of a character


def require_name(output: Path) -> None:
    """Raises InputError for a name by which `grail.Text` would not read JSON lines."""
    if output.suffix.lower() != SUFFIX:
        raise InputError(f"{output} does not end in {SUFFIX}; name a file of JSON lines")


def documents(tokens: Sequence[int], tokenizer: Any, start: int = 0) -> list[str]:
    """Returns the documents of a sequence, which end-of-text tokens separate.

    Other special tokens stay as text, from which the tokenizer reads them again. A character that
    is cut at the end is dropped.

    Args:
        tokens: of the sequence.
        tokenizer: a transformers tokenizer.
        start: the first token that counts.
    """
    outside = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    parts: list[list[int]] = [[]]
    for token in tokens[start:]:
        if token in outside:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts if part]
    if texts:
        texts[-1] = texts[-1].rstrip(_CUT)
    return [text for text in texts if text.strip()]


def tokens_read(texts: Iterable[str], tokenizer: Any) -> int:
    """Returns the tokens of documents as `grail.token_batches` reads them, each with an end."""
    end = tokenizer.eos_token_id is not None
    return sum(
        len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) + end
        for text in texts
    )


def made(path: Path) -> dict[str, Any] | None:
    """Returns the settings in the first line of a file; None if it is no such file."""
    with suppress(OSError, ValueError, KeyError, TypeError), path.open(encoding="utf-8") as lines:
        return dict(json.loads(lines.readline())["made"])
    return None


def read(path: Path) -> list[list[str]]:
    """Returns the documents of each sequence in a file.

    Raises:
        InputError: a line that `write` did not write.
    """
    sequences: list[list[str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                sequences += [[] for _ in range(1 + row["sequence"] - len(sequences))]
                sequences[row["sequence"]].append(str(row["text"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} was changed since grail wrote it; delete it, or name another file"
        ) from error
    return sequences


def require_same(where: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raises InputError unless text was written with those settings; names those that differ."""
    if found is None:
        raise InputError(
            f"{where} exists, and grail did not write it; name a new file, or one of the same call"
        )
    odd = [name for name in wanted if found.get(name) != wanted[name]]
    if odd:
        said = ", ".join(f"{name} {found.get(name)!r} instead of {wanted[name]!r}" for name in odd)
        raise InputError(f"{where} is of another call: {said}; delete it, or name another file")


def write(output: Path, sequences: Sequence[Sequence[str]], settings: Mapping[str, Any]) -> None:
    """Writes the documents of all sequences; the file is complete, or not there.

    Raises:
        InputError: `output` exists.
        ExportError: it could not be written.
    """
    rows: list[dict[str, Any]] = [
        {"text": text, "sequence": number}
        for number, texts in enumerate(sequences)
        for text in texts
    ]
    rows[0]["made"] = dict(settings)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with complete_file(output, ExportError, size=len(content)) as path:
        path.write_bytes(content)
