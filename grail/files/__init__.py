"""Models and texts on disk: loads, saves and exports the ones, reads and packs the others."""

__all__ = [
    "alignment",
    "documents",
    "load",
    "packing",
    "pretrained",
    "provenance",
    "saving",
    "text",
]
