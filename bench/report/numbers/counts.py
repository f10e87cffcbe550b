"""Counts of a test run in words."""

from collections.abc import Iterable

# What a run of the tests counts, and its name in a sentence.
COUNTED = {
    "fault": "faults injected",
    "refusal": "refusals of bad input or damage",
    "error": "reported errors measured in the whole network",
}


def sentence(counts: Iterable[tuple[str, str, int]]) -> str:
    """Returns counts, as (what, kind, count), in words."""
    counts, words = list(counts), []
    for what, name in COUNTED.items():
        kinds = [(kind, count) for w, kind, count in counts if w == what]
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        words.append(f"{sum(n for _, n in kinds):,} {name}" + (f" ({listed})" if kinds else ""))
    return "; ".join(words)
