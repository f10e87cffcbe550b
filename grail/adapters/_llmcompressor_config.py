"""The configuration of a narrowed model, where llm-compressor saves it.

llm-compressor 0.14 replaces the saved config.json by the original file with a few of its own fields
updated, so that widths of a narrowed model are lost. They are written into the file again here.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from grail.adapters import _llmcompressor_library as library

Field = tuple[str, ...]  # of a field: the names of the configurations around it, and its own


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Returns the fields of a model's configuration; none if it has no configuration."""
    config: Any = getattr(model, "config", None)
    found: dict[str, Any] = {} if config is None else config.to_dict()
    return found


def save_with(model: Any, before: Mapping[str, Any]) -> None:
    """Lets `model.save_pretrained` keep the fields that differ from `before`, `settings_of` it."""
    fields = list(_changed(before, settings_of(model)))
    if not fields or not hasattr(model, "save_pretrained"):
        return
    save = model.save_pretrained

    @functools.wraps(save)  # with the mark of llm-compressor's own wrapper
    def save_pretrained(save_directory: str, *args: Any, **kwargs: Any) -> Any:
        result = save(save_directory, *args, **kwargs)
        if library.is_source_process():
            _write(Path(save_directory) / "config.json", settings_of(model), fields)
        return result

    model.save_pretrained = save_pretrained


def _changed(
    before: Mapping[str, Any], after: Mapping[str, Any], inside: Field = ()
) -> Iterator[Field]:
    """Yields the fields whose values differ."""
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from _changed(old, value, (*inside, name))
        elif value != old:
            yield (*inside, name)


def _write(path: Path, settings: Mapping[str, Any], fields: list[Field]) -> None:
    """Writes fields into a file of a configuration; the others stay."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for *owners, name in fields:
        target, source = content, settings
        for owner in owners:
            target, source = target.setdefault(owner, {}), source[owner]
        target[name] = source[name]
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
