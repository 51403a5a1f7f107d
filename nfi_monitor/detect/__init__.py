"""Numbers → phase, alerts, forecast. Plain Python: no torch, no numpy, replayable from a file."""
