"""Decode steps over a cache: compress, select, attend."""
