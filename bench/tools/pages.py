"""Pages from templates: their text stands in a file, their numbers come from CSV files."""

import re
from pathlib import Path
from typing import Any


def fill(template: Path, **values: Any) -> str:
    """A template of jinja2 with its places filled; one without a value is an error."""
    from jinja2 import Environment, StrictUndefined

    text = template.read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    filled = environment.from_string(text).render(**values)
    return re.sub(r"\n{3,}", "\n\n", filled)
