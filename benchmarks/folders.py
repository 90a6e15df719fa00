"""``python -m benchmarks.folders``: reads a folder of images beside a plain ``DataLoader`` with Pillow."""

import statistics
import tempfile
import time
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import described, machine
from mnist_lit.engine import ImageDataModule

IMAGES, WORKERS = 20_000, 2
SIDE = 64  # pixels to which they are brought


def make(path: Path) -> None:
    """A photo-like image of 80 to 320 pixels."""
    random = np.random.default_rng(int(path.stem))
    height, width = (int(side) for side in random.integers(80, 320, 2))
    coarse = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
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


def main() -> None:
    """Print medians of interleaved repeats: seconds to the first batch and to the last."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    about = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        names = (f"{index % 10}/{index}.{'jpg' if index % 2 else 'png'}" for index in range(IMAGES))
        with Pool() as processes:
            processes.map(make, [folder / name for name in names])

        def ours(repeat: int, limit: float, workers: int) -> DataLoader:
            kwargs = {"valid_fraction": 0.0, "test_fraction": 0.0, "data_dir": f"{temporary}/{repeat}"}
            kwargs |= {"image_size": SIDE, "memory_limit": limit, "num_workers": workers}
            data = ImageDataModule(str(folder), **kwargs)
            data.prepare_data()
            return data.train_dataloader()

        loaders = {
            "plain": lambda _: DataLoader(Plain(folder), 64, shuffle=True, num_workers=WORKERS),
            "from files": lambda repeat: ours(repeat, 1e-9, WORKERS),
            "in memory, first start": lambda repeat: ours(repeat, 2.0, 0),
            "in memory, later start": lambda repeat: ours(repeat, 2.0, 0),
        }
        for repeat in range(3):
            for name, loader in loaders.items():
                started = time.perf_counter()
                ends = [time.perf_counter() - started for _ in loader(repeat)]
                times[name].append((ends[0], ends[-1]))
    for name, seconds in times.items():
        first, last = (statistics.median(each) for each in zip(*seconds, strict=True))
        print(f"{name:24} first batch {first:6.2f} s, epoch {last:6.2f} s")
    print(f"{IMAGES:,} images, {WORKERS} workers; {described(about)}")


if __name__ == "__main__":
    main()
