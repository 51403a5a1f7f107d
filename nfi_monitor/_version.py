"""The one place the version is written. No imports: the build reads this file without running it."""

__version__ = "0.2.0"
