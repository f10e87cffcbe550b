"""What a compression did: its data, its evaluation, and the page, card and tables that show it."""

__all__ = ["card", "completions", "formatting", "page", "plots", "report", "summary"]
