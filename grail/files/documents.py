"""Reads the documents of a text one by one: files, datasets and iterables.

Parquet and datasets are read by `datasets`. JSON lines, JSON and CSV are not: it loses the
number of a faulty line, reads dates and numbers as other types than text, and takes 0.7 s and
75 MiB to read the first rows of a file.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from grail.errors import InputError, one_line

_PAGE = "docs/texts.md"  # of errors

Document = str | Sequence[Mapping[str, Any]]
Split = str | Sequence[str]

# Splits of text for an evaluation; the first one that a dataset has is read.
HELD_OUT_SPLITS = ("test", "validation")

_PIECE = 1 << 20  # characters of a plain text file that are read at a time
_LONGEST_CELL = 1 << 30  # characters; the csv module allows 2¹⁷ by default
_FIELDS = ("text", "messages")  # in this order, if no field is named
_WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
_JSON = (".json", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
_ROWS = (*_JSON, ".csv", ".tsv", ".parquet")  # a document each


def load_texts(
    source: str | Path | Iterable[Document], *, field: str | None = None, split: Split | None = None
) -> Iterator[Document]:
    """Reads the documents of a source: texts, or chats as lists of messages.

    Files are read as far as needed; a JSON array is read whole.

    Args:
        source: a path, by its ending in any case: `.jsonl` or `.ndjson` (one object or string a
            line), `.json` (the same, or one array), `.csv`, `.tsv` (with a header) or `.parquet`;
            any other file is plain UTF-8 text, which comes in pieces of about 2²⁰ characters. Or a
            dataset: its folder, `NAME`, `NAME:CONFIG`, or `wikitext2` for the raw WikiText-2. Or
            an iterable of documents.
        field: field or column of the documents; `text` if None, or else `messages`.
        split: split of a dataset; of several names the first that it has. `train` if None.

    Raises:
        InputError: the source cannot be read, or has no such field or split.
    """
    if not isinstance(source, str | Path):
        if isinstance(source, bytes) or not isinstance(source, Iterable):
            raise InputError(
                f"a text is a path, a name or an iterable of documents; got {source!r}", page=_PAGE
            )
        return iter(source)
    _require_names(source, field, split)
    path, suffix = Path(source), Path(source).suffix.lower()
    if is_file(source):
        _require_file(path)
        if suffix == ".parquet":
            return _from_datasets(str(source), "parquet", field, "train", data_files=str(path))
        if suffix in (".csv", ".tsv"):
            return _read_table(path, field)
        if suffix in _JSON:
            return _read_json(path, field)
        if field is not None:
            raise InputError(
                f"{source} is plain text and has no field {field!r}: leave it out", page=_PAGE
            )
        return _read_text(path)
    name, options = _builder(str(source))
    return _from_datasets(str(source), name, field, split, **options)


def split_of(source: str | Path, split: Split | None = None) -> str | None:
    """Returns the split that `load_texts` reads; None for a file, or a split without a name.

    Raises:
        InputError: see `load_texts`.
    """
    _require_names(source, None, split)
    if is_file(source):
        return None
    name, options = _builder(str(source))
    with _refusing(str(source)):
        return _open_split(_datasets(str(source)), str(source), name, split, options)[0]


def _require_names(source: str | Path, field: str | None, split: Split | None) -> None:
    """Raises InputError for empty names, and paths that are neither a file nor a folder."""
    if not str(source).strip() or str(source).startswith(":"):
        raise InputError(
            f"the name of the text is empty; give a file or the name of a dataset; got {source!r}",
            page=_PAGE,
        )
    for option, name in (("field", field), ("split", split)):
        if name is not None and not (name if isinstance(name, str) else list(name)):
            raise InputError(
                f"the name of the {option} is empty; leave it out for the default", page=_PAGE
            )
    path = Path(source)
    if str(source) == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        raise InputError(
            f"{source} is a pipe or a device, and a text is read more than once; write it to a "
            "file first",
            page=_PAGE,
        )
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{source} is a link that leads to no file; give the file itself", page=_PAGE
        )
    if isinstance(split, str) and is_file(source):
        raise InputError(
            f"{source} is one file and has no split {split!r}: leave the split out", page=_PAGE
        )


def _builder(source: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a dataset, and the options with which `datasets` reads it."""
    name, _, config = full_name(source).partition(":")
    options: dict[str, Any] = {"name": config or None}
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # "." has no name of its own
    if _holds_texts_alone(Path(source)):
        options["sample_by"] = "document"  # else each line is a row
    return name, options


