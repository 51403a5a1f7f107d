"""Turn numbers into phase, alerts and forecast. Plain Python: no torch, no numpy, replayable from a file."""
