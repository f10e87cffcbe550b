"""The entry point of `grail` and `python -m grail`; the commands are in `grail.commands`."""

import sys


def main() -> int:
    """Runs the command line, and says what to install where its packages are missing."""
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
