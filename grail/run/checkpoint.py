"""Resumes a compression that was killed, at the block that it was in.

    d/block-0003.state      what narrowing block 3 changed in the model
    d/position-0004.state   hidden states at the entry of block 4, rows of the report, and of which
                            model, calibration and settings all this is
    d/command.state         the command line that is about to write its output
    d/sensitivity.state     what each site's narrowing costs, as far as that was measured
    d/process-0-of-4/       the same of each of several processes
    d/lock                  held by the run that uses the folder

After each block both are written, the block first. A position stays until the one after it is on
the disk and verified; so there are two, and where the last cannot be read the one before it can.
Everything else a run makes again from the model and the calibration.

What is read back is bitwise what was written, strides included, so a resumed run ends with the very
bits of one that was never interrupted: on the same device, with the same versions and threads.
"""

import copy
import fcntl
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from grail.arguments import as_path
from grail.calibrate.batches import Batch
from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.errors import InputError, StateError
from grail.recipe import Recipe
from grail.report.report import InputReport, SiteReport
from grail.runtime import state
from grail.runtime.folder import PARTIAL
from grail.runtime.processes import Processes
from grail.runtime.transaction import Transaction

_BLOCK, _POSITION, _COMMAND, _LOCK = "block", "position", "command", "lock"
_PROCESS, _SENSITIVITY = "process", "sensitivity"
_HASH = "sha256:"
_UNIMPORTANT = {"_name_or_path", "transformers_version"}  # of a configuration


@dataclass
class Position:
    """How far a run is: blocks `done`, and the run's own lists of what it has to say so far."""

    done: int
    rows: list[SiteReport]
    inputs: list[InputReport]
    notes: list[str]
    seconds: dict[str, float]


