"""Run the ``nfi-monitor`` command by ``python -m nfi_monitor``."""

from nfi_monitor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
