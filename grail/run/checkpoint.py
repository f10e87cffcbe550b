"""Resumes a run at the block in which it was killed.

    d/block-0003.state      the changes of the model in block 3
    d/position-0004.state   hidden states at the entry of block 4, the report so far, and the
                            fingerprint of the run

After each block both are written, the block first. A position is deleted only after the next one is
on the disk and verified. So there are two, and if the last cannot be read, the one before can.
Everything else is computed again from the model and the calibration.

What is read is bitwise what was written, strides included. A resumed run therefore ends with the
bits of an uninterrupted one on the same device, with the same versions and threads.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.errors import StateError
from grail.report.report import InputReport, LayerReport, SiteReport
from grail.run.fingerprint import require_same_run
from grail.run.resume_folder import BLOCK, POSITION, files
from grail.runtime import state
from grail.runtime.processes import Processes
from grail.runtime.transaction import Transaction


@dataclass(frozen=True)
class Position:
    """The number of blocks that are done, the report on them, and the seconds of each phase."""

    done: int
    rows: list[SiteReport]
    inputs: list[InputReport]
    quantized: list[LayerReport]
    notes: list[str]
    seconds: dict[str, float]


class Checkpoint:
    """The state of one run in a folder.

    Args:
        folder: exists, and is locked for this run (`grail.run.resume_folder.opened`).
        run: the fingerprint of the run.
        model: the model before the run.
        transaction: through which the model is changed.
        processes: of the run; each has a folder.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, str],
        model: nn.Module,
        transaction: Transaction,
        processes: Processes,
    ):
        self._folder, self._run, self._model, self._processes = folder, run, model, processes
        self._blocks = _BlockFiles(folder, run, model, transaction)

    def resume(
        self, streams_after: Callable[[int], Sequence[Stream]], waiting_bytes: int
    ) -> Position | None:
        """Brings model and streams to the last position, and returns it; None if there is none.

        Args:
            streams_after: returns the streams of the run after so many blocks.
            waiting_bytes: the most that the hidden states of a position take.

        Raises:
            InputError: the folder holds the state of another run.
            StateError: no position can be read, or the disk is too small.
        """
        done, faults = self._readable()
        common = set.intersection(*map(set, self._processes.interleaved([done])))
        if not common:
            raise StateError(
                f"{'; '.join(faults) or 'another process has no state left'}; nothing older can "
                f"be read: delete {self._folder} to start anew"
            )
        latest = max(common)
        for block in range(latest):
            self._blocks.apply(block)
        self._blocks.skip()
        position = None
        if latest:
            found = state.read(self._path(latest), POSITION)
            self._restore(found, streams_after)
            position = self._position(found.content, faults)
        self._require_space(waiting_bytes)
        return position

    def save(self, position: Position, streams: Sequence[Stream]) -> None:
        """Writes the changes of the last block, then the position.

        Args:
            streams: none if no block is left.

        Raises:
            StateError: the disk is full, or cannot be written.
        """
        self._blocks.save(position.done - 1)
        for path in self._positions():
            if path != self._path(position.done - 1):
                path.unlink()
        tensors = {
            f"{number}.{batch}": hidden
            for number, stream in enumerate(streams)
            for batch, hidden in zip(stream.batches, stream.hidden, strict=True)
        }
        content = {
            "run": self._run,
            "surroundings": _surroundings(self._model),
            "strides": {name: tensor.stride() for name, tensor in tensors.items()},
            **asdict(position),
        }
        state.write(self._path(position.done), POSITION, content, tensors)

    def _readable(self) -> tuple[list[int], list[str]]:
        """Returns the positions that can be read with all blocks before them, and all faults.

        0, the start of a run, is one of them unless there is a fault.
        """
        readable, faults = [], []
        whole = 0
        for path in self._positions():
            try:
                content = state.read(path, POSITION).content
                require_same_run(self._folder, content["run"], self._run)
                while whole < content["done"]:
                    self._blocks.read(whole)
                    whole += 1
                readable.append(content["done"])
            except StateError as error:
                faults.append(str(error))
        return readable if faults else [0, *readable], faults

    def _restore(
        self, found: state.State, streams_after: Callable[[int], Sequence[Stream]]
    ) -> None:
        """Replaces the hidden states of streams; after the last block there are none."""
        if not found.tensors:
            return
        for number, stream in enumerate(streams_after(found.content["done"])):
            hidden = HiddenStates(stream.storage)
            for batch in stream.batches:
                name = f"{number}.{batch}"
                tensor, strides = found.tensors.pop(name), found.content["strides"][name]
                hidden.put(batch, _strided(tensor, strides))
            stream.hidden = hidden

    def _position(self, content: Mapping[str, Any], faults: Sequence[str]) -> Position:
        """Returns the position of a file, with notes on other surroundings and on faults."""
        here, done = _surroundings(self._model), content["done"]
        elsewhere = [
            f"resumed where {name} is {here[name]}, begun where it was {before}: equal to an "
            "uninterrupted run within rounding, not bitwise"
            for name, before in content["surroundings"].items()
            if here[name] != before
        ]
        damaged = [f"{fault}; went on from block {done}" for fault in faults]
        return Position(
            done,
            [SiteReport(**row) for row in content["rows"]],
            [InputReport(**row) for row in content["inputs"]],
            [LayerReport(**row) for row in content["quantized"]],
            [*content["notes"], *elsewhere, *damaged],
            content["seconds"],
        )

    def _require_space(self, waiting_bytes: int) -> None:
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        used = sum(path.stat().st_size for path in files(self._folder))
        state.require_space(self._folder, 2 * waiting_bytes + weights - used)

    def _positions(self) -> list[Path]:
        return sorted(self._folder.glob(f"{POSITION}-*.state"))

    def _path(self, done: int) -> Path:
        return self._folder / f"{POSITION}-{done:04}.state"


