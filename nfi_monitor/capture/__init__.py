"""Capture detached tensors from the running training by hooks. Nothing is measured or judged here."""
