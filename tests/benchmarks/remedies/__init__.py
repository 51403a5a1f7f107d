"""Which remedy averts which slingshot, and what it costs: ``python -m tests.benchmarks.remedies``."""
