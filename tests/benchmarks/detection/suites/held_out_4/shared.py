"""Random numbers of the fourth held-out half."""

from __future__ import annotations

from tests.benchmarks.detection.suites.common import generators

generator_of = generators(15_485_863)
