"""Record all output of the monitor for a fixed set of trainings, to compare two versions of the code."""
