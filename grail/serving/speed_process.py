"""The process that measures one file: requests and answers are lines of JSON."""

import json
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from grail.errors import ModelError
from grail.serving.child_process import environment, program, reason
from grail.serving.speed_files import Measured

_PAGE = "docs/serving/speed.md"  # of errors


class Worker:
    """A process that loads one file, used as `with Worker(file, threads) as worker`.

    It sees no GPU, and the libraries in it use so many threads.
    """

    def __init__(self, file: Measured, threads: int):
        self._file, self._threads, self._doing = file, threads, "loads"

    def __enter__(self) -> "Worker":
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        limits = dict.fromkeys(names, str(self._threads))
        self._folder = tempfile.TemporaryDirectory()
        self._stderr = Path(self._folder.name, "stderr")
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                program("speed_worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", **limits),
                cwd=self._folder.name,
            )
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()  # it holds nothing that is not on the disk already
        self._process.communicate()
        self._folder.cleanup()

    def load(self, trust_remote_code: bool = False, **work: Any) -> dict[str, str]:
        """Loads the model; returns `runtime`, its name and version, and `form`.

        Args:
            trust_remote_code: see `measure_speed`.
            work: `prompt`, `new`, and `passes` over the images of a vision network.

        Raises:
            ModelError: see `measure`.
        """
        asked = {"kind": self._file.kind, "source": self._file.where, "threads": self._threads}
        return self._ask(asked | work | {"trust_remote_code": trust_remote_code})

    def measure(self, batch: int) -> dict[str, tuple[float, float]]:
        """Does the work of one round at one batch size; returns wall and CPU seconds by phase.

        Raises:
            ModelError: the file is refused, or the runtime failed, with its message.
        """
        self._doing = f"runs a batch of {batch} of"
        answer = self._ask({"batch": batch})
        return {phase: (wall, cpu) for phase, (wall, cpu) in answer.items()}

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with suppress(OSError):  # of a process that has ended
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise ModelError(
                f"{self._file.runtime} ended ({self._status()}) while it {self._doing} "
                f"{self._file.name}; it says: {self._said()}",
                page=_PAGE,
            )
        answer = json.loads(line)
        if "refused" in answer:
            raise ModelError(answer["refused"], page=_PAGE)
        if "failed" in answer:
            raise ModelError(
                f"{self._file.runtime} does not run {self._file.name}; it says: "
                f"{answer['failed'] or self._said()}",
                page=_PAGE,
            )
        return answer["result"]

    def _status(self) -> str:
        status = self._process.wait()
        with suppress(ValueError):
            return signal.Signals(-status).name
        return f"exit code {status}"

    def _said(self) -> str:
        return reason(self._stderr.read_bytes())
