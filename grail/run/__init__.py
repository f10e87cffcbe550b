"""Runs: the verbs, the loop over blocks, checkpoints, and the workflow of the command line."""
