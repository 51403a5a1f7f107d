"""Hooks: from the running training to detached tensors. Nothing is measured or judged here."""
