"""``.ci/requirements.lock``: every package that CI installs, with its version and the hash of its file.

    pip install --dry-run --ignore-installed --report report.json -c constraints.txt torch ".[dev]"
    python -m tests.safety.lock report.json   # write the lock (Python 3.11 on x86-64 Linux, as in CI)
    python -m tests.safety.lock --check       # whether this environment holds what the lock says, and no more

CI installs it with ``pip install --no-deps --require-hashes -r .ci/requirements.lock``: pip compares each
file with its hash before it opens it.  torch is not in it, since which build is the right one is for the
machine to decide (``constraints.txt`` has its version), nor are pip and setuptools, which come with Python.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / ".ci" / "requirements.lock"
NOT_LOCKED = {"torch", "nfi-monitor", "pip", "setuptools", "wheel"}
_ENTRY = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+) ((?:--hash=sha256:[0-9a-f]{64} ?)+)$")


def normal(name: str) -> str:
    """A project's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(report: dict[str, Any]) -> list[str]:
    """The lines of the lock from pip's installation report. Raises ValueError for a file without a hash."""
    lines = []
    for item in report["install"]:
        name, version = normal(item["metadata"]["name"]), item["metadata"]["version"]
        if name in NOT_LOCKED:
            continue
        hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" not in hashes:
            raise ValueError(f"pip's report has no hash of {name} {version}.")
        lines.append(f"{name}=={version} --hash=sha256:{hashes['sha256']}")
    return sorted(lines)


def locked(path: Path = LOCK) -> dict[str, tuple[str, list[str]]]:
    """Name → (version, hashes). Raises ValueError, with the line, for what is no entry with a hash."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = _ENTRY.match(line)
        if match is None:
            raise ValueError(f"{path.name}: not `name==version --hash=sha256:...`: {line}")
        found[normal(match[1])] = (match[2], re.findall(r"sha256:([0-9a-f]{64})", match[3]))
    return found


def differing(installed: dict[str, str], lock: dict[str, tuple[str, list[str]]]) -> list[str]:
    """What an environment holds that the lock does not say, each a sentence; and what it lacks."""
    said = []
    for name in sorted((installed.keys() | lock.keys()) - NOT_LOCKED):
        have, want = installed.get(name), lock.get(name, (None, []))[0]
        if have != want:
            said.append(f"{name}: installed is {have or 'nothing'}, locked is {want or 'nothing'}")
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", nargs="?", type=Path, help="pip's installation report")
    parser.add_argument("--check", action="store_true", help="compare this environment with the lock")
    arguments = parser.parse_args(argv)
    if arguments.check:
        installed = {normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
        said = differing(installed, locked())
        print("\n".join(said) or f"{len(locked())} packages are as locked.")
        return 1 if said else 0
    if arguments.report is None:
        parser.error("give pip's report, or --check")
    lines = entries(json.loads(arguments.report.read_text(encoding="utf-8")))
    head = "# Made by tests/safety/lock.py for Python 3.11 on x86-64 Linux; torch is left to the machine.\n"
    LOCK.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