class Checkpoint:
    """The state of one run in a folder; made by `opened`.

    Args:
        folder: exists, and is this run's alone.
        model: as it was given.
        options: of the run.
        transaction: through which the model is changed.
        ranks: the processes of the run, each of which has a folder.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        recipe: Recipe,
        transaction: Transaction,
        processes: Processes,
    ):
        self.folder, self._model, self._transaction = folder, model, transaction
        self._processes = processes
        self._run = _fingerprints(model, recipe)
        self._seen = 0  # changes of the transaction that are on the disk, or come by themselves

    def reading(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, which become a part of what tells this run from others."""
        return hashed(batches, lambda found: self._run.update(calibration=_HASH + found))

    def resume(self, position: Position, streams: Sequence[Stream]) -> None:
        """Brings model, position and streams to where the last run was, if there was one.

        Raises:
            InputError: the folder holds the state of another run.
            StateError: nothing in it can be continued, or its disk is too small.
        """
        self._continue(position, streams)
        self._seen = len(self._transaction.changes)
        hidden = sum(tensor.nbytes for stream in streams for tensor in stream.hidden)
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        used = sum(path.stat().st_size for path in _files(self.folder))
        state.require_space(self.folder, 2 * hidden + weights - used)

    def save(self, position: Position, streams: Sequence[Stream]) -> None:
        """Writes what the last block changed, then the position.

        Args:
            streams: none if no block is left.

        Raises:
            StateError: the disk is full, or cannot be written.
        """
        self._save_block(position.done - 1)
        for path in self._positions():
            if path != self._path(_POSITION, position.done - 1):
                path.unlink()
        tensors = {
            f"{number}.{batch}": hidden
            for number, stream in enumerate(streams)
            for batch, hidden in enumerate(stream.hidden)
        }
        content = {
            "run": self._run,
            "surroundings": _surroundings(self._model),
            "strides": {name: tensor.stride() for name, tensor in tensors.items()},
            **asdict(position),
        }
        state.write(self._path(_POSITION, position.done), _POSITION, content, tensors)

    def _continue(self, position: Position, streams: Sequence[Stream]) -> None:
        """Goes on from the last position that every process can read, if there is one."""
        done, faults = self._readable()
        common = set.intersection(*map(set, self._processes.interleaved([done])))
        if not common:
            raise StateError(
                f"{'; '.join(faults) or 'another process has no state left'}. Nothing older can "
                f"be read: delete {self.folder} to start anew"
            )
        latest = max(common)
        if latest:
            for block in range(latest):
                self._narrow(block)
            found = state.read(self._path(_POSITION, latest), _POSITION)
            self._restore(found, position, streams)
        position.notes += [f"{fault}; went on from block {latest}" for fault in faults]

    def _readable(self) -> tuple[list[int], list[str]]:
        """Positions that can be read, as can the blocks before them; what is wrong with others.

        0, where nothing has been done, is one of them unless something is wrong.
        """
        positions, faults = self._positions(), []
        readable = []
        whole = 0
        for path in positions:
            try:
                content = state.read(path, _POSITION).content
                _require_same(self.folder, content["run"], self._run)
                while whole < content["done"]:
                    self._read_block(whole)
                    whole += 1
                readable.append(content["done"])
            except StateError as error:
                faults.append(str(error))
        return readable if faults else [0, *readable], faults

    def _restore(self, found: state.State, position: Position, streams: Sequence[Stream]) -> None:
        content, tensors = found.content, found.tensors
        if tensors:
            for number, stream in enumerate(streams):
                shelf = HiddenStates(stream.storage)
                for batch in range(len(stream)):
                    name = f"{number}.{batch}"
                    shelf.put(batch, _strided(tensors.pop(name), content["strides"][name]))
                stream.hidden = shelf
        position.done = content["done"]
        position.rows += [SiteReport(**row) for row in content["rows"]]
        position.inputs += [InputReport(**place) for place in content["inputs"]]
        position.notes += content["notes"]
        for phase, seconds in content["seconds"].items():
            position.seconds[phase] = position.seconds.get(phase, 0.0) + seconds
        here = _surroundings(self._model)
        position.notes += [
            f"resumed where {name} is {here[name]}, begun where it was {before}: equal to an "
            "uninterrupted run within rounding, not bitwise"
            for name, before in content["surroundings"].items()
            if here[name] != before
        ]

    def _save_block(self, number: int) -> None:
        names = {module: name for name, module in self._model.named_modules()}
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        settings: dict[str, dict[str, Any]] = {}
        changes = self._transaction.changes
        for owner, key in changes[self._seen :]:
            if (
                owner not in names
            ):  # stands for a slice of one that is: see `grail.networks.experts`
                continue
            name, value = f"{names[owner]}.{key}", getattr(owner, key)
            if isinstance(value, Tensor):
                tensors[name] = value
            elif hasattr(value, "__dict__"):  # a configuration of the module's own
                settings[name] = _difference(value, self._model.config)
            else:
                values[name] = value
        self._seen = len(changes)
        content = {"run": self._run, "values": values, "settings": settings}
        state.write(self._path(_BLOCK, number), _BLOCK, content, tensors)

    def _read_block(self, number: int) -> state.State:
        path = self._path(_BLOCK, number)
        found = state.read(path, _BLOCK)
        if found.content["run"] != self._run:
            raise StateError(f"{path} is of another run")
        return found

    def _narrow(self, number: int) -> None:
        """Changes the model as a block's file says."""
        found = self._read_block(number)
        for name, value in found.content["values"].items():
            self._transaction.set_attribute(*self._place(name), value)
        for name, difference in found.content["settings"].items():
            own = copy.copy(self._model.config)
            vars(own).update(difference)
            self._transaction.set_attribute(*self._place(name), own)
        for name, tensor in found.tensors.items():
            owner, key = self._place(name)
            parameter = isinstance(getattr(owner, key), nn.Parameter)
            change = self._transaction.set_parameter if parameter else self._transaction.set_buffer
            change(owner, key, tensor)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        owner, _, key = name.rpartition(".")
        return self._model.get_submodule(owner), key

    def _positions(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_POSITION}-*.state"))

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:04}.state"


