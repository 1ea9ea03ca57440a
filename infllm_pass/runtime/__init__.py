"""Checks around a compiled graph at every call: cache positions and buffers that masks were read from."""
