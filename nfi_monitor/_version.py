"""Define the version. This file has no imports, because the build reads it without running it."""

__version__ = "0.2.0"
