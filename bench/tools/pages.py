"""Pages from templates: their text stands in a file, their numbers come from CSV files."""

import re
from pathlib import Path
from typing import Any


def fill(template: Path, **values: Any) -> str:
    """A template of jinja2 with its places filled; one without a value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(template.parent)  # of the templates that it extends
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    filled = environment.get_template(template.name).render(**values)
    parts = filled.split("```")  # text and code in turns; code keeps its empty lines
    parts[::2] = (re.sub(r"\n{3,}", "\n\n", text) for text in parts[::2])
    return "```".join(parts)
