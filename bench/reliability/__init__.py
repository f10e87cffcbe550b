"""Broken data, broken files, killed processes, several processes, hours of work."""
