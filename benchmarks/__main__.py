"""``python -m benchmarks [--quick]``: times mnist_lit beside what it is compared with.

Every run is a process of its own, the contenders take turns, and what is printed are medians and their
ratio to the tutorial's loop. Writes a table, ``results.json`` and ``results.png`` into ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from mnist_lit.datasets.files import Splits, read_dataset

ROOT = Path(__file__).parents[1]
MODELS = "logistic", "cnn"
SPEED = ["--config", str(ROOT / "configs" / "overlays" / "speed.yaml")]
# What a run of mnist_lit takes beside its config; the others are in contenders.py.
CONTENDERS: dict[str, list[str] | None] = {
    "tutorial": None,
    "stock": None,
    "mnist_lit": [],
    "mnist_lit speed": SPEED,
    "mnist_lit speed channels_last": [*SPEED, "--model.channels_last=true"],  # which is for convolutions
    "floor": None,
}
GROWING = "tutorial", "mnist_lit", "mnist_lit speed"  # those that are followed from size to size
BATCH_SIZES = 16, 64, 256, 1024
IMAGES = 5_000, 50_000, 500_000
REPEATS = 5
Result = dict[str, float]


def start(arguments: list[str], folder: Path) -> tuple[dict[str, Any], float, float]:
    """A process: the moments that its clock took, when it began and when it ended.

    Raises:
        SystemExit: with what it printed, when it fails.
    """
    command = [sys.executable, "-m", *arguments]
    began = time.time()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads((folder / "clock.json").read_text()), began, time.time()


def run(name: str, model: str, data: Path, images: int, folder: Path, epochs: int, batch_size: int) -> Result:
    """One training run, measured in seconds, microseconds (``step_us``) and bytes (``peak_memory``)."""
    settings = CONTENDERS[name]
    if settings is None:
        arguments = ["benchmarks.contenders", name, model, str(data), "clock.json"]
        arguments += [f"--epochs={epochs}", f"--batch_size={batch_size}"]
    else:
        callback = {"class_path": "benchmarks.contenders.clock", "init_args": {"path": "clock.json"}}
        (folder / "clock.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
        arguments = ["mnist_lit", "fit", "--config", str(ROOT / "configs" / f"{model}.yaml")]
        arguments += [*settings, "--config", "clock.yaml", f"--trainer.max_epochs={epochs}"]
        arguments += [f"--data.dataset={data}", f"--data.batch_size={batch_size}"]
    moments, began, ended = start(arguments, folder)
    pairs = zip(moments["epochs"], moments["epochs"][1:], strict=False)
    epoch = statistics.median(after - before for before, after in pairs)
    return {
        "epoch": epoch,
        "step_us": epoch / math.ceil(images / batch_size) * 1e6,
        "first_step": moments["step"] - began,
        "exit": ended - began,
        "peak_memory": moments["peak_memory"],
    }


def medians(results: list[Result]) -> Result:
    """Field by field."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def resized(splits: Splits, images: int, path: Path) -> None:
    """A dataset with as many training images, which repeat where there are no more."""
    (x, y), (x_valid, y_valid), _ = splits
    index = torch.arange(images) % len(x)
    arrays = {"x_train": x[index], "y_train": y[index], "x_valid": x_valid[:1000], "y_valid": y_valid[:1000]}
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})


def table(title: str, rows: dict[str, Result], console: Console) -> None:
    """Prints medians, with epochs and run times as ratios to the tutorial's."""
    columns = ("s/epoch", "us/step", "ratio", "s to first step", "s to exit", "ratio", "MB")
    printed = Table("contender", *(Column(name, justify="right") for name in columns), title=title)
    for name, row in rows.items():
        base = rows["tutorial"]
        printed.add_row(
            name,
            f"{row['epoch']:.2f}",
            f"{row['step_us']:.0f}",
            f"{row['epoch'] / base['epoch']:.2f}",
            f"{row['first_step']:.1f}",
            f"{row['exit']:.1f}",
            f"{row['exit'] / base['exit']:.2f}",
            f"{row['peak_memory'] / 1e6:.0f}",
        )
    console.print(printed)


