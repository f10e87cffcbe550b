"""`Text`: a source of text and how it becomes sequences of tokens, before a model is loaded."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from grail.arguments import is_whole
from grail.calibrate.embedding import check_token_ids
from grail.errors import InputError
from grail.files.documents import (
    HELD_OUT_SPLITS,
    Split,
    full_name,
    is_plain_text,
    is_wikitext2,
    split_of,
)
from grail.files.load import length_before_loading, length_of_sequences, positions
from grail.files.packing import Join, require_text, token_batches
from grail.files.provenance import text_source
from grail.report._evaluate import require_causal
from grail.runtime.folder import file_hash
from grail.runtime.settings import documented, setting
from grail_kernels import check_kind

CALIBRATION_TOKENS, EVALUATION_TOKENS = 65536, 16384
FURTHER_TOKENS = 16384  # of guard text, and of text that selects channels
# Perplexity on WikiText-2 as in the literature: windows of so many tokens, and all of them.
_WIKITEXT2_WINDOW = 2048
# What a text can be, in help texts.
SOURCES = "a .txt, .json, .jsonl, .csv or .parquet file or a dataset (NAME, NAME:CONFIG, wikitext2)"
_MOST_AT_A_TIME = 1 << 31  # sequences of a batch, or tokens of a sequence


@documented
@dataclass(frozen=True)
class Text:
    """A text, and how it becomes sequences of tokens.

    Values of another kind raise InputError at once, other wrong ones when the text is read.
    """

    source: str = setting(
        ...,
        f"Text: {SOURCES}.",
        metavar="TEXT",
    )
    tokens: int | None = setting(
        CALIBRATION_TOKENS,
        "Tokens to read, such as 65536, 64k or 1M. Results improve up to about 10⁵.",
        metavar="COUNT",
    )
    field: str | None = setting(
        None,
        "Field or column of JSON, CSV, Parquet and datasets: a text, or a chat as a list of "
        "messages, which the tokenizer's chat template renders.",
        shown="text, else messages",
        panel="Reading text",
    )
    split: Split | None = setting(None, "Split of a dataset.", shown="train", panel="Reading text")
    join: Join | None = setting(
        None,
        "Separator of documents: eos is the end-of-text token, blank a blank line.",
        shown="eos; blank for WikiText, whose rows are lines",
        panel="Reading text",
    )
    sequence_length: int | None = setting(
        None,
        "Tokens per sequence; nothing is padded.",
        shown="1024, or all that the model has positions for",
        least=2,
        most=_MOST_AT_A_TIME,
        panel="Running",
    )
    batch_size: int = setting(
        4,
        "Sequences per forward pass.",
        least=1,
        most=_MOST_AT_A_TIME,
        panel="Running",
    )
    seed: int | None = setting(
        None, "Seed that draws the sequences at random.", shown="the first ones"
    )
    option: str = setting("calibration", "Purpose of the text, with which messages about it begin.")

    def __post_init__(self) -> None:
        check_kind("source", self.source, str, "the name of a file or dataset")
        check_kind("field", self.field, (str, NoneType), "the name of a field")
        for name in ("tokens", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if not (value is None or is_whole(value)):
                raise InputError(f"{name} must be a whole number; got {value!r}")

    @classmethod
    def held_out(cls, source: str, **how: Any) -> "Text":
        """Returns a text for an evaluation: of a dataset the test, else the validation split.

        WikiText-2 is read as in the literature, unless a length of sequences is given.
        """
        literature = is_wikitext2(source) and how.get("sequence_length") is None
        how = {"tokens": None, "option": "evaluate", "split": None} | how
        split = HELD_OUT_SPLITS if how["split"] is None else how["split"]
        return (_WikiText2 if literature else Text)(**{"source": source, **how, "split": split})

    def compared_on(self, source: str, given: Mapping[str, Any], option: str) -> "Text":
        """Returns the held-out text of a calibration, read in the same way except for `given`."""
        literature = is_wikitext2(source)  # is read in a fixed way, whatever the calibration's is
        how: dict[str, Any] = {"batch_size": self.batch_size, "option": option}
        if not literature:
            how |= {"tokens": EVALUATION_TOKENS, "join": self.join}
            how |= {"sequence_length": self.sequence_length}
        if not literature and not is_plain_text(source):
            how["field"] = self.field
        return Text.held_out(source, **{**how, **given})

    def checked(self, model: str) -> "Text":
        """Returns the text with the split that is read, refused if a fault shows before loading.

        Raises:
            InputError: see `require_text`; the message begins with the option.
        """
        length = length_before_loading(model, self.sequence_length)
        with self._named():
            found = replace(self, split=split_of(self.source, self.split))
            if length is not None and self.tokens is not None and self.tokens < length:
                raise InputError(
                    f"{self.tokens} tokens are less than one sequence of {length}; ask for more "
                    "tokens or for shorter sequences (--sequence-length)"
                )
            require_text(self.source, sequence_length=length, field=self.field, split=found.split)
        return found

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Begins the message of an error with the option that names the text."""
        try:
            yield
        except InputError as error:
            raise type(error)(f"{self.option}: {error}", page="docs/texts.md") from error

    def length(self, network: Any) -> int:
        """Returns the tokens of a sequence."""
        return length_of_sequences(network, self.sequence_length)

    def batches(self, network: Any, tokenizer: Any) -> list[Tensor]:
        """Returns the text as batches of tokens that the network's embedding has."""
        length = self.length(network)
        with self._named():
            batches = token_batches(
                self.source,
                tokenizer,
                tokens=self.tokens,
                sequence_length=length,
                batch_size=self.batch_size,
                seed=self.seed,
                field=self.field,
                split=self.split,
                join=self.join,
            )
            for batch in batches:
                check_token_ids(network, batch, tokenizer)
        require_causal(network, batches[0])
        return batches

    def read(self, network: Any, tokenizer: Any) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns `batches`, and their provenance: see `text_source`, and the settings given."""
        batches = self.batches(network, tokenizer)
        return batches, text_source(self.source, batches) | self.reading

    @property
    def reading(self) -> dict[str, Any]:
        """The settings of reading that were given."""
        said = {"field": self.field, "split": self.split, "join": self.join, "seed": self.seed}
        return {name: value for name, value in said.items() if value is not None}

    def is_same_text(self, other: "Text | None") -> bool:
        """Returns True if both read the same file, or the same split of a dataset."""
        if other is None or self.split != other.split:
            return False
        mine, its = Path(self.source), Path(other.source)
        if not (mine.exists() and its.exists()):
            return full_name(self.source) == full_name(other.source)
        if mine.samefile(its):
            return True
        both_files = mine.is_file() and its.is_file() and mine.stat().st_size == its.stat().st_size
        return both_files and file_hash(mine) == file_hash(its)


class _WikiText2(Text):
    """The test split of WikiText-2 in windows of 2048 tokens, or of all that a model can read."""

    def length(self, network: Any) -> int:
        most = positions(network) or _WIKITEXT2_WINDOW
        if most < _WIKITEXT2_WINDOW:
            warnings.warn(
                f"perplexity on wikitext2 is of windows of {most} tokens, all that the model has "
                f"positions for; the literature's has {_WIKITEXT2_WINDOW}",
                stacklevel=2,
            )
        return min(most, _WIKITEXT2_WINDOW)
