"""Measures the speed of models in the runtimes that serve them, side by side.

Each file has a worker, a process that loads its model once. The workers take turns: in a round each
does the same work for each batch size, one at a time. A machine that becomes slower then slows all
of them alike, and a ratio is the median of the ratios within the rounds.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from tqdm import tqdm

from grail.arguments import require_switches, require_whole
from grail.errors import InputError
from grail.serving.speed_files import Measured, recognise, require_memory, require_one_kind
from grail.serving.speed_process import Worker
from grail_kernels import check_kind

_PASSES = 10  # over the images of a batch in a round
_BUSY = 1.15  # wall by CPU seconds of one thread, from where other programs took part of the core
Times = dict[str, tuple[float, float]]  # wall and CPU seconds by phase


@dataclass(frozen=True)
class SpeedRow:
    """Speed of a file in one phase, at one batch size."""

    file: str
    runtime: str  # name and version
    form: str  # dtype or quantisation of the weights
    bytes: int  # of the weights on the disk
    batch: int  # sequences, or images
    phase: str  # prefill or decode; forward of a vision network
    prompt: int  # tokens of a sequence before the first new one
    new: int  # tokens that are added to each sequence, one by one
    threads: int
    count: int  # tokens, or images, of a round
    wall: tuple[float, ...]  # seconds by round
    cpu: tuple[float, ...]  # CPU seconds by round, of all threads
    against: str  # the file whose ratios are 1
    wall_ratio: float  # how many times as fast as that: the median over rounds
    cpu_ratio: float  # the same by CPU time

    @property
    def per_second(self) -> float:
        """Tokens, or images, per second: the median over rounds."""
        return self.count / statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Half the range of the wall times, as a share of their median."""
        return (max(self.wall) - min(self.wall)) / 2 / statistics.median(self.wall)

    @property
    def ratio(self) -> float:
        """The ratio that repeats best: by CPU time on one thread, else by wall time."""
        return self.cpu_ratio if self.threads == 1 else self.wall_ratio

    def facts(self) -> dict[str, Any]:
        """Returns the fields and the figures made from them, for JSON and CSV."""
        made = {name: getattr(self, name) for name in ("per_second", "spread", "ratio")}
        return asdict(self) | made


@dataclass(frozen=True)
class _Work:
    """The work of each worker in a round."""

    prompt: int
    new: int
    batches: tuple[int, ...]
    rounds: int
    threads: int


