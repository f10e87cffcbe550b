"""What every adapter says of a library that is absent, of another version, or without a part."""

import types
import warnings

import pytest

from grail.adapters import _library
from grail.adapters._library import Library
from grail.errors import AdapterError
from grail.version import __version__


@pytest.fixture
def installed(monkeypatch):
    """`installed(version)`: a library "peer" of that version is installed."""
    return lambda found: monkeypatch.setattr(_library, "version", lambda _: found)


def test_a_library_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(AdapterError, match=r"pip install no-such-peer==2\.1"):
        Library("no-such-peer", ("2.0", "2.1"))


def test_an_unknown_version_warns_and_a_known_one_does_not(installed):
    installed("2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Library("peer", ("1.9", "2.0"))
    installed("3.0")
    with pytest.warns(UserWarning, match=r"tested with peer 1.9, 2.0, and 3.0 is installed"):
        Library("peer", ("1.9", "2.0"))


def test_a_missing_part_is_one_sentence_with_both_versions(installed):
    installed("2.0")
    library, owner = Library("peer", ("2.0",)), types.SimpleNamespace(__name__="peer.core")
    for call in (
        lambda: library.attribute(owner, "add_batch"),
        lambda: library.replace(owner, "add_batch", None),
    ):
        with pytest.raises(AdapterError, match=rf"2\.0 has no peer.core.add_batch.*{__version__}"):
            call()
    with pytest.raises(AdapterError, match=r"peer 2\.0 has no module nothing_like_it"):
        library.module("nothing_like_it.inner")


def test_a_module_that_the_library_needs_is_named(installed, tmp_path, monkeypatch):
    installed("2.0")
    (tmp_path / "peer_of_test.py").write_text("import nothing_like_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AdapterError, match=r"2\.0 imports nothing_like_it, which is not installed"):
        Library("peer", ("2.0",)).module("peer_of_test")


def test_two_adapters_at_once_are_refused_and_what_was_replaced_comes_back(installed):
    installed("2.0")
    library, owner = Library("peer", ("2.0",)), types.SimpleNamespace(one=1, two=2)
    with library.replacing((owner, "one", 10)):
        with (
            pytest.raises(AdapterError, match="replaced by an adapter already"),
            library.replacing((owner, "two", 20), (owner, "one", 11)),
        ):
            pass
        assert (owner.one, owner.two) == (10, 2)
    assert (owner.one, owner.two) == (1, 2)
    restore = library.replace(owner, "one", 3)
    restore()
    restore()
    assert owner.one == 1
