"""Write a run to disk while it trains, and read it for reports."""

from nfi_monitor.report.run_directory.files import (
    ALERTS,
    READINGS,
    REPLAYS,
    RUN,
    RunDirectoryError,
    check_run,
    parse_line,
)
from nfi_monitor.report.run_directory.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.run_directory.reader import RunRecord, read_run
from nfi_monitor.report.run_directory.writer import RunDirectory

__all__ = [
    "ALERTS", "READINGS", "REPLAYS", "RUN", "DirectoryInUseError", "DirectoryLock", "RunDirectory",
    "RunDirectoryError", "RunRecord", "check_run", "parse_line", "read_run",
]  # fmt: skip
