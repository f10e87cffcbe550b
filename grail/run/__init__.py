"""Runs over a network: compress, inspect, collect and sensitivity, block by block."""

__all__ = [
    "attention",
    "block",
    "blocks",
    "budget",
    "checkpoint",
    "exchange",
    "fingerprint",
    "folding",
    "loop",
    "measurement",
    "narrower",
    "network_loss",
    "peak_memory",
    "resume_folder",
    "site_check",
    "solver",
    "study",
    "workflow",
]
