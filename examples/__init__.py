"""Runs a person can start and learn from, one file each; installed as ``nfi_monitor.examples``.

Start them from a checkout (``python examples/01_plain_loop.py --help``) or from an installed package
(``python -m nfi_monitor.examples.01_plain_loop``).
"""
