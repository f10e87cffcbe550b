"""Virtual environments beside the one of the project, in which libraries are tested for real.

An environment that cannot be installed is reported in a box on stderr and skipped, exit code 0. A
failing test is exit code 1, and so are tests of which every one is skipped.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Of pip: seconds without an answer, times that it asks again, and seconds of a whole installation.
# An index that is silent costs SILENCE · (1 + AGAIN) seconds.
SILENCE, AGAIN, LONGEST = 15, 2, 900
TESTING = 600  # seconds of the tests of one library
_NO_TESTS = 5  # exit code of pytest where all is skipped while it collects, too


class NotInstalledError(Exception):
    """An environment that cannot be installed; the message has the reason."""


class FailedError(Exception):
    """Tests that failed, or that did not run in an environment that is there."""


class Environment:
    """A virtual environment that imports some packages from outside it, and the checkout.

    Args:
        name: in messages.
        folder: of the environment.
        shared: distributions that are not installed but imported from where they are.
    """

    longest: float | None = None  # seconds of an installation by pip; None is LONGEST

    def __init__(self, name: str, folder: Path, shared: Mapping[str, Distribution]):
        self.name, self.folder, self._shared = name, folder, shared

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """The folder of what is installed."""
        (packages,) = self.folder.glob("lib/python*/site-packages")
        return packages

    @property
    def ready(self) -> bool:
        """Whether it is installed, with the present versions of what is wanted and shared."""
        done = self.folder / "installed"
        return done.is_file() and done.read_text(encoding="utf-8") == self._state

    @property
    def requirements(self) -> Sequence[str]:
        """The packages that pip installs."""
        return ()

    @property
    def _state(self) -> str:
        versions = (f"{name} {found.version}" for name, found in sorted(self._shared.items()))
        return "\n".join((sys.version, str(ROOT), *self.requirements, *versions))

    def install(self) -> None:
        """Installs it anew where it is not `ready`.

        Raises:
            NotInstalledError: pip failed or took too long; nothing is left of the environment.
        """
        if self.ready:
            say(f"{self.name}: ready in {self.folder}")
            return
        say(f"{self.name}: installing {', '.join(self.requirements) or 'an environment'} …")
        started = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            run_quietly([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], LONGEST)
            self.import_also(self.share())
            self.fill()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        (self.folder / "installed").write_text(self._state, encoding="utf-8")
        say(f"{self.name}: installed in {time.monotonic() - started:.0f} s, {self.folder}")

    def share(self) -> Path:
        """Returns a folder that has what is shared, and nothing else."""
        raise NotImplementedError

    def fill(self) -> None:
        """Installs what the environment is for."""
        self.pip(self.requirements)

    def import_also(self, folder: Path) -> None:
        """Makes a folder and the checkout importable."""
        lines = f"{folder.resolve()}\n{ROOT}\n"
        (self.packages / "grail-shared.pth").write_text(lines, encoding="utf-8")

    def pip(self, requirements: Sequence[str]) -> None:
        """Installs packages beside what is shared, of which torch stays."""
        kept = self.folder / "shared.txt"
        torch = self._shared.get("torch")
        kept.write_text(f"torch=={torch.version}\n" if torch else "", encoding="utf-8")
        command = [*self.pip_command("install"), "--constraint", str(kept)]
        ask_index(command, requirements, self.longest or LONGEST)

    def pip_command(self, verb: str) -> list[str]:
        """Returns the start of a command of pip that asks an index, and gives up in time."""
        pip = [str(self.python), "-m", "pip", verb, "--quiet"]
        pip += ["--disable-pip-version-check", "--no-input"]
        return [*pip, "--timeout", str(SILENCE), "--retries", str(AGAIN)]

    def require(self, module: str) -> None:
        """Raises FailedError if a module cannot be imported in the environment."""
        done = self.run_python("-c", f"import {module}", stderr=subprocess.PIPE)
        if done.returncode:
            raise FailedError(f"import {module} fails in {self.folder}: {last(done.stderr)}")

    def run_tests(self, what: str, files: Sequence[Path], longest: float = TESTING) -> Path:
        """Runs files of tests, and returns the JUnit file of their results.

        Args:
            what: the name of the tests in messages.
            files: or folders.
            longest: seconds.

        Raises:
            FailedError: a test failed, none ran, or they took too long.
        """
        counts = self.folder / "tests.xml"
        counts.unlink(missing_ok=True)
        pytest = ("-m", "pytest", "-q", "-n", "0", f"--junitxml={counts}", *map(str, files))
        try:
            done = self.run_python(*pytest, timeout=longest)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{what} took longer than {longest:.0f} s") from error
        if done.returncode not in (0, _NO_TESTS):
            raise FailedError(f"{what}: pytest ended with {done.returncode}")
        ran, skipped = ran_and_skipped(counts)
        if not ran:
            raise FailedError(f"{what}: no test ran, {skipped} skipped")
        say(f"{self.name}: {ran} passed, {skipped} skipped")
        return counts

    def run_python(
        self, *arguments: str, timeout: float | None = None, stderr: int | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Runs the interpreter in the checkout."""
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=ROOT,
            env=clean_environment(),
            timeout=timeout,
            stderr=stderr,
            text=True,
            check=False,
        )


