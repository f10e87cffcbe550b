"""The entry point of `grail` and of `python -m grail`."""

import os
import sys
from io import TextIOWrapper
from typing import NoReturn


def main() -> int:
    """Runs the command line; names the packages to install if some are missing."""
    # Read when those libraries are imported; their warnings are for programmers.
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal shows "?" for what it lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        import rich  # noqa: F401 - of the tables that commands print in the end

        from grail.commands import app
    except KeyboardInterrupt:
        print("\ngrail: interrupted; no output was written.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        message = f"The command line needs {error.name}: pip install 'grail-kernels[llm]'."
        print(message, file=sys.stderr)
        return 2
    try:
        app(prog_name="grail")
    except SystemExit as ended:  # as every command ends
        if "WORLD_SIZE" in os.environ and isinstance(ended.code, int | None):
            from grail.runtime.processes import launched_together

            if launched_together():
                _leave(ended.code or 0)
        raise
    return 0


def _leave(status: int) -> NoReturn:
    """Ends one of several processes at once, without taking the interpreter down step by step.

    All output is written before. A rare abort at that point, "terminate called without an active
    exception", most likely comes from a worker of torch.distributed that the interpreter stops at
    exit while it waits for the release of a tensor.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
