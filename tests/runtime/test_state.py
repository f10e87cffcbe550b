"""Files of state: what was written is read, whatever else is refused by name."""

import json
import random
import subprocess
import sys
import tracemalloc
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import serialize_file
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float64", "complex64"])
def test_each_dtype_is_read_bit_for_bit(dtype, tmp_path):
    values = (torch.randn(5, 3, dtype=torch.float64) * 9).to(getattr(torch, dtype))
    state.write(tmp_path / "x.state", "test", {}, {"x": values})
    found = state.read(tmp_path / "x.state", "test").tensors["x"]
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


def test_tensors_that_share_memory_are_read_apart(tmp_path):
    whole = torch.arange(10.0)
    shared = {"whole": whole, "again": whole, "slice": whole[2:7], "steps": whole[::2]}
    state.write(tmp_path / "x.state", "test", {}, shared)
    found = state.read(tmp_path / "x.state", "test").tensors
    assert list(found) == list(shared)
    assert all(torch.equal(found[name], tensor) for name, tensor in shared.items())
    found["whole"].zero_()
    assert torch.equal(found["again"], whole)


def test_what_was_conjugated_lazily_is_written_as_it_reads(tmp_path):
    values = torch.randn(4, dtype=torch.complex64).conj()
    state.write(tmp_path / "x.state", "test", {}, {"x": values, "minus": values.imag})
    found = state.read(tmp_path / "x.state", "test").tensors
    assert torch.equal(found["x"], values)
    assert torch.equal(found["minus"], values.imag)


def test_tensors_start_where_torch_puts_its_own(path):
    found = state.read(path, "test").tensors.values()
    assert not [tensor for tensor in found if tensor.data_ptr() % 64]


def test_a_file_is_as_readable_as_others_of_the_folder(path):
    path.with_name("other").touch()
    assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_a_killed_write_leaves_what_can_be_discarded(tmp_path):
    code = (
        "import os, sys, torch; from pathlib import Path; from grail.runtime import state\n"
        "state.flush = lambda *_, **__: os._exit(9)\n"
        "state.write(Path(sys.argv[1]) / 'x.state', 'test', {}, {'x': torch.ones(3)})"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.state.")
    state.discard_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_first_schema_is_refused_as_such(tmp_path):
    # As it was written: the header's own hash, and no digest of the description.
    description = {"schema": 1, "algorithm": 2, "kind": "test", "content": {}, "hashes": {}}
    metadata = {"sha256": "0" * 64, "state": json.dumps(description)}
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "x.state").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StateError, match="is of schema 1; 2 can be read here"):
        state.read(tmp_path / "x.state", "test")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "others"])
def test_a_file_of_another_program_is_refused(metadata, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "x.state", metadata)
    with pytest.raises(StateError, match="no state file of grail"):
        state.read(tmp_path / "x.state", "test")


def test_the_same_state_gives_the_same_bytes(path):
    state.write(path.with_name("other"), "test", CONTENT, TENSORS)
    assert path.with_name("other").read_bytes() == path.read_bytes()


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
    _, _, description = header["__metadata__"]["state"].partition(" ")
    header["__metadata__"]["state"] = json.loads(description)
    change(header)
    header["__metadata__"] = state.signed(json.dumps(header["__metadata__"]["state"]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + count :]


def described(header):
    return header["__metadata__"]["state"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: described(h).update(schema=3), "is of schema 3"),
        (lambda h: described(h).update(algorithm=0), "is of algorithm 0"),
        (lambda h: described(h).update(kind="other"), "is of kind 'other'"),
        (lambda h: described(h).pop("content"), "makes no sense"),
        (lambda h: described(h)["hashes"].pop("flags"), "hashes are of other tensors"),
        (lambda h: described(h).update(hashes=None), "makes no sense"),
        (lambda h: h.pop("flags"), "damaged or cut off"),
        (lambda h: h["matrix"].update(shape=[-3, -4]), "damaged or cut off"),
        (lambda h: h["matrix"].update(shape=[1 << 40, 1 << 40]), "damaged or cut off"),
        (lambda h: h["matrix"].update(data_offsets=[0, 48]), "damaged or cut off"),
        (lambda h: h["matrix"].update(dtype="F7"), "damaged or cut off"),
        (lambda h: h["matrix"].update(dtype="I32"), "does not match its hash"),
        (lambda h: h["matrix"].update(shape=[4, 3]), "does not match its hash"),
        (lambda h: h["matrix"].update(shape=None), "damaged or cut off"),
        (lambda h: h["matrix"].clear(), "damaged or cut off"),
    ],
)
def test_a_header_that_is_signed_but_wrong_is_refused(change, said, path):
    path.write_bytes(resigned(path.read_bytes(), change))
    with pytest.raises(StateError, match=said):
        state.read(path, "test")


def test_no_memory_is_taken_for_what_the_file_cannot_hold(path):
    def huge(header):
        # The last, so that only the size of the file speaks against it.
        del header["flags"]
        start = header["special"]["data_offsets"][0]
        header["special"].update(shape=[1 << 50], data_offsets=[start, start + (1 << 52)])

    path.write_bytes(resigned(path.read_bytes(), huge))
    tracemalloc.start()
    with pytest.raises(StateError, match="cut off"):
        state.read(path, "test")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # 2⁵² bytes are claimed
    tracemalloc.stop()


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
    def serialize(tensors, path, metadata):
        serialize_file(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(state, "serialize_file", serialize)
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
    with pytest.raises(InputError, match="complex128"):
        state.write(tmp_path / "c.state", "test", {}, {"x": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())
