"""A real TensorBoard and a real browser, for the tests of the NFI tab and for its picture in the README.

python -m tests.integrations.browser docs/tensorboard.png
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the example and take the picture of the tab.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--logdir", type=Path, help="runs float32 and float64 that exist already")
    args = parser.parse_args(argv)
    executable = find_browser()
    if executable is None:
        raise SystemExit(f"No browser found (looked for {', '.join(NAMES)}): apt-get install chromium")
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