class _BlockFiles:
    """The files of what narrowing a block changed in the model."""

    def __init__(
        self, folder: Path, run: Mapping[str, str], model: nn.Module, transaction: Transaction
    ):
        self._folder, self._run, self._model = folder, run, model
        self._transaction = transaction
        self._saved = 0  # changes of the transaction that need not be written any more

    def skip(self) -> None:
        """Leaves the changes so far out of the next file: a resumed run makes them again."""
        self._saved = len(self._transaction.changes)

    def save(self, number: int) -> None:
        """Writes the changes since the last file."""
        names = {module: name for name, module in self._model.named_modules()}
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        settings: dict[str, dict[str, Any]] = {}
        for owner, key in self._transaction.changes[self._saved :]:
            if owner not in names:  # a slice of a module's tensor: see `grail.networks.experts`
                continue
            name, value = f"{names[owner]}.{key}", getattr(owner, key)
            if isinstance(value, Tensor):
                tensors[name] = value
            elif hasattr(value, "__dict__"):  # a configuration of the module's own
                settings[name] = _difference(value, self._model.config)
            else:
                values[name] = value
        self.skip()
        content = {"run": self._run, "values": values, "settings": settings}
        state.write(self._path(number), BLOCK, content, tensors)

    def read(self, number: int) -> state.State:
        """Returns the content of a file.

        Raises:
            StateError: a file that is missing, damaged or of another run.
        """
        path = self._path(number)
        found = state.read(path, BLOCK)
        if found.content["run"] != self._run:
            raise StateError(f"{path} is of another run")
        return found

    def apply(self, number: int) -> None:
        """Makes the changes of a file in the model."""
        found, change = self.read(number), self._transaction
        for name, value in found.content["values"].items():
            change.set_attribute(*self._owner(name), value)
        for name, difference in found.content["settings"].items():
            own = copy.copy(self._model.config)
            vars(own).update(difference)
            change.set_attribute(*self._owner(name), own)
        for name, tensor in found.tensors.items():
            owner, key = self._owner(name)
            old = getattr(owner, key, None)
            if not isinstance(old, Tensor):  # which the layer had not before
                change.set_attribute(owner, key, tensor)
            else:
                is_parameter = isinstance(old, nn.Parameter)
                (change.set_parameter if is_parameter else change.set_buffer)(owner, key, tensor)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        owner, _, key = name.rpartition(".")
        return self._model.get_submodule(owner), key

    def _path(self, number: int) -> Path:
        return self._folder / f"{BLOCK}-{number:04}.state"


def _surroundings(model: nn.Module) -> dict[str, str]:
    """Returns what else bits may depend on than model, calibration and recipe."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    cpu = torch.backends.cpu.get_cpu_capability
    kind = torch.cuda.get_device_name(device) if on_gpu else cpu()
    return {
        "torch": torch.__version__,
        "the device": f"{device.type} {kind}",
        "the number of threads": str(torch.get_num_threads()),
    }


def _difference(config: Any, base: Any) -> dict[str, Any]:
    """Returns the entries of a configuration that another one has not, or has otherwise."""
    other = vars(base)
    return {k: v for k, v in vars(config).items() if k not in other or other[k] != v}


def _strided(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
