"""Kills a compression with SIGKILL, starts it again, and compares the bits of its output.

    python -m bench.reliability.killing --trials 100 --output new/
    python -m bench.reliability.killing --uneven --trials 30 --output new/

Every run is the real command line, in a process that is forked from this one, so that torch and
transformers are imported once.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.tools import tiny
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row
from grail.commands import app as grail

LAYERS = 4
STEPS = {Path: ("open", "replace", "unlink"), os: ("fsync",)}  # the parts of a save


def main() -> int:
    """Prints and writes a row a trial; returns how many did not end with the same bits."""
    parser = CommandLine(
        __doc__,
        "trials",
        takes="tens of minutes on 2 cores for 100 trials",
        results="killing",
        instead={"uneven": "killing_uneven"},
        trials={"default": 100},
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uneven", action="store_true", help="runs that measure widths first")
    options = parser.read()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), random.Random(options.seed), options.uneven)
        rows = [trials.row(number) for number in range(options.trials)]
    measures = ("killed", "deaths", "resumed at block", "bitwise equal")
    save(options, [row | {"seed": str(options.seed)} for row in rows], measures)
    good = sum(row["bitwise equal"] == "yes" for row in rows)
    deaths = sum(int(row["deaths"]) for row in rows)
    resumed = sum(int(row["resumed at block"]) > 0 for row in rows)
    print(f"{good} of {len(rows)} bitwise equal; {deaths} deaths, {resumed} runs that resumed")
    return len(rows) - good


class Trials:
    """Trials on one tiny model and text in a folder, against one undisturbed run."""

    def __init__(self, folder: Path, draw: random.Random, uneven: bool):
        self.folder, self._draw, self._uneven = folder, draw, uneven
        _write_model(folder / "model")
        words = (f"w{draw.randrange(3, 97)}" for _ in range(2000))
        (folder / "text.txt").write_text(" ".join(words))
        self._finish("first", self._start("first"))
        self.expected = self._result("first")
        before = time.perf_counter()
        self._finish("second", self._start("second"))
        self._seconds = time.perf_counter() - before
        self._steps = self._count_steps()

    def row(self, number: int) -> Row:
        """Kills a run once or more, lets it end, and returns the outcome."""
        name, inside = f"trial-{number}", number % 2 == 1
        deaths = [self._kill(name, inside) for _ in range(self._draw.randint(1, 3))]
        state = self.folder / f"{name}.resume"
        positions = sorted(path.stem for path in state.glob("position-*.state"))
        self._finish(name, self._start(name))
        equal = self._result(name) == self.expected and not state.exists()
        shutil.rmtree(self.folder / name)
        return {
            "trial": str(number),
            "killed": "at a step of saving" if inside else "at a random moment",
            "deaths": str(sum(deaths)),
            "resumed at block": positions[-1].rpartition("-")[2] if positions else "0",
            "bitwise equal": "yes" if equal else "no",
        }

    def _kill(self, name: str, inside: bool) -> bool:
        """Starts a run and kills it; returns False if it ended before."""
        if inside:
            process = self._start(name, _dying_at(self._draw.randrange(self._steps)))
        else:
            process = self._start(name)
            time.sleep(self._draw.uniform(0, self._seconds))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        # All was done, or death came after the last step, when the state was deleted.
        output, state = self.folder / name, self.folder / f"{name}.resume/command.state"
        ended = not os.WIFSIGNALED(status) or (output.exists() and not state.exists())
        if ended:
            shutil.rmtree(output)  # a command refuses a folder in use
        return not ended

    def _start(self, name: str, prepare: Callable[[], None] | None = None) -> int:
        """The process of a run that writes into the folder of that name."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            if prepare is not None:
                prepare()
            grail(list(map(str, self._command(name))))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            os._exit(code)

    def _command(self, name: str) -> list[object]:
        return [
            *("compress", self.folder / "model", "--calibration", self.folder / "text.txt"),
            *("--output", self.folder / name, "--resume-dir", self.folder / f"{name}.resume"),
            *("--keep", 0.5, "--tokens", 512, "--sequence-length", 32),
            *(("--sites", "mlp", "--uneven") if self._uneven else ("--sites", "mlp,heads")),
        ]

    def _finish(self, name: str, process: int) -> None:
        _, status = os.waitpid(process, 0)
        if status:
            raise SystemExit((self.folder / f"{name}.log").read_text())

    def _result(self, name: str) -> tuple[bytes, ...]:
        """Weights, configuration and rows of the report."""
        folder = self.folder / name
        rows = json.loads((folder / "report.json").read_text())["sites"]
        files = (folder / "model.safetensors", folder / "config.json")
        return *(path.read_bytes() for path in files), json.dumps(rows).encode()

    def _count_steps(self) -> int:
        """Steps of saving in an undisturbed run."""
        counter = self.folder / "steps"
        counter.touch()
        count = partial(_before_each_step, lambda _: _grow(counter))
        self._finish("third", self._start("third", count))
        return counter.stat().st_size


def _dying_at(step: int) -> Callable[[], None]:
    def die(number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _before_each_step(die)


def _grow(counter: Path) -> None:
    handle = os.open(counter, os.O_WRONLY | os.O_APPEND)
    os.write(handle, b"x")
    os.close(handle)


def _before_each_step(callback: Callable[[int], None]) -> None:
    """Calls `callback` with the number of each step of saving in this process, before the step."""
    count = 0

    def counted(step: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            callback(count)
            count += 1
            return step(*args, **kwargs)

        return call

    for owner, names in STEPS.items():
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def _write_model(folder: Path) -> None:
    """A tiny Llama and a tokenizer of words, as the tests have them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "max_position_embeddings")
    sizes = {name: tiny.SIZES[name] for name in names} | {"num_hidden_layers": LAYERS}
    config = AutoConfig.for_model("llama", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
