"""The app of the command line: how errors become sentences and exit codes.

Commands read options, call the library and print. Nothing is computed here. Every `GrailError` and
every wrong option ends as one sentence on stderr and exit code 2, an error with the page that helps
in a line of its own; any other exception as one sentence and exit code 1, Ctrl-C as exit code 130.
Progress and predictions go to stderr, results to stdout.

A command is imported when it runs, and torch with it: `grail --help` and `grail --version` do not
wait for that.
"""

import errno
import importlib
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from grail.version import __version__

# Where a context notes that the traceback of an error is wanted.
DEBUG = "grail.debug"

# By name, the first sentence of each command, which its module repeats.
COMMANDS = {
    "bench": "Measures how fast models run: prefill and decode, in the runtimes that serve them.",
    "compress": "Compresses MODEL and writes a plain folder that transformers loads.",
    "evaluate": "Measures perplexity and size of MODEL, and its distance from the dense model.",
    "export": "Writes a compressed model as a GGUF or ONNX file that stock runtimes load.",
    "generate": "Writes calibration text that MODEL draws itself.",
    "inspect": "Shows the sites of MODEL, what each keep ratio saves, and what a run would cost.",
    "stats": ("Collects statistics of a dense model, and adds those of several texts or machines."),
}

# The option class's error; typer does not export it.
_UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """Imports the command that runs; turns an exception into one sentence and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Returns the name of a command, the command, and its arguments."""
        if args[0] in COMMANDS:
            module = importlib.import_module(f"grail.commands.{args[0]}")
            self.commands[args[0]] = typer.main.get_command(module.app)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            typer.echo("\ngrail: interrupted; no output was written.", err=True)
            raise typer.Exit(130) from error
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError" or is_closed_pipe(error):
                raise
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            sentence, status, page = _explain(error)
            if page:  # before the error, which scripts look for in the last line
                typer.echo(f"help: {address(page)}", err=True)
            typer.echo(f"grail: {sentence}", err=True)
            raise typer.Exit(status) from error


def is_closed_pipe(error: Exception) -> bool:
    """Returns True for an error of writing to a pipe that nobody reads."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def address(page: str) -> str:
    """Returns where a page of the documentation is read: on its site, if the package names one."""
    try:
        urls = metadata("grail-kernels").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    sites = dict(url.split(", ", 1) for url in urls)
    if "Documentation" not in sites:
        return page
    path, _, section = page.removeprefix("docs/").partition("#")
    path = f"{path.removesuffix('.md')}.html" + (f"#{section}" if section else "")
    return f"{sites['Documentation'].rstrip('/')}/{path}"


def _explain(error: Exception) -> tuple[str, int, str]:
    """Returns an exception's sentence, exit code and page; 2 is for what the user can act on."""
    if isinstance(error, _UsageError):
        _, *command = error.ctx.command_path.split() if error.ctx else [""]
        said = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        return f"{said[:1].lower()}{said[1:]}; see {' '.join(['grail', *command])} --help", 2, ""
    from grail.errors import GrailError, OutOfMemoryError, one_line
    from grail.runtime.memory import ran_out

    if isinstance(error, GrailError):
        return str(error), 2, error.page
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}", 2, ""
    if ran_out(error):
        advice = "lower --batch-size or --sequence-length, or choose --device cpu"
        return f"out of memory; no output was written: {advice}.", 2, OutOfMemoryError.page
    return (
        (
            f"unexpected {type(error).__name__}: {one_line(error)}; --debug shows the traceback; "
            "please report it"
        ),
        1,
        "",
    )


def commands(**options: Any) -> typer.Typer:
    """Returns an empty set of commands."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        **options,
    )


app = commands(cls=Commands, no_args_is_help=True)
for _name, _sentence in COMMANDS.items():  # what the help lists; the rest is imported to run
    app.command(_name, help=_sentence)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grail {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Removes channels and attention heads from a model and recovers most of the lost accuracy.

    Uses a closed-form least-squares fit: no gradients, no labels, no fine-tuning, a few forward
    passes over plain text.

    Example: `grail compress MODEL --keep 0.75 --calibration text.txt --output out/`
    """
