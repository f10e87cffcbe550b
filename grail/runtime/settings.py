"""Settings are fields of frozen dataclasses: default, help text and flag are written once, there.

`Runtime` is how a run is computed. `grail.Recipe`, what it computes, has fields of the same form.
Docstrings, command-line flags and the tables of docs/reference/recipe.md are made from them.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch

from grail.arguments import as_path, did_you_mean, require_switches, require_usable
from grail.errors import InputError
from grail_kernels import check_kind

Settings = TypeVar("Settings")


def setting(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    flag: str | None = "",
    metavar: str | None = None,
    panel: str | None = None,
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """Declares a field of a dataclass of settings.

    Args:
        default: its value; `...` is none, and the setting must be given.
        help: what it does, in sentences.
        shown: the default in words, where the value alone is unclear.
        flag: on the command line; "" is made from the name, None is no flag.
        metavar: of its value in the help of the command line.
        panel: the heading under which that help shows it.
        least, most: the range of whole numbers that the command line takes.
    """
    metadata: dict[str, Any] = {"help": help, "shown": shown, "flag": flag, "metavar": metavar}
    metadata |= {"panel": panel, "least": least, "most": most}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shown_default(field: "dataclasses.Field[Any]") -> str:
    """Returns the default of a setting in words; nothing where it must be given."""
    if field.default is dataclasses.MISSING:
        return ""
    return str(field.metadata["shown"] or ("none" if field.default is None else field.default))


def documented(cls: type[Settings]) -> type[Settings]:
    """Adds the help text of every field to the docstring of a dataclass of settings."""
    lines = ["", "", "Args:"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = f" Default: {shown}." if (shown := shown_default(field)) else ""
        text = f"{field.name}: {field.metadata['help']}{default}"
        lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="        ")
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n" + textwrap.indent(
        "\n".join(lines[1:]), "    "
    )
    return cls


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises InputError for a setting that is not known, with the nearest one that is."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown setting {name!r}; {did_you_mean(str(name), known)}choose of "
                f"{', '.join(known)}"
            )


@documented
@dataclass(frozen=True)
class Runtime:
    """Settings of how a run is computed; none changes its result. Wrong values raise InputError."""

    storage: torch.device | str = setting(
        "auto",
        "Device that holds the hidden states of the calibration set between blocks. auto is the "
        "model's GPU if the run fits there with them, else the host.",
        metavar="DEVICE",
        panel="Running",
    )
    onload: torch.device | str | None = setting(
        None,
        "Copy the blocks of a model on the CPU one at a time to this device, for models larger "
        "than a GPU. On the command line a switch: the device is --device.",
        panel="Running",
    )
    resume_dir: str | Path | None = setting(
        None,
        "Folder for the state of the run after each block. After a crash the same call resumes "
        "from there and ends with the same bits.",
        panel="Running",
    )
    progress: bool = setting(True, "Show progress.", panel="Running")

    def __post_init__(self) -> None:
        if self.storage != "auto":
            require_usable(self.storage, "storage")
        if self.onload is not None:
            require_usable(self.onload, "onload")
        if self.resume_dir is not None:
            object.__setattr__(self, "resume_dir", as_path("resume_dir", self.resume_dir))
        require_switches(progress=self.progress)


def as_runtime(runtime: Runtime | None) -> Runtime:
    """Returns the runtime of a call, the default one if it gives none."""
    check_kind("runtime", runtime, (Runtime, NoneType), "a grail.Runtime")
    return runtime or Runtime()


def changed(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Returns settings with those fields that `given` names."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    return dataclasses.replace(settings, **{n: given[n] for n in names if n in given})  # type: ignore[type-var]