def distributions(names: Sequence[str]) -> dict[str, Distribution]:
    """Returns distributions of the running environment by name, without those that are not there.

    Names are compared as package indexes do: torch is not torch-pruning, a_b is a-b.
    """
    found = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except PackageNotFoundError:
            continue
        found[canonicalize_name(distribution.metadata["Name"])] = distribution
    return found


def needed(names: Sequence[str]) -> dict[str, Distribution]:
    """Returns distributions with all that they need here, by their metadata."""
    found: dict[str, Distribution] = {}
    waiting = distributions(names)
    while waiting:
        name, distribution = waiting.popitem()
        found[name] = distribution
        requirements = map(Requirement, distribution.requires or ())
        here = [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
        more = distributions(here).items()
        waiting |= {name: other for name, other in more if name not in found}
    return found


def top_level(distribution: Distribution) -> set[Path]:
    """Returns the files and folders of a distribution in its site-packages."""
    if distribution.files is None:
        raise NotInstalledError(
            f"{distribution.metadata['Name']} lists no files, so it cannot be shared; "
            "install it as a wheel"
        )
    first = {Path(str(file)).parts[0] for file in distribution.files}
    names = first - {"..", "__pycache__"}
    return {Path(str(distribution.locate_file(name))).resolve() for name in names}


def ran_and_skipped(counts: Path) -> tuple[int, int]:
    """Returns the numbers of tests that ran and that were skipped, of a JUnit file."""
    suites = list(ElementTree.parse(counts).getroot().iter("testsuite"))
    tests, skipped = (sum(int(s.attrib[name]) for s in suites) for name in ("tests", "skipped"))
    return tests - skipped, skipped


def clean_environment() -> dict[str, str]:
    """Returns the variables of a process that should see its own packages alone."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"PYTHONNOUSERSITE": "1"}


def run_quietly(command: Sequence[str], timeout: float, **settings: Any) -> None:
    """Runs a command, and raises NotInstalledError with its reason if it fails or is too slow."""
    try:
        done = subprocess.run(
            command,
            env=clean_environment(),
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            **settings,
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"it took longer than {timeout:.0f} s") from error
    except OSError as error:
        raise NotInstalledError(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise NotInstalledError(last(done.stderr))


def ask_index(command: Sequence[str], wanted: Sequence[str], timeout: float) -> None:
    """Runs a command of pip for packages; its error says what to do without an index."""
    try:
        run_quietly([*command, *wanted], timeout)
    except NotInstalledError as error:
        raise NotInstalledError(
            f"{error}; where pip reaches no index, put {', '.join(wanted)} and what they need into "
            "a folder, and set PIP_FIND_LINKS to it"
        ) from error


def last(text: str) -> str:
    """Returns the errors that pip printed, or else the last line of a text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return " ".join(errors or lines[-1:]) or "nothing was said"


def say(text: str) -> None:
    """Prints a step before the next one starts."""
    print(text, flush=True)


def box(text: str) -> str:
    """Returns a text in a box."""
    lines = textwrap.wrap(text, 92)
    rows = [f"║ {line:<92} ║" for line in lines]
    return "\n".join(["╔" + "═" * 94 + "╗", *rows, "╚" + "═" * 94 + "╝"])


def exit_code(steps: Mapping[str, Callable[[], None]], lost: str) -> int:
    """Runs steps by name, reports those that were not installed or failed; returns the exit code.

    Args:
        steps: by the name of what each installs or tests.
        lost: what is skipped where something is not installed, in capitals.
    """
    absent, failed = [], []
    for name, step in steps.items():
        try:
            step()
        except NotInstalledError as error:
            absent.append(name)
            text = f"{name} IS NOT INSTALLED, {lost}: {error}"
            print(box(text), file=sys.stderr, flush=True)
        except FailedError as error:
            failed.append(name)
            print(box(f"{name} FAILED: {error}"), file=sys.stderr, flush=True)
    for what, names in (("not installed", absent), ("failed", failed)):
        if names:
            say(f"{what}: {', '.join(names)}")
    return 1 if failed else 0
