"""``python -m benchmarks.folders``: decodes a folder of 20,000 images beside a plain Pillow loop."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from mnist_lit.engine.data.sources import FolderOptions, open_dataset

SIDE = 64  # pixels to which they are brought
CLASSES = 10


def make(folder: Path, number: int) -> None:
    """Photos-like images of 80 to 320 pixels, half of them JPEG and half PNG."""
    random = np.random.default_rng(0)
    for index in track(range(number), "Making images", transient=True):
        height, width = (int(side) for side in random.integers(80, 320, 2))
        coarse = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        path = folder / str(index % CLASSES) / f"{index}.{'jpg' if index % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def plain(path: Path) -> np.ndarray:
    """What one would write."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC))


def loop(paths: list[Path], processes: int) -> None:
    """All of them, in this process or in several."""
    if processes == 1:
        np.stack([plain(path) for path in paths])
        return
    with multiprocessing.Pool(processes) as pool:
        np.stack(pool.map(plain, paths, chunksize=64))


def main() -> None:
    """Print medians of interleaved repeats."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folders", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make(folder, options.images)
        paths = sorted(folder.rglob("*.*"))

        def measure(name: str, function, *arguments: object) -> None:  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            function(*arguments)
            times.setdefault(name, []).append(time.perf_counter() - started)

        for repeat in range(options.repeats):
            measure("Pillow, one process", loop, paths, 1)
            measure("Pillow, two processes", loop, paths, 2)
            source = str(folder), Path(temporary) / f"data{repeat}", FolderOptions(image_size=(SIDE, SIDE))
            measure("mnist_lit, first start", open_dataset, *source)
            measure("mnist_lit, second start", open_dataset, *source)
    table = Table("", *(Column(name, justify="right") for name in ("seconds", "from", "to", "ratio")))
    base = statistics.median(times["Pillow, one process"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        table.add_row(name, f"{median:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{median / base:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.images:,} images; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load before "
        f"{before:.1f}; Python {platform.python_version()}, Pillow {PIL.__version__}"
    )


if __name__ == "__main__":
    main()