class Measurement:
    """What `grail.sensitivity` has measured so far, in a folder; made by `measuring`."""

    def __init__(self, folder: Path, run: Mapping[str, str]):
        self._path, self._run = folder / f"{_SENSITIVITY}.state", run

    def read(self) -> state.State | None:
        """What was written last, if anything was.

        Raises:
            InputError: by a measurement of another model, calibration or setting.
            StateError: a damaged file.
        """
        if not self._path.exists():
            return None
        try:
            found = state.read(self._path, _SENSITIVITY)
        except StateError as error:
            raise StateError(f"{error}. Delete it to measure anew") from error
        _require_same(self._path.parent, found.content["run"], self._run)
        return found

    def write(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces it.

        Raises:
            StateError: the disk is full, or cannot be written.
        """
        state.write(self._path, _SENSITIVITY, {"run": self._run, **content}, tensors)


@contextmanager
def opened(
    folder: str | Path | None,
    model: nn.Module,
    recipe: Recipe,
    transaction: Transaction,
    processes: Processes,
) -> Iterator[Checkpoint | None]:
    """The checkpoint of a run in a folder, which no other run uses meanwhile; None without one.

    Of several processes each has a folder of its own in there.

    Raises:
        InputError: not a folder; one in use; a selector that is a function, which has no name by
            which another process could know it.
        StateError: a folder that cannot be written.
    """
    if folder is None:
        yield None
        return
    folder = as_path("resume_dir", folder)
    if processes.count > 1:
        folder /= f"{_PROCESS}-{processes.number}-of-{processes.count}"
    with _held(folder, recipe):
        yield Checkpoint(folder, model, recipe, transaction, processes)


@contextmanager
def measuring(
    folder: str | Path | None,
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Batch],
    probes: int,
) -> Iterator[Measurement | None]:
    """The same of a measurement, whose first `probes` batches show what the network loses."""
    if folder is None:
        yield None
        return
    folder = as_path("resume_dir", folder)
    with _held(folder, recipe):
        run = {**_fingerprints(model, recipe), "probes": str(probes)}
        for _ in hashed(batches, lambda found: run.update(calibration=_HASH + found)):
            pass
        yield Measurement(folder, run)


@contextmanager
def _held(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Makes a folder this run's alone, without what an earlier one was about to write."""
    if not isinstance(recipe.selector, str):
        raise InputError("a run can be resumed only with a selector that is given by its name")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the state of the run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise StateError(f"{folder} cannot be used: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another run") from error
        for path in folder.glob(f".*.state.*{PARTIAL}"):
            path.unlink()
        yield


def announce(folder: str | Path, command: Mapping[str, str]) -> None:
    """Keeps what command is about to give its output its name, the last step before `clear`."""
    state.write(Path(folder) / f"{_COMMAND}.state", _COMMAND, command, {})


def announced(folder: str | Path, command: Mapping[str, str]) -> bool:
    """Whether a run of the very same command came so far."""
    path = Path(folder) / f"{_COMMAND}.state"
    return path.exists() and state.read(path, _COMMAND).content == command


def clear(folder: str | Path) -> None:
    """Deletes a run's state, and its folder if nothing else is in it."""
    folder = as_path("resume_dir", folder)
    for of_process in folder.glob(f"{_PROCESS}-*-of-*"):
        clear(of_process)
    for path in (*_files(folder), folder / _LOCK):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def hashed(batches: Iterable[Batch], tell: Callable[[str], None]) -> Iterator[Batch]:
    """The batches; `tell` hears of the SHA-256 of them all."""
    seen = hashlib.sha256()
    for batch in batches:
        leaves, form = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        held = [state.digest(x) if isinstance(x, Tensor) else repr(x) for x in leaves]
        seen.update(f"{form}{held}".encode())
        yield batch
    tell(seen.hexdigest())


def fingerprint(model: Any) -> dict[str, str]:
    """SHA-256 of what makes a model what it is, by part."""
    weights = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        weights.update(f"{name} {state.digest(tensor)}".encode())
    config = getattr(getattr(model, "config", None), "__dict__", {})
    config = {key: value for key, value in config.items() if key not in _UNIMPORTANT}
    return {
        "weights": weights.hexdigest(),
        "structure": _hashed_text(repr(model)),
        "configuration": _hashed_text(repr(config)),
    }


def _hashed_text(text: str) -> str:
    """The SHA-256 of a text without the addresses of objects."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """In the order in which they may be deleted: nothing then needs what is gone."""
    names = (
        f"{_POSITION}-*.state",
        f"{_BLOCK}-*.state",
        f"{_SENSITIVITY}.state",
        f"{_COMMAND}.state",
    )
    return [path for name in names for path in sorted(folder.glob(name), reverse=True)]


def _require_same(folder: Path, before: Mapping[str, str], here: Mapping[str, str]) -> None:
    different = [
        f"{name} differs"
        if here[name].startswith(_HASH)
        else f"{name} was {before.get(name)} and is {here[name]}"
        for name in here
        if before.get(name) != here[name]
    ]
    if different:
        raise InputError(
            f"{folder} holds the state of another run: {', '.join(different)}. Give another "
            "folder, or delete it"
        )


def _fingerprints(model: Any, recipe: Recipe) -> dict[str, str]:
    """What must be the same for a run to go on; long values are hashed."""
    return {
        **{f"the model's {part}": _HASH + found for part, found in fingerprint(model).items()},
        **{name: repr(value) for name, value in vars(recipe).items()},
    }


def _surroundings(model: nn.Module) -> dict[str, str]:
    """What bits may depend on beside model, calibration and settings."""
    device = next(model.parameters()).device
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else (torch.backends.cpu.get_cpu_capability())
    )
    return {
        "torch": torch.__version__,
        "the device": f"{device.type} {kind}",
        "the number of threads": str(torch.get_num_threads()),
    }


def _difference(config: Any, base: Any) -> dict[str, Any]:
    """What a configuration says that another one does not."""
    other = vars(base)
    return {k: v for k, v in vars(config).items() if k not in other or other[k] != v}


def _strided(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
