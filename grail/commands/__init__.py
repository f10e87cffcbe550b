"""The command line, one file a command."""

from grail.commands.root import app

__all__ = ["app"]
