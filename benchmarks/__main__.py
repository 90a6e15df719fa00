"""``python -m benchmarks [--quick | --busy]``: times mnist_lit beside what it is compared with.

Every run is a process of its own, the contenders take turns, and what is printed are medians, their spread
and their ratio to the tutorial's script with one thread. Rows with a star were disturbed by other programs.
Writes tables, ``results.json`` and ``results.png`` into ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import BUSY, CLOCK, ROOT, Result, described, machine, medians, start
from mnist_lit.datasets.mnist import read_mnist

MODELS = "logistic", "cnn"
NO_DASHBOARD = ("--dashboard.every_n_epochs=0", "--dashboard.graph=false", "--dashboard.gradient_norm=false")
SPEED = ("--config", str(ROOT / "configs" / "overlays" / "speed.yaml"))


class Contender(NamedTuple):
    """A script in contenders.py, or mnist_lit with further arguments."""

    script: str | None = None
    arguments: tuple[str, ...] = ()
    threads: int | None = None
    root: Path = ROOT


BASE = "tutorial, 1 thread"  # as many as the configs of mnist_lit ask for
CONTENDERS = {
    BASE: Contender("tutorial", threads=1),
    "tutorial": Contender("tutorial"),
    "stock": Contender("stock"),
    "mnist_lit": Contender(),
    "mnist_lit, 2 threads": Contender(arguments=("--num_threads=2",)),
    "mnist_lit, no dashboard": Contender(arguments=NO_DASHBOARD),
    "mnist_lit speed": Contender(arguments=SPEED),
    "mnist_lit speed channels_last": Contender(arguments=(*SPEED, "--model.channels_last=true")),  # for convolutions
    "barebones": Contender("barebones", threads=1),
    "floor": Contender("floor", threads=1),
}
GROWING = BASE, "mnist_lit", "mnist_lit speed"  # those that are followed from size to size
BATCH_SIZES = 16, 64, 256, 1024
IMAGES = 5_000, 50_000, 500_000
REPEATS = 5


def run(
    contender: Contender,
    model: str,
    data: Path,
    images: int,
    folder: Path,
    epochs: int,
    batch_size: int,
    busy: bool = False,
) -> Result:
    """One training run, measured in seconds, microseconds (``step_us``), bytes (``peak_memory``) and processors."""
    if contender.script is not None:
        arguments = ["benchmarks.contenders", contender.script, model, str(data), "clock.json"]
        arguments += [f"--epochs={epochs}", f"--batch_size={batch_size}"]
    else:
        arguments = ["mnist_lit", "fit", "--config", str(contender.root / "configs" / f"{model}.yaml")]
        arguments += [*contender.arguments, f"--trainer.callbacks+={json.dumps(CLOCK)}"]
        arguments += [f"--trainer.max_epochs={epochs}", f"--data.dataset={data}", f"--data.batch_size={batch_size}"]
        arguments += [f"--data.data_dir=data/{contender.root.name}"]  # checkouts do not share their fast copies
    done = start(arguments, folder, root=contender.root, threads=contender.threads, busy=busy)
    pairs = zip(done.moments["epochs"], done.moments["epochs"][1:], strict=False)
    epoch = statistics.median(after - before for before, after in pairs)
    return {
        "epoch": epoch,
        "step_us": epoch / math.ceil(images / batch_size) * 1e6,
        "first_step": done.moments["step"] - done.began,
        "exit": done.ended - done.began,
        "peak_memory": done.moments["peak_memory"],
        "others": max(0.0, done.others - busy),
    }


def resized(splits: Mapping[str, tuple[np.ndarray, np.ndarray]], images: int, path: Path) -> None:
    """A dataset with as many training images, which repeat where there are no more."""
    (x, y), (x_valid, y_valid) = splits["train"], splits["valid"]
    index = np.arange(images) % len(x)
    arrays = {"x_train": x[index], "y_train": y[index], "x_valid": x_valid[:1000], "y_valid": y_valid[:1000]}
    np.savez(path, **arrays)


def table(title: str, rows: dict[str, Result], console: Console) -> None:
    """Prints medians and their spread, with epochs and run times as ratios to the tutorial's."""
    columns = "s/epoch", "us/step", "ratio", "first step", "s to exit", "ratio", "MB"
    printed = Table("contender", *(Column(name, justify="right") for name in columns), title=title)
    for name, row in rows.items():
        base = rows[BASE]
        printed.add_row(
            name + ("*" if row["others"] > BUSY else ""),
            f"{row['epoch']:.2f} ({row['epoch_from']:.2f} to {row['epoch_to']:.2f})",
            f"{row['step_us']:.0f}",
            f"{row['epoch'] / base['epoch']:.2f}",
            f"{row['first_step']:.1f}",
            f"{row['exit']:.1f} ({row['exit_from']:.1f} to {row['exit_to']:.1f})",
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
                base = rows[BASE]["epoch"]
                names = [f"{model}: {name}" for name in rows]
                axis.barh(names, [row["epoch"] / base for row in rows.values()], color=f"C{place}")
                axis.axvline(1, color="black", linewidth=0.8)
                axis.set_xlabel("time of an epoch, the tutorial's loop = 1")
                continue
            sizes = results[panel][model]
            for number, name in enumerate(next(iter(sizes.values()))):
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
    parser.add_argument("--busy", action="store_true", help="only those, idle and beside a process that spins")
    parser.add_argument("--archive", default="data/mnist/mnist.pkl.gz", help="the tutorial's archive")
    parser.add_argument("--before", help="another checkout of mnist_lit, which takes its turns, too")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="beside the tutorial")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", default="benchmarks", help="the folder of results.json and results.png")
    args = parser.parse_args()
    archive = Path(args.archive).resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    if find_spec("matplotlib") is None:
        parser.error("no matplotlib for results.png: pip install -e '.[benchmarks]'")
    contenders = {name: contender for name, contender in CONTENDERS.items() if name in (BASE, *args.only)}
    if args.before:
        contenders["mnist_lit before"] = Contender(root=Path(args.before).resolve())
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "repeats": args.repeats}
    results |= {"epochs": {}, "busy": {}, "batch_size": {}, "images": {}}
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def interleaved(
            model: str,
            chosen: Mapping[str, Contender],
            data: Path,
            images: int,
            epochs: int,
            batch_size: int,
            busy: bool = False,
        ) -> dict[str, Result]:
            each: dict[str, list[Result]] = {name: [] for name in chosen}
            what = f"{model}, batches of {batch_size}, {images:,} images"
            for name in track([*chosen] * args.repeats, what, console=console, transient=True):
                each[name].append(run(chosen[name], model, data, images, folder, epochs, batch_size, busy))
            return {name: medians(measured) for name, measured in each.items()}

        def write() -> None:
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

        if args.busy:
            compared = BASE, "tutorial", "mnist_lit", "mnist_lit before"
            chosen = {name: contender for name, contender in contenders.items() if name in compared}
            for model in MODELS:
                for busy in (False, True):
                    rows = interleaved(model, chosen, archive, 50_000, 2, 64, busy)
                    results["busy" if busy else "epochs"][model] = rows
                    title = f"{model}, {'beside a process that spins' if busy else 'idle'}"
                    table(title, rows, console)
                    write()
            console.print(described(results["machine"]))
            return

        loading: dict[str, list[float]] = {"tutorial": [], "cold": [], "warm": []}
        for _ in track(range(args.repeats), "data", console=console, transient=True):
            shutil.rmtree(folder / "data", ignore_errors=True)
            for name, seconds in loading.items():
                script = "tutorial" if name == "tutorial" else "ready"
                arguments = ["benchmarks.contenders", script, "logistic", str(archive), "clock.json"]
                moments = start([*arguments, "--epochs=0"], folder).moments
                seconds.append(moments["data"] - moments["imported"])
        results["data"] = {name: statistics.median(seconds) for name, seconds in loading.items()}
        line = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in results["data"].items())
        console.print(f"Data ready: {line}")
        imports, code = [], "import lightning.pytorch.cli, time; print(time.time())"
        for _ in range(args.repeats):
            began = time.time()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            imports.append(float(done.stdout) - began)
        results["bare_import"] = statistics.median(imports)
        console.print(f"import lightning.pytorch.cli: {results['bare_import']:.2f} s")

        for model in MODELS:
            chosen = {name: c for name, c in contenders.items() if model == "cnn" or "channels_last" not in name}
            results["epochs"][model] = interleaved(model, chosen, archive, 50_000, 2, 64)
            table(f"{model}, batches of 64, 2 epochs", results["epochs"][model], console)
            write()
        if not args.quick:
            files = {images: folder / f"{images}.npz" for images in IMAGES}
            splits = read_mnist(archive)
            for images, path in files.items():
                resized(splits, images, path)
            growing = {name: contenders[name] for name in GROWING if name in contenders}
            for model in MODELS:
                panels = {
                    "batch_size": {n: (archive, 50_000, 1, n) for n in BATCH_SIZES},
                    "images": {images: (path, images, 1, 64) for images, path in files.items()},
                }
                for panel, sizes in panels.items():
                    results[panel][model] = {}
                    for size, setting in sizes.items():
                        rows = results[panel][model][size] = interleaved(model, growing, *setting)
                        table(f"{model}, {panel} {size:,}", rows, console)
                        write()
        plot(results, output / "results.png")
    console.print(described(results["machine"]))
    console.print(f"Wrote {output / 'results.json'} and {output / 'results.png'}")


if __name__ == "__main__":
    main()
