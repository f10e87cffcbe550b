"""The command line, one file a command: each reads options, calls the library and prints."""

from grail.commands.root import app

__all__ = ["app"]