def plot(results: dict[str, Any], path: Path) -> None:
    """Epochs beside the tutorial's, and how the cost of a step grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ["epochs", *(key for key in ("batch_size", "images") if results[key])]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for place, model in enumerate(MODELS):
            if panel == "epochs":
                rows = results["epochs"][model]
                base = rows["tutorial"]["epoch"]
                names = [f"{model}: {name}" for name in rows]
                axis.barh(names, [row["epoch"] / base for row in rows.values()], color=f"C{place}")
                axis.axvline(1, color="black", linewidth=0.8)
                axis.set_xlabel("time of an epoch, the tutorial's loop = 1")
                continue
            sizes = results[panel][model]
            for number, name in enumerate(GROWING):
                steps = [rows[name]["step_us"] for rows in sizes.values()]
                style = {"linestyle": ("-", "--")[place], "color": f"C{number}", "marker": "."}
                axis.loglog([int(size) for size in sizes], steps, label=f"{model}: {name}", **style)
            axis.set_xlabel({"batch_size": "batch size", "images": "training images"}[panel])
            axis.set_ylabel("microseconds per step")
            axis.legend(fontsize=7)
    axes[0, 0].invert_yaxis()  # in the order of the table
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the tables at batch size 64")
    parser.add_argument("--archive", default="data/mnist/mnist.pkl.gz", help="the tutorial's archive")
    parser.add_argument("--output", default="benchmarks", help="the folder of results.json and results.png")
    args = parser.parse_args()
    archive = Path(args.archive).resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    if find_spec("matplotlib") is None:
        parser.error("no matplotlib for results.png: pip install -e '.[sweep]'")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "repeats": REPEATS}
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def interleaved(
            model: str, names: Sequence[str], data: Path, images: int, epochs: int, batch_size: int
        ) -> dict[str, Result]:
            each: dict[str, list[Result]] = {name: [] for name in names}
            what = f"{model}, batches of {batch_size}, {images:,} images"
            for name in track([*names] * REPEATS, what, console=console, transient=True):
                each[name].append(run(name, model, data, images, folder, epochs, batch_size))
            return {name: medians(measured) for name, measured in each.items()}

        def write() -> None:
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

        loading = {"tutorial": [], "cold": [], "warm": []}
        for _ in track(range(REPEATS), "data", console=console, transient=True):
            shutil.rmtree(folder / "data", ignore_errors=True)
            for name in loading:
                contender = "tutorial" if name == "tutorial" else "ready"
                arguments = ["benchmarks.contenders", contender, "logistic", str(archive), "clock.json"]
                moments, _, _ = start([*arguments, "--epochs=0"], folder)
                loading[name].append(moments["data"] - moments["imported"])
        results["data"] = {name: statistics.median(seconds) for name, seconds in loading.items()}
        line = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in results["data"].items())
        console.print(f"Data ready: {line}")
        imports, code = [], "import lightning.pytorch.cli, time; print(time.time())"
        for _ in range(REPEATS):
            began = time.time()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            imports.append(float(done.stdout) - began)
        results["bare_import"] = statistics.median(imports)
        console.print(f"import lightning.pytorch.cli: {results['bare_import']:.2f} s")

        results |= {"epochs": {}, "batch_size": {}, "images": {}}
        for model in MODELS:
            names = [name for name in CONTENDERS if model == "cnn" or "channels_last" not in name]
            results["epochs"][model] = interleaved(model, names, archive, 50_000, 2, 64)
            table(f"{model}, batches of 64, 2 epochs, {device}", results["epochs"][model], console)
            write()
        if not args.quick:
            files = {images: folder / f"{images}.npz" for images in IMAGES}
            splits = read_dataset(archive)
            for images, path in files.items():
                resized(splits, images, path)
            for model in MODELS:
                panels = {
                    "batch_size": {n: (archive, 50_000, 1, n) for n in BATCH_SIZES},
                    "images": {images: (path, images, 1, 64) for images, path in files.items()},
                }
                for panel, sizes in panels.items():
                    results[panel][model] = {}
                    for size, setting in sizes.items():
                        rows = results[panel][model][size] = interleaved(model, GROWING, *setting)
                        table(f"{model}, {panel} {size:,}", rows, console)
                        write()
        plot(results, output / "results.png")
    console.print(f"Wrote {output / 'results.json'} and {output / 'results.png'}")


if __name__ == "__main__":
    main()
