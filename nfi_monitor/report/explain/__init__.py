"""Explain an alert: which quantities crossed which thresholds, when, and which did not."""

from nfi_monitor.report.explain.compose import explain, explain_run, find_alert
from nfi_monitor.report.explain.explanation import Explanation, Finding, Seen

__all__ = ["Explanation", "Finding", "Seen", "explain", "explain_run", "find_alert"]
