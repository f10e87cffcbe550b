"""The environment in which exported files are loaded by the runtimes that serve them.

    make serving                                 llama.cpp, ONNX Runtime, OpenVINO
    python -m bench.tools.serving --test         and the tests of everything that is exported
    python -m bench.tools.serving --test --output new/    and new/serving_families.csv
    python -m bench.tools.serving --list

It lies in .serving/env and imports what is not installed there from the environment that runs this.
llama.cpp is built from the source distribution of llama-cpp-python: the libraries, its Python
package, and the tools llama-quantize, llama-imatrix, llama-perplexity, llama-completion and
llama-bench. The build lies in a cache folder, $GRAIL_CACHE or ~/.cache/grail, under a name of the
version and the CPU, and is used again by every checkout.

A runtime that cannot be installed or built is reported in a box on stderr and skipped, exit code 0.
A failing test is exit code 1. The CSV has a row for each test that recorded properties: the largest
logit difference of a tiny random network's file in its runtime, as a share of the largest logit.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from bench.tools import environments
from bench.tools.commandline import CommandLine
from bench.tools.environments import (
    ROOT,
    NotInstalledError,
    distributions,
    exit_code,
    run_quietly,
    say,
)
from bench.tools.measuring import Row, machine, write_rows
from bench.tools.tables import aligned

HOME = ROOT / ".serving"
# Of the environment that runs this: a change of one of them installs anew.
SHARED = ("torch", "transformers", "gguf", "numpy", "pytest")
TESTS = (
    "tests/serving",
    "tests/commands/test_export.py",
    "tests/commands/test_export_onnx.py",
    "tests/bench/test_onnx.py",
)
TESTING = 900  # seconds of the tests
BUILDING = 3600  # seconds of the build
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-completion", "llama-bench")
_SETTINGS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"),
    # Libraries and tools find each other by their own folder, so that it can be moved.
    *("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
)


@dataclass(frozen=True)
class Runtime:
    """A runtime: its module in Python, and the packages that are installed for it."""

    module: str
    requirements: tuple[str, ...]
    source: str = ""  # package whose source distribution is built

    @property
    def packages(self) -> str:
        """All packages, to be read."""
        return ", ".join(filter(None, (self.source, *self.requirements)))


RUNTIMES = {
    "llama.cpp": Runtime("llama_cpp", ("diskcache==5.6.3",), "llama-cpp-python==0.3.36"),
    "ONNX Runtime": Runtime(
        "onnxruntime", ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0")
    ),
    "OpenVINO": Runtime("openvino", ("openvino==2026.4.1",)),
}


class Environment(environments.Environment):
    """The environment of all runtimes.

    Args:
        home: folder of the environment.
        cache: folder of builds.
        runtimes: see `RUNTIMES`.
    """

    def __init__(
        self,
        home: Path = HOME,
        cache: Path | None = None,
        runtimes: dict[str, Runtime] | None = None,
    ):
        super().__init__("serving", home / "env", distributions(SHARED))
        self.runtimes = RUNTIMES if runtimes is None else runtimes
        self._cache = cache_folder() if cache is None else cache

    def share(self) -> Path:
        """Returns the packages of the environment that runs this."""
        return Path(sysconfig.get_paths()["purelib"])

    def fill(self) -> None:
        """Installs nothing: runtimes come one by one, so that one may be missing."""

    def has(self, name: str) -> bool:
        """Returns whether a runtime is installed, with the present versions of the table."""
        done, runtime = self._done(name), self.runtimes[name]
        if not (self.ready and done.is_file() and done.read_text() == repr(runtime)):
            return False
        return not runtime.source or Build(runtime.source, self._cache).result.is_dir()

    def _done(self, name: str) -> Path:
        return self.folder / f"installed {name}"

    def add(self, name: str) -> None:
        """Installs a runtime where it is not.

        Raises:
            NotInstalledError: pip, or a build, failed or took too long.
            FailedError: it is installed and cannot be imported.
        """
        if not self.ready:
            self.install()
        if self.has(name):
            say(f"{name}: ready")
            return
        runtime = self.runtimes[name]
        started = time.monotonic()
        say(f"{name}: installing {runtime.packages} …")
        self._done(name).unlink(missing_ok=True)
        if runtime.requirements:
            self.pip(runtime.requirements)
        if runtime.source:
            self._use(Build(runtime.source, self._cache).ready(self))
        self.require(runtime.module)
        self._done(name).write_text(repr(runtime))
        say(f"{name}: installed in {time.monotonic() - started:.0f} s")

    def _use(self, built: Path) -> None:
        """Makes a build importable, and its tools programs of the environment."""
        (self.packages / "grail-llama.pth").write_text(f"{built}\n", encoding="utf-8")
        for tool in TOOLS:
            link = self.python.with_name(tool)
            link.unlink(missing_ok=True)
            link.symlink_to(built / "llama_cpp" / "lib" / tool)

    def test(self) -> Path:
        """Runs the tests of all that is exported, with the runtimes that are there.

        Returns:
            The JUnit file of their results.

        Raises:
            NotInstalledError: no runtime is there.
            FailedError: a test failed, or none ran.
        """
        if not any(map(self.has, self.runtimes)):
            raise NotInstalledError("no runtime is there")
        say(f"testing {', '.join(TESTS)} …")
        files = [ROOT / path for path in TESTS]
        return self.run_tests("tests of what is exported", files, TESTING)


def cache_folder() -> Path:
    """Returns the folder of builds: $GRAIL_CACHE, or grail in the user's folder of caches."""
    if named := os.environ.get("GRAIL_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grail"


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a name for what compilers ask of this machine: its instructions and C library."""
    lines = information.read_text().splitlines() if information.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    about = " ".join((platform.machine(), *platform.libc_ver(), *sorted(flags.split())))
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"


class Build:
    """llama.cpp and its Python package, built from a source distribution once.

    Args:
        source: requirement of the package.
        cache: folder of builds.
    """

    def __init__(self, source: str, cache: Path):
        self._source = source
        self._folder = cache / f"{source.replace('==', '-')}-{processor()}"
        self.result = self._folder / "result"

    def ready(self, environment: Environment) -> Path:
        """Returns the folder to import from, and builds what is missing.

        A build that was stopped is resumed. Another process waits until it is there.

        Raises:
            NotInstalledError: no source, compiler or CMake, or the build fails.
        """
        with _locked(self._folder):
            if not self.result.is_dir():
                if not shutil.which("c++"):
                    raise NotInstalledError(
                        "llama.cpp is compiled, and there is no C++ compiler (c++): install one, "
                        "such as the Debian package g++"
                    )
                self._build(environment, self._unpacked(environment))
                say(f"built in {self.result}")
        return self.result

    def _unpacked(self, environment: Environment) -> Path:
        """Returns the folder of the source, downloaded if it is not there."""
        source = self._folder / "source"
        if not source.is_dir():
            fresh = self._folder / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            package = self._source.partition("==")[0]
            pip = environment.pip_command("download")
            pip += ["--no-deps", "--no-binary", package, "--dest", str(fresh)]
            environments.ask_index(pip, [self._source], environments.LONGEST)
            (archive,) = fresh.glob("*.tar.gz")
            with tarfile.open(archive) as files:
                files.extractall(fresh, filter="data")
            (unpacked,) = (path for path in fresh.iterdir() if path.is_dir())
            unpacked.rename(source)
            shutil.rmtree(fresh)
        return source

    def _build(self, environment: Environment, source: Path) -> None:
        """Builds libraries and tools, and gives the result its name."""
        cmake, ninja = _programs(environment)
        build = self._folder / "build"
        tree = source / "vendor" / "llama.cpp"
        configure = [cmake, "-S", str(tree), "-B", str(build), "-G", "Ninja", *_SETTINGS]
        run_quietly([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}"], BUILDING)
        say(f"compiling llama.cpp in {build} (7 minutes on 2 cores, once) …")
        run_quietly([cmake, "--build", str(build), "--target", "llama", *TOOLS], BUILDING)
        partial = self._folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source / "llama_cpp", partial / "llama_cpp")
        shutil.copytree(
            build / "bin", partial / "llama_cpp" / "lib", symlinks=True, dirs_exist_ok=True
        )
        about = partial / f"{self._source.replace('-', '_').replace('==', '-')}.dist-info"
        about.mkdir()
        shutil.copy(source / "PKG-INFO", about / "METADATA")
        partial.rename(self.result)
        for rest in (source, build):
            shutil.rmtree(rest)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process works on a folder; the system ends the lock with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _programs(environment: Environment) -> tuple[str, str]:
    """Returns cmake and ninja, installed where they are not there."""
    found = [shutil.which(name) for name in ("cmake", "ninja")]
    if not all(found):
        environment.pip(["cmake", "ninja"])
        found = [str(environment.python.with_name(name)) for name in ("cmake", "ninja")]
    cmake, ninja = found
    return str(cmake), str(ninja)


def recorded(results: Path) -> list[Row]:
    """Returns what tests of a JUnit file recorded: a row for each test that did."""
    rows = []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        found = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
        if found:
            test, _, parameters = case.attrib["name"].partition("[")
            rows.append({"case": parameters.removesuffix("]") or test, **found})
    return rows


def run(
    environment: Environment, names: Sequence[str], *, test: bool, write: Path | None = None
) -> int:
    """Installs runtimes, tests with those that are there, and returns the exit code.

    Args:
        environment: of the runtimes.
        names: of the runtimes.
        test: run the tests.
        write: CSV of what the tests recorded.
    """

    def adding(name: str) -> Callable[[], None]:
        return lambda: environment.add(name)

    def testing() -> None:
        rows = recorded(environment.test())
        if write and rows:
            about = {name: machine("cpu")[name] for name in ("device", "torch", "commit", "date")}
            write_rows(write, [row | about for row in rows])
            say(f"{write}: {len(rows)} rows")

    code = exit_code({name: adding(name) for name in names}, "WHAT NEEDS IT IS SKIPPED")
    if test:
        code |= exit_code({"tests": testing}, "NOTHING IS TESTED")
    return code


def listed(environment: Environment) -> str:
    """Returns a table of the runtimes."""
    return aligned(
        ["runtime", "packages", "state"],
        [
            [
                name,
                runtime.packages,
                "installed" if environment.has(name) else "not installed",
            ]
            for name, runtime in environment.runtimes.items()
        ],
        words=3,
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = CommandLine(
        __doc__,
        results="serving_families",
        takes="a minute, and once 7 minutes on 2 cores to compile; tests 2 minutes",
        writes=".serving/env, the build in a cache folder; with --output the CSV",
    )
    parser.add_argument(
        "runtime", nargs="*", help=f"of {', '.join(map(repr, RUNTIMES))}; without, each of them"
    )
    parser.add_argument("--test", action="store_true", help="also run the tests")
    parser.add_argument("--list", action="store_true", help="print the runtimes, install nothing")
    options = parser.read(arguments)
    if unknown := [name for name in options.runtime if name not in RUNTIMES]:
        parser.error(f"{', '.join(unknown)}: no such runtime; choose of {', '.join(RUNTIMES)}")
    environment = Environment()
    if options.list:
        say(listed(environment))
        return 0
    names = options.runtime or list(RUNTIMES)
    return run(environment, names, test=options.test, write=options.output)


if __name__ == "__main__":
    sys.exit(main())
