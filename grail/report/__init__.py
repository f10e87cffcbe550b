"""The result of a compression: data, evaluation, and the page, card and tables that show them."""

__all__ = [
    "card",
    "completions",
    "formatting",
    "logits",
    "page",
    "paired",
    "plots",
    "report",
    "summary",
    "texts",
]
