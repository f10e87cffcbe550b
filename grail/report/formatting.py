"""Quantities as a reader writes them: three significant digits and a unit."""

import math
from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Formats `count` bytes with a decimal unit: 269060552 → "269 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float) -> str:
    """Formats a number of things, shortened: 134515008 → "135 M"."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_number(value: float) -> str:
    """Formats three significant digits, below 10⁹ at least the integer part: 25.7, 1,234."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 6 and abs(value) < 1e9 else f"{value:.2e}"


def format_seconds(seconds: float) -> str:
    """Formats a wall time: 0.42 s, 42.1 s, 3 min 05 s."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    text = format_number(value) if power else str(round(value))
    return f"{text} {units[power]}".rstrip()