def measure_speed(
    files: Sequence[str | Path],
    against: str | Path | None = None,
    *,
    prompt: int = 256,
    new: int = 64,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    threads: int = 1,
    one_by_one: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> list[SpeedRow]:
    """Measures prefill and decode of language models on the CPU, or forwards of vision networks.

    A folder or a hub name runs in transformers, a GGUF file in llama.cpp, an ONNX file of a vision
    network in ONNX Runtime. Prefill reads `prompt` random tokens of each sequence and computes the
    logits of the last one. Decode then adds `new` tokens to each sequence, one at a time. The
    tokens are given, not sampled.

    All models are loaded and have done one round to warm up before the first is measured. A failure
    ends the measurement and all workers.

    Args:
        files: folders, hub names, GGUF files, ONNX files.
        against: the file whose ratios are 1; it is measured with the others. None is the first.
        prompt, new: tokens of each sequence.
        batches: numbers of sequences, or of images.
        rounds: how often each file is measured.
        threads: of each runtime.
        one_by_one: holds one model in memory at a time and measures it to the end before the next
            is loaded, for models that do not fit together. Ratios then drift with the machine.
        trust_remote_code: runs Python code that comes with the model of a folder.
        progress: shows progress.

    Returns:
        Rows by file, batch size and phase, in this order.

    Raises:
        InputError: a file is missing or of no known kind, a number is out of range, or language
            models and vision networks are given together.
        ModelError: a runtime is not installed, or fails, with its own message.
        OutOfMemoryError: the models need more memory than is free.
    """
    for name, value in (("prompt", prompt), ("new", new), ("rounds", rounds), ("threads", threads)):
        require_whole(name, value, 1)
    require_switches(one_by_one=one_by_one, trust_remote_code=trust_remote_code, progress=progress)
    work = _Work(prompt, new, _as_batches(batches), rounds, threads)
    measured, first = _as_files(files, against)
    require_one_kind(measured)
    require_memory(measured, one_by_one)
    turns = [[file] for file in measured] if one_by_one else [measured]
    steps = len(measured) * (1 + len(work.batches) * (rounds + 1))
    found: list[_Result] = []
    with tqdm(total=steps, disable=not progress) as bar:
        for together in turns:
            found += _measure(together, work, trust_remote_code, bar)
    return list(_rows(found, found[first], work))


def _as_batches(batches: Sequence[int]) -> tuple[int, ...]:
    """Returns batch sizes; raises InputError unless each is a whole number ≥ 1, and new."""
    check_kind("batches", batches, (list, tuple), "a list of batch sizes, such as [1, 8]")
    for batch in batches:
        require_whole("batches", batch, 1)
    if not batches or len(set(batches)) < len(batches):
        raise InputError(
            f"batches must be one or more different sizes, such as [1, 8]; got {list(batches)!r}"
        )
    return tuple(int(batch) for batch in batches)


def _as_files(
    files: Sequence[str | Path], against: str | Path | None
) -> tuple[list[Measured], int]:
    """Returns the files to measure, and the place of the one that others are compared with."""
    check_kind("files", files, (list, tuple), "a list of files and folders")
    check_kind("against", against, (str, Path, NoneType), "a path")
    for file in files:
        check_kind("files", file, (str, Path), "a list of files and folders")
    names = [str(file) for file in files]
    if against is not None and str(against) not in names:
        names.insert(0, str(against))
    if not names:
        raise InputError("files must name at least one folder, GGUF file or ONNX file; got none")
    first = 0 if against is None else names.index(str(against))
    return [recognise(name) for name in names], first


@dataclass(frozen=True)
class _Result:
    """A worker's description of its file, and its times by batch size and round."""

    file: Measured
    about: dict[str, str]
    times: dict[int, list[Times]]


def _measure(
    files: Sequence[Measured], work: _Work, trusted: bool, bar: "tqdm[Any]"
) -> list[_Result]:
    """Runs one worker a file, and all of them in each round."""
    with ExitStack() as running:
        workers: list[Worker] = []
        found: list[_Result] = []
        for file in files:
            bar.set_description(f"loading {file.label}")
            worker = running.enter_context(Worker(file, work.threads))
            about = worker.load(trusted, prompt=work.prompt, new=work.new, passes=_PASSES)
            workers.append(worker)
            found.append(_Result(file, about, {batch: [] for batch in work.batches}))
            bar.update()
        for turn in range(work.rounds + 1):  # the first warms up
            for batch in work.batches:
                for worker, result in _in_turn(turn, workers, found):
                    bar.set_description(f"{_name(turn, work)}, batch {batch}, {result.file.label}")
                    times = worker.measure(batch)
                    if turn:
                        result.times[batch].append(times)
                    bar.update()
    return found


def _in_turn(
    turn: int, workers: Sequence[Worker], found: Sequence[_Result]
) -> Sequence[tuple[Worker, _Result]]:
    """Returns the workers in order, every other round from last to first: drift cancels."""
    order = list(zip(workers, found, strict=True))
    return order[::-1] if turn % 2 else order


def _name(turn: int, work: _Work) -> str:
    return f"round {turn}/{work.rounds}" if turn else "warming up"


def _rows(found: Sequence[_Result], first: _Result, work: _Work) -> Iterator[SpeedRow]:
    for result in found:
        for batch, times in result.times.items():
            for phase in times[0]:
                wall, cpu = zip(*(each[phase] for each in times), strict=True)
                wall_1, cpu_1 = zip(*(each[phase] for each in first.times[batch]), strict=True)
                tokens = {"prefill": work.prompt, "decode": work.new}
                yield SpeedRow(
                    file=result.file.name,
                    **result.about,
                    bytes=result.file.bytes,
                    batch=batch,
                    phase=phase,
                    prompt=work.prompt,
                    new=work.new,
                    threads=work.threads,
                    count=batch * tokens.get(phase, _PASSES),
                    wall=wall,
                    cpu=cpu,
                    against=first.file.name,
                    wall_ratio=_ratio(wall_1, wall),
                    cpu_ratio=_ratio(cpu_1, cpu),
                )


def _ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def remarks(rows: Sequence[SpeedRow]) -> list[str]:
    """Returns what a reader of the ratios should know, in sentences without full stop."""
    said = []
    runtimes = sorted({row.runtime for row in rows})
    if len(runtimes) > 1:
        said.append(
            f"the runtimes differ ({', '.join(runtimes)}): a ratio across them compares runtimes "
            "as well as models"
        )
    on_one = [sum(row.wall) / sum(row.cpu) for row in rows if row.threads == 1]
    if on_one and (slowest := max(on_one)) > _BUSY:
        said.append(
            f"other programs were running (wall time up to {slowest:.2f} times the CPU time): "
            "the speeds are too low, and ratios are by CPU time"
        )
    return said
