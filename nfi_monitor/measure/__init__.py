"""Tensors → numbers. Pure functions, one measured quantity a file, no state and no hooks.

Nothing here reads a value on the host: every function returns tensors on the device of its input, so
that a whole optimizer step's numbers travel in one copy.
"""
