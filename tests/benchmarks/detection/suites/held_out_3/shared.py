"""Random numbers of the third held-out half."""

from __future__ import annotations

from tests.benchmarks.detection.suites.common import generators

generator_of = generators(611_953)
