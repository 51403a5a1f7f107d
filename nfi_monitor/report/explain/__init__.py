"""An alert in plain words: which quantities crossed what, when, and what was *not* seen."""

from nfi_monitor.report.explain.compose import explain, explain_run, find_alert
from nfi_monitor.report.explain.explanation import Explanation, Finding, Seen

__all__ = ["Explanation", "Finding", "Seen", "explain", "explain_run", "find_alert"]
