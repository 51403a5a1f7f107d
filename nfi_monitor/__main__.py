"""``python -m nfi_monitor``: the same as the ``nfi-monitor`` command."""

from nfi_monitor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