def is_file(source: object) -> bool:
    """Returns True for a source that is read as one file, which may be missing."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    if path.is_dir():
        return False
    known = path.suffix.lower() in (*_ROWS, *_COMPRESSED, ".txt")
    return known or path.is_file() or (path.is_absolute() and not path.exists())


def is_plain_text(source: object) -> bool:
    """Returns True for a file of one document, which is read in pieces."""
    if not (is_file(source) and isinstance(source, str | Path)):
        return False
    return Path(source).suffix.lower() not in _ROWS


def is_wikitext2(source: object) -> bool:
    """Returns True for the short name of the raw WikiText-2, if it is no file or folder."""
    named = isinstance(source, str) and re.fullmatch(r"wikitext-?2(-raw-v1)?", source.lower())
    return bool(named) and not Path(str(source)).exists()


def has_lines_for_rows(source: object) -> bool:
    """Returns True for datasets whose rows are lines of documents: WikiText, Penn Treebank."""
    if not isinstance(source, str | Path):
        return False
    name = full_name(str(source)).partition(":")[0]
    return Path(name).name.lower() in ("wikitext", "ptb_text_only", "penn_treebank", "ptb")


def is_chat(document: object) -> bool:
    """Returns True for a list of messages, each with a role and content."""
    return (
        isinstance(document, Sequence)
        and not isinstance(document, str)
        and len(document) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in document)
    )


def full_name(source: str) -> str:
    """Returns the source itself, or the full name of WikiText-2 for its short one."""
    return _WIKITEXT2 if is_wikitext2(source) else source


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give text, JSON, JSON lines, CSV, Parquet or a dataset name",
            page=_PAGE,
        )
    if path.suffix.lower() in _COMPRESSED:
        raise InputError(f"{path} is compressed: unpack it first", page=_PAGE)


def _holds_texts_alone(folder: Path) -> bool:
    suffixes = {path.suffix.lower() for path in folder.rglob("*")} if folder.is_dir() else set()
    return ".txt" in suffixes and not suffixes.intersection((*_ROWS, ".arrow"))


def _read_text(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            while piece := lines.readlines(_PIECE):
                text = "".join(piece)
                if "\0" in text:
                    raise InputError(
                        f"{path} cannot be read as UTF-8 text: it holds NUL bytes", page=_PAGE
                    )
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}", page=_PAGE) from error


def _read_json(path: Path, field: str | None) -> Iterator[Document]:
    """Reads one JSON value a line, or one value that fills the file, such as an array."""
    first = True
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            whole = first and isinstance(row, list) and not is_chat(row)
        except (ValueError, RecursionError) as error:  # too many digits, or levels, as well
            if not first:
                raise InputError(
                    f"{path}, line {number} is not JSON that can be read: {error}", page=_PAGE
                ) from error
            whole = True
        if whole:
            yield from _read_json_value(path, field)
            return
        first = False
        yield _document(row, field, f"{path}, line {number}")


def _read_json_value(path: Path, field: str | None) -> Iterator[Document]:
    try:
        value = json.loads("".join(_read_text(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON that can be read: {error}; give one object a line, or one array "
            "of objects or strings",
            page=_PAGE,
        ) from error
    if not isinstance(value, list) or is_chat(value):
        yield _document(value, field, str(path))
        return
    for number, row in enumerate(value, start=1):
        yield _document(row, field, f"{path}, element {number} of the array")


def _lines(path: Path) -> Iterator[str]:
    for piece in _read_text(path):
        yield from piece.removesuffix("\n").split("\n")  # splitlines cuts at U+2028 too


def _read_table(path: Path, field: str | None) -> Iterator[Document]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        lines = (line + "\n" for line in _lines(path))
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        columns = list(rows.fieldnames or ())
        if twice := {name for name in columns if columns.count(name) > 1}:
            raise InputError(
                f"{path} has several columns of the name {min(twice)!r}; give each its own",
                page=_PAGE,
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row:
                raise InputError(
                    f"{where} has more cells than the header: quote those with commas", page=_PAGE
                )
            yield _document(row, field, where)
    except csv.Error as error:
        raise InputError(f"{path} is no table that can be read: {error}", page=_PAGE) from error
    finally:
        csv.field_size_limit(limit)


def _from_datasets(
    source: str, builder: str, field: str | None, split: Split | None, **options: Any
) -> Iterator[Document]:
    """Streams a dataset."""
    with _refusing(source):
        rows = iter(_open_split(_datasets(source), source, builder, split, options)[1])
    while True:
        with _refusing(source):
            row = next(rows, None)
        if row is None:
            return
        yield _document(row, field, source)


def _datasets(source: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"reading {source} needs datasets: pip install 'grail-kernels[llm]'; text, JSON and "
            "CSV work without",
            page="docs/index.md#install",
        ) from error


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """Turns any error of `datasets`, which have many unrelated types, into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{source} cannot be read as a file or a dataset: {one_line(error)}",
            page=_PAGE,
        ) from error


