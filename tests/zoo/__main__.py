"""Run the zoo: ``python -m tests.zoo``. Exit 1 if a configuration is wrong or fewer than 97% are right."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
)

import argparse
import collections
import fnmatch
import importlib.metadata
import json
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.zoo import tables, torchvision_ops
from tests.zoo.configuration import Configuration, Table
from tests.zoo.page import RESULTS, write
from tests.zoo.session import run
from tests.zoo.verdict import BROKEN, DEGRADED, RIGHT, WRONG, Verdict, judge

SHARE_RIGHT = 0.97


def main(argv: list[str] | None = None) -> int:
    """Run the chosen configurations; write results and page if all were chosen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="LIBRARY[/NAME]", help="may hold * and be repeated"
    )
    parser.add_argument("--details", action="store_true", help="print the notes of each configuration")
    parser.add_argument("--list", action="store_true", help="print the names, train nothing")
    parser.add_argument("--json", metavar="FILE", help="write the verdicts to FILE as well")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torchvision_ops.declare()
    verdicts: list[Verdict] = []
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    for table in tables.TABLES:
        if arguments.only and not any(_table_chosen(pattern, table) for pattern in arguments.only):
            continue
        reason = table.missing()
        if reason is not None:
            missing[table.library] = reason
            print(f"{table.library}: not installable here: {reason}", flush=True)
            continue
        versions |= {name: importlib.metadata.version(name).partition("+")[0] for name in table.packages}
        for configuration in table.make():
            if arguments.only and not any(
                fnmatch.fnmatch(
                    f"{table.library}/{configuration.name}", pattern if "/" in pattern else pattern + "/*"
                )
                for pattern in arguments.only
            ):
                continue
            if arguments.list:
                print(f"{table.library}/{configuration.name}")
                continue
            verdicts.append(_one(table, configuration, arguments.details))
    print(_closing(verdicts))
    versions["torch"] = torch.__version__.partition("+")[0]
    record = {
        "versions": dict(sorted(versions.items())),
        "not_installable": missing,
        "configurations": [verdict.to_json() for verdict in verdicts],
    }
    if arguments.json:
        _save(Path(arguments.json), record)
    if not arguments.only and not arguments.list:
        _save(RESULTS, record)
        write()
    counts = collections.Counter(verdict.verdict for verdict in verdicts)
    return int(counts[WRONG] + counts[BROKEN] > 0 or counts[RIGHT] < SHARE_RIGHT * len(verdicts))


def _table_chosen(pattern: str, table: Table) -> bool:
    return fnmatch.fnmatch(table.library, pattern.split("/")[0])


def _one(table: Table, configuration: Configuration, details: bool) -> Verdict:
    """Train without and with the monitor, and print the verdict."""
    started = time.perf_counter()
    alone = run(configuration, watching=False)
    if alone.error is not None:
        error = alone.error
        print(
            f"BROKEN   {table.library}/{configuration.name}: {type(error).__name__}: {str(error)[:300]}",
            flush=True,
        )
        if details:
            traceback.print_exception(error)
        return Verdict(table.library, configuration.name, BROKEN, [f"{type(error).__name__}: {error}"])
    watched = run(configuration, watching=True)
    verdict = judge(table.library, configuration, alone, watched)
    for record in (alone, watched):
        shutil.rmtree(record.session.folder, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(
        f"{verdict.verdict:8} {table.library}/{configuration.name}  ({verdict.rows}, {seconds:.1f} s)",
        flush=True,
    )
    for cause in verdict.causes:
        print(f"           {cause}", flush=True)
    if details:
        print(f"           head {verdict.head}")
        for code, message in verdict.notes.items():
            print(f"           [{code}] {message}")
    return verdict


def _closing(verdicts: list[Verdict]) -> str:
    counts = collections.Counter(verdict.verdict for verdict in verdicts)
    return f"{len(verdicts)} configurations: " + ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in (RIGHT, DEGRADED, WRONG, BROKEN)
    )


def _save(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
