"""The surroundings of a run: devices, memory, processes, undo, clocks, and files on disk."""
