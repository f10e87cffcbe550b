"""The surroundings of a run: devices, memory, processes, undo, clocks, and files on disk."""

__all__ = [
    "clock",
    "folder",
    "hooks",
    "lock",
    "memory",
    "onload",
    "processes",
    "progress",
    "settings",
    "state",
    "transaction",
]
