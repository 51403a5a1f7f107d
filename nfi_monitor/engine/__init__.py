"""Handle each optimizer step: read it, judge it, report it, and choose the next step to read."""
