"""Parallelism, one file per axis."""
