"""Gradients of block-sparse attention: dQ by tiles, or by key blocks where selections are scattered, dK and dV by key blocks."""
