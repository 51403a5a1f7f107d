"""Suites besides the quick and the full one: ordinary trainings, and families nothing was tuned on."""
