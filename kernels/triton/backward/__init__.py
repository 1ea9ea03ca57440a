"""Gradients of block-sparse attention: dQ by tiles or, of scattered selections, by key blocks; dK, dV by key blocks."""
