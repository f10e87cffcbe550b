"""The calibration text of a folder that grail wrote: the one its report names, or another one."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from grail.errors import InputError
from grail.files.mixture import AnyText, Mixture, as_text
from grail.files.text import Text
from grail.runtime.folder import file_hash

_READING = ("field", "split", "join")  # settings of `Text` that a report repeats
_OF_ALL = ("tokens", "sequence_length", "seed")  # the same of a mixture


def text_of_folder(folder: Path, given: AnyText | None = None) -> Text | Mixture:
    """Returns the text or texts on which activations of a compressed model are collected.

    Args:
        folder: written by `grail.compress_checkpoint` or the command line.
        given: the text to read; None takes the one of the folder's report, read as the run read it.

    Returns:
        The text, with the split that is read.

    Raises:
        InputError: none is given and the report names none, or a file that is not there or changed
            since; or the text cannot be read.
    """
    text = _reported(folder) if given is None else as_text("calibration", given)
    return text.checked(str(folder))


def read_calibration(
    folder: Path, given: AnyText | None, network: Any, tokenizer: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns the tokens of a folder's calibration text, and where they come from.

    Args:
        folder, given: see `text_of_folder`.
        network, tokenizer: of the folder.

    Returns:
        Batches of token ids [sequences, length], and source, tokens and hashes of the text.

    Raises:
        InputError: see `text_of_folder`; or the report's text gives other tokens than those of the
            run.
    """
    text = text_of_folder(folder, given)
    batches, origin = text.read(network, tokenizer)
    expected = _calibration(folder).get("tokens_sha256")
    if given is None and expected != origin["tokens_sha256"]:
        raise InputError(
            f"{text.source} gives other tokens than it gave when {folder} was written: tokenizer "
            "or dataset changed since; give a text as calibration (--calibration)"
        )
    return batches, origin


def _reported(folder: Path) -> Text | Mixture:
    """Returns the text that a folder's report names, read as the run read it."""
    found = _calibration(folder)
    if "collected" in found:
        raise InputError(
            f"{folder} was made from statistics in {found.get('source')}, which hold no text; "
            "give a text as calibration (--calibration)"
        )
    how: dict[str, Any] = {name: found.get(name) for name in _OF_ALL}
    if "texts" not in found:
        return replace(_one(folder, found), **how)
    texts = [_one(folder, text) for text in found["texts"]]
    shares = [text["tokens"] / found["tokens"] for text in found["texts"]]
    return Mixture(texts, shares, **how)


def _one(folder: Path, found: Mapping[str, Any]) -> Text:
    """Returns a text that a folder's report names."""
    if not isinstance(source := found.get("source"), str):
        raise InputError(
            f"the report of {folder} names no calibration text; give one as calibration "
            "(--calibration)"
        )
    if "sha256" in found:  # it was a file
        path = Path(source)
        if not path.is_file():
            raise InputError(
                f"{folder} was calibrated on {source}, which is not there from here; give a text "
                "as calibration (--calibration)"
            )
        if file_hash(path) != found["sha256"]:
            raise InputError(
                f"{folder} was calibrated on {source}, which changed since; give a text as "
                "calibration (--calibration)"
            )
    return Text(source, **{name: found[name] for name in _READING if name in found})


def _calibration(folder: Path) -> dict[str, Any]:
    """Returns what a folder's report says of the calibration text; empty if it says nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        length = report["calibration"].get("sequence_length")
        return {"sequence_length": length, **report["provenance"]["calibration"]}
    return {}
