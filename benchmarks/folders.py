"""``python -m benchmarks.folders``: reads a folder of images beside a plain ``DataLoader`` with Pillow."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Column, Table
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import described, machine
from mnist_lit.engine.data.module import ImageDataModule

SIDE = 64  # pixels to which they are brought
CLASSES = 10
BATCH = 64


def make(folder: Path, number: int) -> None:
    """Photos-like images of 80 to 320 pixels, half of them JPEG and half PNG."""
    random = np.random.default_rng(0)
    for index in range(number):
        height, width = (int(side) for side in random.integers(80, 320, 2))
        coarse = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        path = folder / str(index % CLASSES) / f"{index}.{'jpg' if index % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


class Plain(Dataset):
    """What one would write."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.*"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), int(self.paths[index].parent.name)


def epoch(loader: DataLoader, times: dict[str, list[float]], name: str, started: float) -> None:
    """Measure the time to the first batch and to the last."""
    for number, _ in enumerate(loader):
        if not number:
            times.setdefault(f"{name}: first batch", []).append(time.perf_counter() - started)
    times.setdefault(f"{name}: epoch", []).append(time.perf_counter() - started)


def main() -> None:
    """Print medians of interleaved repeats."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folders", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    about = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make(folder, options.images)
        for repeat in range(options.repeats):
            started = time.perf_counter()
            epoch(DataLoader(Plain(folder), BATCH, shuffle=True, num_workers=options.workers), times, "plain", started)
            for name, limit, workers in (("from files", 1e-9, options.workers), ("in memory", 2.0, 0)):
                kwargs = {"image_size": SIDE, "batch_size": BATCH, "memory_limit": limit, "num_workers": workers}
                kwargs |= {"valid_fraction": 0.0, "test_fraction": 0.0, "data_dir": f"{temporary}/{name}{repeat}"}
                for start in ("first start", "later start"):
                    started = time.perf_counter()
                    data = ImageDataModule(str(folder), **kwargs)
                    data.prepare_data()
                    epoch(data.train_dataloader(), times, f"mnist_lit {name}, {start}", started)
    table = Table("", *(Column(name, justify="right") for name in ("seconds", "from", "to", "of plain")))
    for name, seconds in times.items():
        median, base = statistics.median(seconds), statistics.median(times[f"plain: {name.rpartition(': ')[2]}"])
        table.add_row(name, f"{median:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{median / base:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{options.images:,} images, {options.workers} workers; {described(about)}")


if __name__ == "__main__":
    main()
