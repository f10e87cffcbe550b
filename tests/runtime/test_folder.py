"""A new file is complete or not there, whatever happens while it is written."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grail.errors import ExportError, InputError
from grail.runtime import folder
from grail.runtime.folder import PARTIAL, complete_file, require_new_file

WRITING = """
import resource, signal, sys
from pathlib import Path
from grail.errors import ExportError
from grail.runtime.folder import complete_file
target, what = Path(sys.argv[1]), sys.argv[2]
if what == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with complete_file(target, ExportError, size=1 << 20) as partial, partial.open("wb") as file:
    file.write(bytes(1 << 15))
    file.flush()
    print("half", flush=True)
    if what == "wait":
        signal.pause()
    file.write(bytes(1 << 20))
"""


def write(target: Path, content: bytes = b"whole") -> None:
    with complete_file(target, ExportError, size=5) as partial:
        partial.write_bytes(content)


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


@pytest.mark.parametrize("name", ["a", "grüße 模型 🐟.gguf", "-n", "a b\tc", "x" * 230])
def test_a_file_gets_its_name(tmp_path, name):
    write(tmp_path / name)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"whole"
    assert (tmp_path / name).stat().st_nlink == 1


def test_what_was_killed_blocks_no_second_try(tmp_path):
    target = tmp_path / "a.gguf"
    command = [sys.executable, "-c", WRITING, str(target), "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    (left,) = names(tmp_path)
    assert left.startswith(".a.gguf.")
    assert left.endswith(PARTIAL)
    write(target)
    assert target.read_bytes() == b"whole"


def test_an_interrupt_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", WRITING, str(tmp_path / "a.gguf"), "wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
    assert process.returncode != 0
    assert names(tmp_path) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", WRITING, str(tmp_path / "a.gguf"), "full"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ExportError" in done.stderr
    assert "a.gguf could not be written: [Errno 27] File too large" in done.stderr
    assert names(tmp_path) == []


def test_a_full_disk_is_said_where_a_library_does_not(tmp_path, monkeypatch):
    usages = iter([1 << 40, 1000])  # before the file is written, and after it failed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(usages)))

    def fail(*_: object) -> None:
        raise OSError("9 requested and 5 written")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ExportError, match=r"9 requested and 5 written; the disk is full$"):
        write(tmp_path / "a.gguf")
    assert names(tmp_path) == []


def test_of_two_at_once_one_is_whole_and_the_other_is_told(tmp_path, monkeypatch):
    target = tmp_path / "a.gguf"
    checked = folder.require_new_file

    def meanwhile(output: Path) -> None:
        """The other process gives its file the name right after the check."""
        checked(output)
        output.write_bytes(b"first")

    monkeypatch.setattr(folder, "require_new_file", meanwhile)
    with (
        pytest.raises(InputError, match=r"a.gguf exists already; name a new file"),
        complete_file(target, ExportError, size=6) as partial,
    ):
        partial.write_bytes(b"second")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["a.gguf"]


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "a", b"other")
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("to", ["there", "nowhere"])
def test_a_link_is_not_written_through(tmp_path, to):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / to)
    with pytest.raises(InputError, match="link exists already"):
        require_new_file(tmp_path / "link")
    with pytest.raises(InputError, match="link exists already"):
        write(tmp_path / "link")
    assert names(tmp_path) == ["link", "there"]
    assert (tmp_path / "there").read_bytes() == b"mine"


def test_a_folder_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link" / "a")
    assert names(tmp_path / "real") == ["a"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_written_is_refused_before_any_work():
    with pytest.raises(InputError, match=r"/proc/a.gguf cannot be written: .*; name a file else"):
        require_new_file(Path("/proc/a.gguf"))


def test_a_name_that_is_too_long_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written: .*File name too long"):
        require_new_file(tmp_path / ("x" * 250))
    with pytest.raises(InputError, match="nowhere is no folder; make it first"):
        require_new_file(tmp_path / "nowhere" / "a")
    assert names(tmp_path) == []
