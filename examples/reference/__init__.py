"""Reproduce the papers' experiments and judge each claim: ``python -m examples.reference.parity``."""
