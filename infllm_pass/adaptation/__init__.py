"""Adapting a dense model to sparse attention, and to longer texts, by some more training.

`documents` are read, `tasks` hide things in them, `rows` packs both, `rotary` extends a model's positions.
"""
