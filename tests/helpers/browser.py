"""TensorBoard as people see it: the real server, and its pages in Chromium.

``python tests/helpers/browser.py LOGDIR FOLDER`` takes the README's pictures, which are of runs of logistic.yaml,
cnn.yaml and fast.yaml, and of a test of the last.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Of each page the address, and what must be there before it counts as drawn.
PAGES = {
    "curves": ("tagFilter=(train|val)/(acc|loss)#timeseries", "scalar-card svg path"),
    "images": ("#images", "tf-image-loader img"),
    "train-and-validation": ("#custom_scalars", "vz-line-chart2 svg path"),
    "hparams": ("#hparams", "table"),
    "graph": ("#graphs", "svg g.nodes g.node"),
}


@contextmanager
def tensorboard(logdir: Path, runs: int) -> Iterator[str]:
    """The address of a server that has loaded so many runs."""
    arguments = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port=0", "--load_fast=false"]
    arguments += ["--reload_task=blocking", "--reload_interval=0"]  # it answers when it has read everything
    with tempfile.NamedTemporaryFile() as file:
        log, process = Path(file.name), subprocess.Popen(arguments, stdout=file, stderr=file)
        try:
            while (found := re.search(r" at (http://\S+?)/? ", log.read_text())) is None:
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            address = found[1].replace("localhost", "127.0.0.1")
            assert len(requests.get(f"{address}/data/runs", timeout=60).json()) == runs
            yield address
        finally:
            process.terminate()
            process.wait()


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a headless Chromium."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1400, "height": 860})
        page.set_default_timeout(120_000)
        yield page
        chromium.close()


def open_page(page: Page, address: str, name: str) -> None:
    """Goes to one of PAGES and waits until it is drawn."""
    place, selector = PAGES[name]
    page.goto(f"{address}/?darkMode=false&{place}")
    page.locator(selector).first.wait_for()


def main(logdir: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = len(list(logdir.glob("*/events.out.tfevents.*")))
    with tensorboard(logdir, runs) as address, browser() as page:
        for name in PAGES:
            open_page(page, address, name)
            page.wait_for_timeout(2000)  # charts unroll
            page.screenshot(path=folder / f"{name}.png")
            print(folder / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
