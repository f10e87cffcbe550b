"""Files of state: what was written is read, whatever else is refused by name."""

import json
import random
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bench.reliability import flipping
from grail.errors import InputError, StateError
from grail.runtime import state
from tests.counting import injected

TENSORS = {
    "matrix": torch.randn(3, 4),
    "scalar": torch.tensor(5),
    "empty": torch.zeros(0, 7, dtype=torch.bfloat16),
    "transposed": torch.randn(4, 6).T.bfloat16(),
    "flags": torch.tensor([True, False]),
    "special": torch.tensor([float("nan"), float("-inf"), -0.0]),
}
CONTENT = {"name": "model.layers.3", "ö": [1, 2.5, None], "rate": float("inf")}


@pytest.fixture
def path(tmp_path):
    """A file of `TENSORS` and `CONTENT`."""
    path = tmp_path / "one.state"
    state.write(path, "test", CONTENT, TENSORS)
    return path


def assert_whole(found):
    assert found.content == CONTENT
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_what_was_written_is_read(path):
    assert_whole(state.read(path, "test"))


def test_any_reader_of_safetensors_reads_it(path):
    found = load_file(path)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "small.state"
    state.write(path, "test", {}, {"x": torch.arange(3.0)})
    data = path.read_bytes()
    for place in range(8 * len(data)):
        path.write_bytes(flipping.flipped(data, place))
        injected("flipped bits in a state file")
        with pytest.raises(StateError, match=r"small\.state"):
            state.read(path, "test")


@pytest.mark.parametrize("kind", flipping.DAMAGES)
def test_damage_anywhere_is_found(kind, path):
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(40):
        path.write_bytes(flipping.damaged(data, kind, draw))
        injected("damaged state files")
        with pytest.raises(StateError, match=r"one\.state"):
            state.read(path, "test")


def resigned(data, change):
    """A file whose header someone changed, with the hash that then belongs to it."""
    count = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + count])
    header["__metadata__"]["state"] = json.loads(header["__metadata__"]["state"])
    change(header)
    header["__metadata__"]["state"] = json.dumps(header["__metadata__"]["state"])
    text = json.dumps(header).encode()
    return state._signed(len(text).to_bytes(8, "little") + text) + data[8 + count :]


def described(header):
    return header["__metadata__"]["state"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: described(h).update(schema=2), "is of schema 2"),
        (lambda h: described(h).update(algorithm=0), "is of algorithm 0"),
        (lambda h: described(h).update(kind="other"), "is of kind 'other'"),
        (lambda h: described(h).pop("content"), "makes no sense"),
        (lambda h: described(h)["hashes"].pop("flags"), "hashes of other tensors"),
        (lambda h: h.pop("flags"), "hashes of other tensors"),
        (lambda h: h["matrix"].update(shape=[-3, -4]), "of shape"),
        (lambda h: h["matrix"].update(shape=[1 << 40, 1 << 40]), "in the wrong place"),
        (lambda h: h["matrix"].update(data_offsets=[8, 56]), "in the wrong place"),
        (lambda h: h["matrix"].update(dtype="F7"), "makes no sense"),
        (lambda h: h["matrix"].update(dtype="I32"), "does not match its hash"),
        (lambda h: h["matrix"].update(shape=[4, 3]), "does not match its hash"),
        (lambda h: h["matrix"].update(shape=None), "makes no sense"),
        (lambda h: h["matrix"].clear(), "makes no sense"),
    ],
)
def test_a_header_that_is_signed_but_wrong_is_refused(change, said, path):
    path.write_bytes(resigned(path.read_bytes(), change))
    with pytest.raises(StateError, match=said):
        state.read(path, "test")


def test_no_memory_is_taken_for_what_the_file_cannot_hold(path, monkeypatch):
    def huge(header):
        # In its place, so that only the size of the file speaks against it.
        start = header["special"]["data_offsets"][0]
        header["special"].update(shape=[1 << 50], data_offsets=[start, start + (1 << 52)])

    path.write_bytes(resigned(path.read_bytes(), huge))
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(StateError, match="cut off"):
        state.read(path, "test")


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400))
def test_no_bytes_make_the_reader_fail_in_another_way(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.state"
    path.write_bytes(data)
    injected("fuzzed state files")
    with pytest.raises(StateError):
        state.read(path, "test")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(where=st.sampled_from(["entry", "description", "hashes", "all"]), value=_JSON)
def test_no_signed_header_makes_the_reader_fail_in_another_way(where, value, tmp_path_factory):
    injected("fuzzed state files")
    path = tmp_path_factory.getbasetemp() / "signed.state"
    state.write(path, "test", CONTENT, {"x": torch.arange(3.0)})

    def change(header):
        if where == "entry":
            header["x"] = value
        elif where == "description":
            header["__metadata__"]["state"] = value
        elif where == "hashes":
            described(header)["hashes"] = value
        else:
            header.clear()
            header["__metadata__"] = {"sha256": "0" * 64, "state": value}

    path.write_bytes(resigned(path.read_bytes(), change))
    with pytest.raises(StateError):
        state.read(path, "test")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StateError, match="there is no such file"):
        state.read(tmp_path / "none.state", "test")
    with pytest.raises(StateError, match="cannot be read"):
        state.read(tmp_path, "test")


def test_a_write_that_fails_leaves_the_file_that_was_there(path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StateError, match="No space left"):
        state.write(path, "test", {}, {})
    assert_whole(state.read(path, "test"))
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_reads_back_wrong_never_gets_its_name(path, monkeypatch):
    put = state._put

    def putting(file, *arguments):
        put(file, *arguments)
        file.seek(-1, 2)
        file.write(b"!")

    monkeypatch.setattr(state, "_put", putting)
    with pytest.raises(StateError, match="does not match its hash"):
        state.write(path, "test", {}, {"x": torch.ones(3)})
    assert_whole(state.read(path, "test"))


def test_too_little_disk_is_refused_before_the_write(path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 10))
    with pytest.raises(StateError, match="free some space"):
        state.write(path, "test", {}, TENSORS)
    assert_whole(state.read(path, "test"))


def test_a_dtype_that_no_file_holds_is_refused(tmp_path):
    with pytest.raises(InputError, match="complex64"):
        state.write(tmp_path / "c.state", "test", {}, {"x": torch.zeros(2, dtype=torch.complex64)})
