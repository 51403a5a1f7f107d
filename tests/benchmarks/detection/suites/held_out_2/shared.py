"""Random numbers of the second held-out half."""

from __future__ import annotations

from tests.benchmarks.detection.suites.common import generators

generator_of = generators(104_729)
