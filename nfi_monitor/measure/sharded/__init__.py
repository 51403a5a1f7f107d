"""Measure where each rank holds a part of every tensor (``step``) or of the classes (``rows``)."""
