"""The entry point of `grail` and `python -m grail`; the commands are in `grail.commands`."""

import os
import sys


def main() -> int:
    """Runs the command line, and says what to install where its packages are missing."""
    # Read when those libraries are imported; their warnings are for programmers.
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    try:
        from grail.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        message = f"The command line needs {error.name}: pip install 'grail-kernels[llm]'."
        print(message, file=sys.stderr)
        return 2
    app(prog_name="grail")
    return 0
