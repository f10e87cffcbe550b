"""How a run is computed: devices, memory, processes, state on disk, and undoing changes."""
