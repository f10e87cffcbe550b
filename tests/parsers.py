"""Command lines of benches are read by their own parsers, and nothing is run."""

import argparse
import contextlib
import importlib
import io
import runpy
import shlex
import sys
from typing import Any

import pytest

from tests.blocks import ROOT


class _Read(BaseException):
    """A parser has read its arguments; the rest of the program is not run."""


def read_by_its_parser(words: list[str], place: str) -> None:
    """Runs `python FILE …` or `python -m MODULE …` until its arguments are read."""
    original = argparse.ArgumentParser.parse_args
    module = words[0] == "-m"
    name, *arguments = words[module:]

    def reads(self: Any, args: Any = None, namespace: Any = None) -> Any:
        original(self, args, namespace)
        raise _Read

    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", reads)
        try:
            if module:
                importlib.import_module(name).main()
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except (_Read, SystemExit) as ended:
            failed = isinstance(ended, SystemExit) and ended.code
        else:
            failed = True
    assert not failed, f"{place}: {shlex.join(words)} is not read: {said.getvalue()}"
