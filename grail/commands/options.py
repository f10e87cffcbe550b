"""Options of the command line, made from the fields of settings.

A command names dataclasses of settings and gets their options, each with the field's own help text
and default. An option that was not given has the value None: the recipe's value, or the field's
default, then applies.
"""

import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
import typer

from grail.algebra._fit import Auto
from grail.commands.root import DEBUG
from grail.errors import InputError
from grail.files.mixture import Mixture, named_texts
from grail.files.pretrained import Pretrained
from grail.files.text import Text
from grail.recipe import PRESETS
from grail.runtime.settings import Runtime, setting, shown_default

Made = TypeVar("Made")
Field = dataclasses.Field[Any]
Option = tuple[Field, Any]  # and its type

_NONE = inspect.Parameter.empty

_MOST = 10**30  # tokens; a text that has fewer gives all
_MULTIPLIERS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def number_or_auto(text: str) -> float | Auto:
    """Parses a number, or auto."""
    try:
        return "auto" if text.lower() == "auto" else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto") from error


def number(text: object) -> float:
    """Parses a number."""
    try:
        return float(str(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def number_or_name(text: object) -> int | str:
    """Parses a whole number; anything else may be a name."""
    word = str(text).strip()
    return int(word) if re.fullmatch(r"-?\d{1,25}", word, re.ASCII) else word


def count(text: object) -> int:
    """Parses a number of tokens: 65536, 65_536, 64k or 1M, where k is 1024 and M 1024²."""
    found = re.fullmatch(r"0*(\d[\d_]{0,45}) *([km]?)", str(text).strip().lower())
    number = int(found[1].replace("_", "")) * _MULTIPLIERS[found[2]] if found else 0
    if not 1 <= number <= _MOST:
        shown = repr(text) if len(str(text)) <= 40 else f"a text of {len(str(text))} characters"
        raise typer.BadParameter(
            f"{shown} is no number of tokens; give one of at least 1 and at most 10³⁰, such as "
            "65536, 64k or 1M"
        )
    return number


def shares(text: object) -> list[float]:
    """Parses shares: 0.5,0.7 or 50%."""
    try:
        return [
            float(part.rstrip("% ")) / (100 if part.endswith("%") else 1)
            for part in str(text).split(",")
        ]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no share; give a number in (0, 1], such as 0.7 or 70%"
        ) from error


def share(text: object) -> float:
    """Parses one share."""
    found = shares(text)
    if len(found) > 1:
        raise typer.BadParameter(
            f"{text!r} are {len(found)} shares, and a run has one, such as 0.7; run once for "
            "each, or compare them by grail inspect --keep"
        )
    return found[0]


def sizes(text: object) -> list[int]:
    """Parses whole numbers: 8 or 1,8."""
    parts = str(text).split(",")
    if not all(re.fullmatch(r" *0*[1-9]\d{0,8} *", part, re.ASCII) for part in parts):
        raise typer.BadParameter(
            f"{str(text)[:40]!r} is no list of sizes; give whole numbers of at least 1, such as 1,8"
        )
    return [int(part) for part in parts]


# By the metavar of a field, where its value is no plain word or number.
_PARSERS: dict[str | None, Callable[..., Any]] = {
    "COUNT": count,
    "SHARE": share,
    "SHARES": shares,
    "FLOAT": number,
    "FLOAT|auto": number_or_auto,
    "COUNT|TARGET": number_or_name,
    "SIZES": sizes,
}


@dataclass(frozen=True)
class RecipeFile:
    """The source of settings that no option gives."""

    recipe: str | None = setting(
        None,
        f"A preset ({', '.join(PRESETS)}) or a recipe file, JSON or YAML, such as the "
        "recipe.json of an output. Options override its settings.",
        shown="default",
        metavar="NAME|FILE",
    )


@dataclass(frozen=True)
class Printed:
    """The form of what a command prints."""

    as_json: bool = setting(False, "Print JSON instead of a table.", flag="--json", panel="Running")


@dataclass(frozen=True)
class Given:
    """The arguments and options of a command."""

    context: typer.Context

    def of(self, *kinds: type) -> dict[str, Any]:
        """Returns the values that were given for the fields of dataclasses of settings."""
        names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        values = self.context.params.items()
        return {name: value for name, value in values if name in names and value is not None}

    def make(self, kind: type[Made]) -> Made:
        """Returns an instance with the values that were given."""
        return kind(**self.of(kind))

    @property
    def recipe(self) -> str:
        """The recipe that options override."""
        recipe = self.context.params["recipe"]
        return "default" if recipe is None else str(recipe)

    @property
    def prints_json(self) -> bool:
        """Whether a result is printed as JSON."""
        return bool(self.context.params["as_json"])

    def of_text(self) -> dict[str, Any]:
        """Returns how a text is read."""
        return {name: v for name, v in self.of(Text).items() if name not in ("source", "seed")}

    def calibration(self, sources: Sequence[str], **how: Any) -> Text | Mixture:
        """Returns the calibration text, or the mixture of several."""
        shares = self.of(Mixture).get("shares")
        return named_texts(sources, shares, **self.of_text(), option="--calibration", **how)

    def runtime(self, model: Pretrained) -> Runtime:
        """Returns the runtime; blocks are brought to the device of the model."""
        settings = self.of(Runtime)
        if settings.pop("onload", False):
            settings["onload"] = model.computing
        return Runtime(**settings)

    def options(self, *names: str) -> list[str]:
        """Returns the options of those names that were given, "--keep" for "keep"."""
        return [
            parameter.opts[0]
            for parameter in self.context.command.params
            if parameter.name in names and self._has(parameter.name)
        ]

    def require_used(self, used_by: Mapping[str, Sequence[str]]) -> None:
        """Raises InputError for an option that does nothing, because none that uses it was given.

        Args:
            used_by: by name of an option, the names of those that make use of it.
        """
        for name, users in used_by.items():
            if (idle := self.options(name)) and not self.options(*users):
                flags = {p.name: p.opts[0] for p in self.context.command.params}
                with_ = " or ".join(flags[user] for user in users)
                raise InputError(
                    f"{idle[0]} is used with {with_}: give that as well, or leave it out"
                )

    def command_line(self) -> str:
        """Returns the command with the options that were given, as a shell runs it again."""
        words = ["grail", self.context.command.name or ""]
        for parameter in self.context.command.params:
            name = parameter.name or ""
            if not self._has(name):
                continue
            value = self.context.params[name]
            if parameter.param_type_name == "argument":
                words.append(str(value))
            elif isinstance(value, bool):
                words.append((parameter.opts if value else parameter.secondary_opts)[0])
            else:
                for each in value if getattr(parameter, "multiple", False) else [value]:
                    parts = each if isinstance(each, list | tuple) else [each]
                    words += [parameter.opts[0], ",".join(map(str, parts))]
        return shlex.join(words)

    def _has(self, name: str) -> bool:
        source = self.context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"


def fields(kind: type, *names: str) -> list[Option]:
    """Returns fields of a dataclass of settings with their types; without names all of them."""
    hints, found = get_type_hints(kind), dataclasses.fields(kind)
    return [(field, hints[field.name]) for field in found if not names or field.name in names]


def command(
    app: typer.Typer, *groups: type | list[Option], name: str | None = None
) -> Callable[[Callable[[Given], None]], Callable[..., None]]:
    """Adds a function as a command whose options are the fields of dataclasses of settings.

    Args:
        app: the commands to add to.
        groups: dataclasses of settings, or some of their fields; of fields of one name the first.
        name: of the command; default the function's.
    """
    parameters = {"context": _parameter("context", typer.Context)}
    for group in groups:
        for field, hint in group if isinstance(group, list) else fields(group):
            if field.metadata["flag"] is not None:
                parameters.setdefault(field.name, _option(field, hint))
    parameters["debug"] = _parameter("debug", _DEBUGGING, False)

    def add(function: Callable[[Given], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            function(Given(values["context"]))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {}  # typer would believe them rather than the signature
        return app.command(name)(run)

    return add


# How a calibration is read, of every command that reads one.
READING = fields(Text, "tokens", "field", "split", "join", "sequence_length", "batch_size")
READING += fields(Mixture, "shares")


def _option(field: Field, hint: Any) -> inspect.Parameter:
    """Returns the parameter of a command from which typer makes the option of a field."""
    about = field.metadata
    parser, required = _PARSERS.get(about["metavar"]), field.default is dataclasses.MISSING
    kind = Any if parser else _plain_type(hint)
    if several := [part for part in _parts(hint) if get_origin(part) is list]:
        kind = list[Any] if parser else several[0]  # it may be given several times
    if (flag := about["flag"]) and not flag.startswith("-"):
        argument = typer.Argument(help=about["help"], metavar=flag, show_default=False)
        return _parameter(field.name, Annotated[kind, argument])
    option = typer.Option(
        *(flag.split() if flag else ()),
        help=about["help"],
        metavar=about["metavar"],
        rich_help_panel=about["panel"],
        parser=parser,
        min=about["least"],
        max=about["most"],
        show_default=_shown(field, flag) or False,
    )
    if required:
        return _parameter(field.name, Annotated[kind, option])
    return _parameter(field.name, Annotated[kind | None, option], None)


def _plain_type(hint: Any) -> Any:
    """Returns the type of an option: a switch, a choice, a whole number, a path, or else text."""
    parts = _parts(hint)
    # A device that may be None is one that --device names, used or not.
    if bool in parts or (torch.device in parts and NoneType in parts):
        return bool
    choices = [part for part in parts if get_origin(part) is Literal]
    if choices and str not in parts:
        return choices[0]
    return next((kind for kind in (int, Path) if kind in parts), str)


def _parts(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the only one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _shown(field: Field, flag: str | None) -> str:
    """Returns the default of an option in words; of a switch the flag that is in force."""
    if field.default is None and not field.metadata["shown"]:
        return ""
    if not isinstance(field.default, bool):
        return shown_default(field)
    name = field.name.replace("_", "-")
    on, _, off = (flag or f"--{name}/--no-{name}").partition("/")
    return (on if field.default else off).removeprefix("--")


def _parameter(name: str, annotation: Any, default: Any = _NONE) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _keep_traceback(context: typer.Context, wanted: bool) -> None:
    context.meta[DEBUG] = wanted


_DEBUGGING = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of an error.",
        callback=_keep_traceback,
        rich_help_panel="Running",
    ),
]
