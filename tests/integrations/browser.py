"""A real TensorBoard and a real browser: for the tests of the NFI tab, its picture in README and its speed.

python -m tests.integrations.browser docs/tensorboard.png
python -m tests.integrations.browser --time
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nfi_monitor.report.summary import Summary
from nfi_monitor.report.tensorboard.sink import TensorBoardSink
from nfi_monitor.types import AlertKind, Change, Phase, Reading, Severity
from tests.report.builders import INFO, event

ROOT = Path(__file__).resolve().parents[2]
LARGE_STEPS, LARGE_ALERTS = 100_000, 2_000
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def train_the_example(out: Path, *options: str) -> str:
    """What ``examples/06_tensorboard.py`` prints; it leaves two runs in ``out``."""
    command = [sys.executable, str(ROOT / "examples" / "06_tensorboard.py"), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(logdir: Path, *options: str) -> Iterator[str]:
    """The address of a TensorBoard over ``logdir``, on this machine only, that has found its plugins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--reload_interval", "1", *options], stdout=log, stderr=log
        )
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{address}/data/plugins_listing", timeout=10).read()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > until:
                        log.seek(0)
                        raise RuntimeError(f"TensorBoard did not start:\n{log.read().decode()}") from None
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=20)


@contextmanager
def browsing(executable: str) -> Iterator[Any]:
    """A headless browser of Playwright's, driving the one that is installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def open_tab(page: Any, address: str) -> Any:
    """The frame of the NFI tab inside TensorBoard's own page, once its charts are drawn."""
    page.goto(f"{address}/#nfi")
    handle = page.wait_for_selector("iframe", state="attached", timeout=60_000)
    frame = handle.content_frame()
    frame.wait_for_selector("h1", timeout=60_000)
    return frame


def drawn(frame: Any) -> None:
    frame.wait_for_function("performance.getEntriesByName('nfi-painted').length > 0", timeout=60_000)


def ask(address: str, route: str, **query: str) -> Any:
    url = f"{address}/data/plugin/nfi/{route}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


def write_large(directory: Path, steps: int = LARGE_STEPS, alerts: int = LARGE_ALERTS) -> None:
    """Through the sink itself; the stock panels' records are left out, they are not what is measured."""
    sink = TensorBoardSink(directory, min_seconds=1e9)
    sink.start(INFO)
    writer = sink._open()
    writer.flush = lambda: None  # type: ignore[method-assign]
    writer.add_text = lambda *_: None  # type: ignore[method-assign]
    every, phases, kinds = steps // alerts, list(Phase), list(AlertKind)
    names = (
        "loss", "zero_sum_violation", "absorbed_fraction", "feature_mean_norm", "classifier_mean_norm",
        "logit_displacement", "rms_t_max", "margin_median", "sqrt_exp_avg_sq_median",
    )  # fmt: skip
    for step in range(1, steps + 1):
        values = dict.fromkeys(names, 0.1 + abs(math.sin(step / 4000)))
        values["loss"] = 9_999.0 if step == steps * 7 // 9 else 0.1 + (step % 97) / 100
        number, late = divmod(step, every)
        sink.reading(Reading(step, values), phases[1 + number % 5] if late < 9 else Phase.HEALTHY)
        if late == 0:
            alert = event(kinds[number % 4], step - 10, step - 5, number)
            severity = list(Severity)[number % 3]
            sink.alert(replace(alert, severity=severity), Change.UPDATE)
    sink.close(INFO, Summary())


def until_loaded(address: str, steps: int = LARGE_STEPS) -> None:
    """TensorBoard reads a log directory in the background."""
    until = time.monotonic() + 60
    while ask(address, "run", run="large").get("readings") != steps:
        assert time.monotonic() < until, "TensorBoard did not load the large run"
        time.sleep(0.3)


def load_large(page: Any, address: str) -> float:
    """Seconds from the tab's start to its charts. The large run has to be the first in the list."""
    page.goto(f"{address}/data/plugin_entry.html?name=nfi")
    page.wait_for_selector("h1")
    drawn(page)
    mark = "performance.getEntriesByName('nfi-{}')[0].startTime"
    milliseconds: float = page.evaluate(f"{mark.format('painted')} - {mark.format('start')}")
    return milliseconds / 1000


def time_large(executable: str, loads: int) -> None:
    """Print how long the tab takes to its charts, each time in a page of its own."""
    with tempfile.TemporaryDirectory() as directory:
        write_large(Path(directory) / "large")
        with serving(Path(directory)) as address, browsing(executable) as browser:
            until_loaded(address)
            seconds = []
            for _ in range(loads):
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                seconds.append(load_large(page, address))
                page.close()
    load, median = os.getloadavg()[0], statistics.median(seconds)
    print(
        f"{LARGE_STEPS:,} steps, {LARGE_ALERTS:,} alerts, load average {load:.1f} on {os.cpu_count()} cores"
    )
    print(f"from the tab's start to its charts {seconds[0]:.2f} s at first, median of {loads} {median:.2f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Take the picture of the tab, or time it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("picture", type=Path, nargs="?")
    what.add_argument("--time", type=int, nargs="?", const=7, metavar="LOADS", help="of a very long run")
    parser.add_argument("--logdir", type=Path, help="runs float32 and float64 that exist already")
    args = parser.parse_args(argv)
    executable = find_browser()
    if executable is None:
        raise SystemExit(f"No browser found (looked for {', '.join(NAMES)}): apt-get install chromium")
    if args.time:
        time_large(executable, args.time)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        logdir = args.logdir or Path(directory) / "runs"
        if args.logdir is None:
            train_the_example(logdir)
        with serving(logdir) as address, browsing(executable) as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 880}, color_scheme="light")
            frame = open_tab(page, address)
            drawn(frame)
            frame.select_option("select[aria-label='Compare with']", "float64")
            frame.wait_for_selector("[data-run='float64']")
            frame.click(".alert > button:has-text('imminent')")
            frame.wait_for_selector(".detail table")
            page.wait_for_timeout(1500)
            page.screenshot(path=args.picture)
    quantised(args.picture)
    print(f"{args.picture}: {args.picture.stat().st_size / 1024:.0f} KB")
    return 0


def quantised(picture: Path) -> None:
    """256 colours are plenty for a page of text and lines, at a third of the size."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(picture, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())
