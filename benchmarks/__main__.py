"""``python -m benchmarks [--quick | --busy]``: times mnist_lit beside what it is compared with.

Every run is a process of its own, the contenders take turns, and what is printed are medians, their spread
and their ratio to the tutorial's script with one thread. Rows with a star were disturbed by other programs.
Prints tables and writes ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import BUSY, CLOCK, ROOT, Result, described, machine, medians, start

MODELS = "logistic", "cnn"
NO_DASHBOARD = ("--dashboard.every_n_epochs=0", "--dashboard.gradient_norm=false")
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
QUICK = BASE, "stock", "mnist_lit"
BATCH_SIZE = 64


def run(contender: Contender, model: str, data: Path, folder: Path, busy: bool) -> Result:
    """One training run, measured in seconds, microseconds (``step_us``), bytes (``peak_memory``) and processors."""
    if contender.script is not None:
        arguments = ["benchmarks.contenders", contender.script, model, str(data), "clock.json"]
        arguments += ["--epochs=2", f"--batch_size={BATCH_SIZE}"]
    else:
        arguments = ["mnist_lit", "fit", "--config", str(contender.root / "configs" / f"{model}.yaml")]
        arguments += [*contender.arguments, f"--trainer.callbacks+={json.dumps(CLOCK)}"]
        arguments += ["--trainer.max_epochs=2", f"--data.dataset={data}", f"--data.batch_size={BATCH_SIZE}"]
        arguments += [f"--data.data_dir=data/{contender.root.name}"]  # checkouts do not share their fast copies
    done = start(arguments, folder, root=contender.root, threads=contender.threads, busy=busy)
    pairs = zip(done.moments["epochs"], done.moments["epochs"][1:], strict=False)
    epoch = statistics.median(after - before for before, after in pairs)
    return {
        "epoch": epoch,
        "step_us": epoch / math.ceil(50_000 / BATCH_SIZE) * 1e6,
        "first_step": done.moments["step"] - done.began,
        "exit": done.ended - done.began,
        "peak_memory": done.moments["peak_memory"],
        "others": max(0.0, done.others - busy),
    }


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


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--busy", action="store_true", help="only those, idle and beside a process that spins")
    parser.add_argument("--archive", default="data/mnist/mnist.pkl.gz", help="the tutorial's archive")
    parser.add_argument("--before", help="another checkout of mnist_lit, which takes its turns, too")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="beside the tutorial")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results.json", help="the file to write")
    args = parser.parse_args()
    archive = Path(args.archive).resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    names = QUICK if args.quick or args.busy else (BASE, *args.only)
    contenders = {name: contender for name, contender in CONTENDERS.items() if name in names}
    if args.before:
        contenders["mnist_lit before"] = Contender(root=Path(args.before).resolve())
    results: dict[str, Any] = {"machine": machine(), "repeats": args.repeats, "epochs": {}, "busy": {}}
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            chosen = [name for name in contenders if model == "cnn" or "channels_last" not in name]
            for busy in (False, True) if args.busy else (False,):
                each: dict[str, list[Result]] = {name: [] for name in chosen}
                title = f"{model}, batches of {BATCH_SIZE}, 2 epochs{', beside a process that spins' if busy else ''}"
                for name in track(chosen * args.repeats, title, console=console, transient=True):
                    each[name].append(run(contenders[name], model, archive, Path(folder), busy))
                rows = {name: medians(measured) for name, measured in each.items()}
                results["busy" if busy else "epochs"][model] = rows
                table(title, rows, console)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(described(results["machine"]))
    console.print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
