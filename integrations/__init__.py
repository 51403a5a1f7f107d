"""Adapt the monitor to training frameworks, installed as ``nfi_monitor.integrations``.

One thin module per framework: it only translates that framework's events into calls on
:class:`nfi_monitor.Monitor`.  All logic is in the core, so a fix there reaches every adapter.
Importing this package imports no framework; importing a module of it imports that one only.
"""
