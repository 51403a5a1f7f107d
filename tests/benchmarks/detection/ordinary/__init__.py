"""The monitor and its peers on ordinary trainings: ``python -m tests.benchmarks.detection.ordinary``."""
