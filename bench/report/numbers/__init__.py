"""Measured numbers of the pages, one module a subject; a number without a row is an error."""
