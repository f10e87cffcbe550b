"""`Mixture`: several texts as one calibration, with shares of its tokens."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grail.arguments import is_number, is_whole, plain
from grail.calibrate.stream import held_out_step
from grail.errors import InputError
from grail.files.documents import is_file, is_plain_text
from grail.files.load import length_before_loading, length_of_sequences
from grail.files.provenance import text_source
from grail.files.text import FURTHER_TOKENS, Text
from grail.runtime.settings import documented, setting
from grail_kernels import check_kind, kind_of

_PAGE = "docs/texts.md"  # of errors

_OF_TEXT = {field.name: field for field in dataclasses.fields(Text)}
_SHARED = ("tokens", "sequence_length", "batch_size", "seed")  # settings of all texts together
_ROUNDING = 0.015  # by which shares may miss 1: 0.33,0.33,0.33
_SHORT = "the text holds "  # begins the warning of `token_batches`


def _like_text(name: str) -> Any:
    """Declares a field with default and help text of the same field of `Text`."""
    return dataclasses.field(default=_OF_TEXT[name].default, metadata=_OF_TEXT[name].metadata)


@documented
@dataclass(frozen=True)
class Mixture:
    """Several texts as one calibration.

    Each text gives whole sequences by its share of `tokens`, one at least. They are interleaved so
    that each text has its share of the held-out sequences, and of those up to any position. A text
    that is too short gives all that it has, with a warning; the others give no more for that, so
    that the calibration is smaller.

    Raises:
        InputError: no text, a setting of all texts given for one of them, or shares that are not
            positive, not one for each text, or do not add up to 1.
    """

    texts: Sequence[str | Path | Text] = setting(
        ...,
        "Texts: files or names of datasets, or each a `grail.Text` with field, split and join of "
        "its own.",
    )
    shares: Sequence[float] | None = setting(
        None,
        "Shares of the tokens of several calibration texts, in the order of the texts, such as "
        "0.7,0.3. They add up to 1.",
        shown="equal",
        metavar="SHARES",
        panel="Reading text",
    )
    tokens: int | None = _like_text("tokens")
    sequence_length: int | None = _like_text("sequence_length")
    batch_size: int = _like_text("batch_size")
    seed: int | None = _like_text("seed")
    option: str = _like_text("option")

    def __post_init__(self) -> None:
        check_kind("texts", self.texts, (list, tuple), "a list of texts")
        if not self.texts:
            raise InputError("texts is empty; give one text or more", page=_PAGE)
        object.__setattr__(self, "texts", tuple(map(_as_part, self.texts)))
        for name in ("tokens", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if not (value is None or is_whole(value)):
                raise InputError(f"{name} must be a whole number; got {value!r}", page=_PAGE)
        if self.shares is not None:
            object.__setattr__(self, "shares", self._checked_shares(self.shares))

    def _checked_shares(self, shares: Any) -> tuple[float, ...]:
        """Returns the shares as numbers; see the class for what is refused."""
        shares = plain(shares)
        check_kind("shares", shares, (list, tuple), "a list of numbers, one for each text")
        shares = tuple(map(plain, shares))
        if len(shares) != len(self.texts):
            raise InputError(
                f"shares must be one number for each of {len(self.texts)} texts; got {len(shares)}",
                page=_PAGE,
            )
        for share in shares:
            if not is_number(share) or not 0 < share < math.inf:
                raise InputError(f"shares must be numbers > 0; got {share!r}", page=_PAGE)
        if abs(sum(shares) - 1) > _ROUNDING:
            raise InputError(f"shares must add up to 1; got {sum(shares):g}", page=_PAGE)
        if self.tokens is None:
            raise InputError(
                "shares divide a number of tokens; give tokens, or leave shares out", page=_PAGE
            )
        return tuple(map(float, shares))

    @property
    def source(self) -> str:
        """The names of all texts."""
        return ", ".join(text.source for text in self._parts)

    @property
    def _parts(self) -> tuple[Text, ...]:
        """The texts, each read as all are."""
        how = {name: getattr(self, name) for name in ("sequence_length", "batch_size", "seed")}
        return tuple(
            replace(text, **how, tokens=None, option=f"{self.option} {text.source}")
            for text in cast("tuple[Text, ...]", self.texts)
        )

    def checked(self, model: str) -> "Mixture":
        """Returns the mixture with the splits that are read, refused if a fault shows before.

        Raises:
            InputError: a text that cannot be read or is given twice, or fewer tokens than one
                sequence of each; the message begins with the option.
        """
        length = length_before_loading(model, self.sequence_length)
        if length is not None:
            self._wanted(length)
        found = [part.checked(model) for part in self._parts]
        for number, part in enumerate(found):
            for other in found[:number]:
                if part.field == other.field and part.is_same_text(other):
                    raise InputError(
                        f"{self.option}: {part.source} is the text {other.source} again; give "
                        "each text once, and its weight by shares",
                        page=_PAGE,
                    )
        texts = cast("tuple[Text, ...]", self.texts)
        return replace(
            self,
            texts=tuple(
                replace(text, split=part.split) for text, part in zip(texts, found, strict=True)
            ),
        )

    def length(self, network: Any) -> int:
        """Returns the tokens of a sequence."""
        return length_of_sequences(network, self.sequence_length)

    def batches(self, network: Any, tokenizer: Any) -> list[Tensor]:
        """Returns the texts, interleaved, as batches of tokens that the network's embedding has."""
        return self.read(network, tokenizer)[0]

    def read(self, network: Any, tokenizer: Any) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns `batches`, and their provenance.

        The provenance has source (all names), tokens and tokens_sha256 of the whole, seed, and for
        each of `texts` what `Text.read` returns.

        Raises:
            InputError, EmptyCalibrationError: a text that cannot be read, or holds less than one
                sequence.

        Warns:
            UserWarning: a text is too short for its share.
        """
        length = self.length(network)
        wanted = self._wanted(length)
        rows, origins = [], []
        for part, sequences in zip(self._parts, wanted, strict=True):
            tokens = None if sequences is None else sequences * length
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _SHORT)
                batches, origin = replace(part, tokens=tokens).read(network, tokenizer)
            rows.append(torch.cat(batches))
            origins.append({name: v for name, v in origin.items() if name != "seed"})
            if tokens is not None and origin["tokens"] < tokens:
                warnings.warn(
                    f"{part.source} holds {origin['tokens']} tokens in whole sequences, fewer than "
                    f"the {tokens} of its share; all of them are used, and no more of other texts",
                    stacklevel=2,
                )
        mixed = torch.stack(_interleaved(rows))
        found = list(mixed.split(self.batch_size))
        whole = text_source(self.source, found)
        seed = {} if self.seed is None else {"seed": self.seed}
        return found, whole | seed | {"texts": origins}

    def _wanted(self, length: int) -> list[int] | list[None]:
        """Returns the sequences of each text; None for all."""
        if self.tokens is None:
            return [None] * len(self.texts)
        total = -(-self.tokens // length)
        if total < len(self.texts):
            raise InputError(
                f"{self.option}: {self.tokens} tokens are less than one sequence of {length} for "
                f"each of {len(self.texts)} texts; ask for more tokens or for shorter sequences "
                "(--sequence-length)",
                page=_PAGE,
            )
        return apportion(total, self.shares or [1] * len(self.texts), least=1)

    def is_same_text(self, other: Text | None) -> bool:
        """Returns True if one of the texts is the other; see `Text.is_same_text`."""
        return any(part.is_same_text(other) for part in self._parts)

    def compared_on(self, source: str, given: Any, option: str) -> Text:
        """Returns a held-out text, read as all texts of the mixture are, except for `given`."""
        return self._common.compared_on(source, given, option)

    @property
    def _common(self) -> Text:
        """The first text, with the ways to read it that all texts share."""
        parts = self._parts
        fields = {part.field for part in parts if not is_plain_text(part.source)}
        joins = {part.join for part in parts}
        return replace(
            parts[0],
            field=fields.pop() if len(fields) == 1 else None,
            join=joins.pop() if len(joins) == 1 else None,
        )


AnyText = str | Path | Text | Mixture | Sequence[str | Path | Text]


def as_text(name: str, text: object) -> Text | Mixture:
    """Returns a text that is given as one, as a name or path, or as a list of texts.

    Raises:
        InputError: another kind, by the name of the argument.
    """
    if isinstance(text, (str, Path)):
        return Text(str(text))
    if isinstance(text, (list, tuple)):
        mixture = Mixture(text)
        only = cast("Text", mixture.texts[0])
        return mixture if len(mixture.texts) > 1 else only
    check_kind(name, text, (Text, Mixture), "a text, a list of texts or a grail.Mixture")
    return cast("Text | Mixture", text)


def named_texts(
    sources: Sequence[str],
    shares: Sequence[float] | None = None,
    *,
    field: str | None = None,
    split: str | None = None,
    **how: Any,
) -> Text | Mixture:
    """Returns the texts of a command line: one text, or a mixture of several.

    Args:
        sources: names of the texts.
        shares: see `Mixture`.
        field: of each text that is no plain text; of all if all are, which then refuse it.
        split: of each text that is no file; of all if all are.
        how: other settings of `Text`, for all of them.
    """
    if len(sources) == 1 and shares is None:
        return Text(sources[0], field=field, split=split, **how)
    fields = [source for source in sources if not is_plain_text(source)] or sources
    splits = [source for source in sources if not is_file(source)] or sources
    join = how.pop("join", None)
    texts = [
        Text(
            source,
            field=field if source in fields else None,
            split=split if source in splits else None,
            join=join,
        )
        for source in sources
    ]
    return Mixture(texts, shares, **how)


def further_text(
    like: Text | Mixture, sources: Sequence[str], given: Mapping[str, Any], option: str
) -> Text | Mixture:
    """Returns text with another purpose than a calibration's, read alike except for `given`.

    Args:
        like: the calibration.
        sources: names of the text, or of several in equal parts.
        given: settings of `Text`.
        option: the text's purpose.
    """
    common = like._common if isinstance(like, Mixture) else like
    how = {name: getattr(common, name) for name in ("sequence_length", "batch_size", "seed")}
    how |= {"tokens": FURTHER_TOKENS, "join": common.join, "option": option}
    if not all(map(is_plain_text, sources)):
        how["field"] = common.field
    return named_texts(sources, **{**how, **given})


def apportion(total: int, shares: Sequence[float], least: int = 0) -> list[int]:
    """Divides a number of things by shares.

    Args:
        total: of things, `least` for each share or more.
        shares: weights > 0, in any unit.
        least: what each gets at least.

    Returns:
        Whole numbers with the sum `total`, less than 1 from the exact shares (largest remainders)
        where `least` allows it.
    """
    whole = sum(map(Fraction, shares))
    exact = [Fraction(share) * total / whole for share in shares]
    counts = [max(least, math.floor(part)) for part in exact]
    while rest := total - sum(counts):
        step = 1 if rest > 0 else -1
        free = [i for i, count in enumerate(counts) if count + step >= least]
        counts[max(free, key=lambda i: step * (exact[i] - counts[i]))] += step
    return counts


def interleaving(counts: Sequence[int]) -> list[int]:
    """Returns the text of each position of a calibration made of several texts.

    Positions that a run holds out (`grail.calibrate.stream`) and the others are filled apart, each
    by the texts in proportion and evenly, so that no rhythm of the texts meets the rhythm of the
    held-out positions: a round of five texts would hold out one of them alone.

    Args:
        counts: sequences of each text.
    """
    total = sum(counts)
    step = held_out_step(total)
    held = apportion(total // step if step > 1 else 0, counts)
    kept = [count - taken for count, taken in zip(counts, held, strict=True)]
    orders = {True: iter(_evenly(held)), False: iter(_evenly(kept))}
    return [next(orders[step > 1 and (i + 1) % step == 0]) for i in range(total)]


def _evenly(counts: Sequence[int]) -> list[int]:
    """Returns each text as often as it counts, spread evenly over the list."""
    places = (
        (Fraction(2 * number + 1, 2 * count), text)
        for text, count in enumerate(counts)
        for number in range(count)
    )
    return [text for _, text in sorted(places)]


def _interleaved(rows: Sequence[Tensor]) -> list[Tensor]:
    """Returns the rows of all texts in the order of `interleaving`, each text's in its own."""
    texts = [iter(of_text) for of_text in rows]
    return [next(texts[text]) for text in interleaving([len(of_text) for of_text in rows])]


def _as_part(text: object) -> Text:
    """Returns a text of a mixture; refuses settings that are of all texts."""
    if isinstance(text, (str, Path)):
        return Text(str(text))
    if not isinstance(text, Text):
        raise InputError(
            f"texts must be paths, names or grail.Text; one is {kind_of(text)}", page=_PAGE
        )
    for name in _SHARED:
        if getattr(text, name) != _OF_TEXT[name].default:
            raise InputError(
                f"{name} of {text.source} is given, and a mixture has one for all its texts; give "
                f"it as grail.Mixture(texts, {name}=…)",
                page=_PAGE,
            )
    return text