def _open_split(
    datasets: Any, source: str, builder: str, split: Split | None, options: dict[str, Any]
) -> tuple[str | None, Iterable[dict[str, Any]]]:
    """Returns name and rows of the first of the splits that a dataset has."""
    if any((Path(builder) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        stored = datasets.load_from_disk(builder)  # written by save_to_disk
        if not isinstance(stored, dict):
            return _only_split(stored, source, split)
    wanted = [split] if isinstance(split, str) else list(split or ("train",))
    reason = ""
    for name in wanted:
        try:
            return name, _open(datasets, builder, name, options)
        except (ValueError, KeyError) as error:
            reason = one_line(error)
            if "split" not in reason.lower():
                raise
    raise InputError(
        f"{source} has no split {' or '.join(wanted)}: {reason}; name one that it has",
        page=_PAGE,
    )


def _only_split(stored: Any, source: str, split: Split | None) -> tuple[str | None, Any]:
    """Returns name and rows of a dataset saved alone; refuses another split's name."""
    name = None if stored.split is None else str(stored.split)
    if isinstance(split, str) and split != name:
        called = "one split without a name" if name is None else f"the split {name!r} alone"
        raise InputError(
            f"{source} has {called}, and no split {split!r}: leave the split out", page=_PAGE
        )
    return name, stored


def _open(datasets: Any, builder: str, split: str, options: dict[str, Any]) -> Any:
    if not (Path(builder) / "dataset_dict.json").is_file():
        return datasets.load_dataset(builder, split=split, streaming=True, **options)
    stored = datasets.load_from_disk(builder)
    if split not in stored:
        raise ValueError(f"its splits are {list(stored)}")
    return stored[split]


def _document(row: Any, field: str | None, where: str) -> Document:
    """Returns the text or the chat in a row."""
    value = row
    if isinstance(row, dict):
        name = field or next((name for name in _FIELDS if name in row), None)
        found = ", ".join(map(repr, row)) or "none"
        if name not in row:
            missing = repr(field) if field else " or ".join(map(repr, _FIELDS))
            raise InputError(
                f"{where} has no field {missing}; fields found: {found}; give the name of the "
                "field that holds the text (--field)",
                page=_PAGE,
            )
        value, where = row[name], f"{where}, field {name!r}"
    elif field is not None:
        raise InputError(f"{where} is no object with a field {field!r}", page=_PAGE)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds half of a surrogate pair", page=_PAGE) from error
        return value
    if is_chat(value):
        return list(value)
    kind = "null" if value is None else type(value).__name__
    raise InputError(
        f"{where} holds no text but {kind}; give a text, or a list of messages with role and "
        "content",
        page=_PAGE,
    )
