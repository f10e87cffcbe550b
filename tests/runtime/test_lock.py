import pytest

from grail.errors import InputError, StateError
from grail.runtime.lock import LOCK, locked


def test_a_folder_is_created_and_locked_until_the_end(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert (folder / LOCK).is_file()
        with pytest.raises(InputError, match="in use by another run"), locked(folder):
            pass
    with locked(folder):
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="is a file"), locked(tmp_path / "f"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(StateError, match="cannot be used"), locked(tmp_path / "f" / "d"):
        pass
