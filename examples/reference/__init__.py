"""The papers' experiments, each with its verdict: ``python -m examples.reference.parity``."""
