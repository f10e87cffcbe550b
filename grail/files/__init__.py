"""Models and texts on disk: loads, saves and exports the ones, reads and packs the others."""

__all__ = [
    "alignment",
    "calibration",
    "load",
    "packing",
    "pretrained",
    "provenance",
    "saving",
    "text",
]
