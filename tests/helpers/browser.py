"""A real TensorBoard server, and Chromium to draw on the page of ``serve``."""

import math
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


def draw(page: Page, *points: tuple[float, float]) -> None:
    """Draws one line on the page of ``serve``, through points from (0, 0) to (1, 1), where nothing else is."""
    page.locator("#clear").click()
    box = page.locator("#paper").bounding_box()
    assert box is not None
    places = [(box["x"] + right * box["width"], box["y"] + down * box["height"]) for right, down in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()


def arc(right: float, down: float, radius: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of a part of a circle; 0 is its top, and a turn is clockwise."""
    turns = [2 * math.pi * (start + (end - start) * step / 24) for step in range(25)]
    return [(right + radius * math.sin(turn), down - radius * math.cos(turn)) for turn in turns]
