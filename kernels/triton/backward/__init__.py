"""Gradients of block-sparse attention: dQ by tiles, dK and dV by key blocks."""
