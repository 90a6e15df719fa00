"""``python -m benchmarks [--quick | --accuracy]``: times mnist_lit beside what it is compared with.

Every run is a process of its own, the contenders take turns, with another seed in every round, and what is printed
are medians, in brackets the least and the most, and ratios to the first row.
"""

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import ROOT, Result, described, machine, medians, start

EQUAL = "--data.batch_size=64", "--trainer.max_epochs=2"  # as the tutorial
NO_DASHBOARD = "--dashboard.every_n_epochs=0", "--dashboard.gradient_norm=false"
SPEED = ("--config", str(ROOT / "configs" / "overlays" / "speed.yaml"))
QUICK = "tutorial", "stock", "mnist_lit"


def script(name: str, model: str) -> list[str]:
    """A contender in contenders.py."""
    return ["benchmarks.contenders", name, model, "DATA", "SEED"]


def mnist_lit(config: str, *options: str, root: Path = ROOT) -> list[str]:
    """A command of mnist_lit's, with the clock as one more callback; checkouts do not share their fast copies."""
    data = "--data.dataset=DATA", f"--data.data_dir=data/{root.name}", "--seed_everything=SEED"
    clock = '--trainer.callbacks+={"class_path": "benchmarks.contenders.clock", "init_args": {"path": "clock.json"}}'
    return ["mnist_lit", "fit", "--config", str(root / "configs" / f"{config}.yaml"), *options, *data, clock]


def epochs(model: str) -> dict[str, list[str]]:
    """Two epochs of one of the tutorial's models. The configs of mnist_lit ask for one thread, too."""
    contenders = {
        "tutorial": script("tutorial", model),
        "stock": script("stock", model),
        "mnist_lit": mnist_lit(model, *EQUAL),
        "mnist_lit, no dashboard": mnist_lit(model, *EQUAL, *NO_DASHBOARD),
        "mnist_lit speed": mnist_lit(model, *SPEED, *EQUAL),
    }
    if model == "cnn":  # a memory format for convolutions
        contenders["mnist_lit speed channels_last"] = mnist_lit(model, *SPEED, *EQUAL, "--model.channels_last=true")
    return contenders


ACCURACY = {  # to 99 % of the test images
    "recipe": script("recipe", "cnn"),
    "fast.yaml": mnist_lit("fast", "--test_after_fit=true"),
    "accurate.yaml": mnist_lit("accurate", "--test_after_fit=true"),
}


def run(command: list[str], root: Path, data: Path, seed: int, folder: Path) -> Result:
    """One training run: seconds, bytes, and the share of the test images that are right."""
    words = [word.replace("DATA", str(data)).replace("SEED", str(seed)) for word in command]
    moments, seconds = start(words, folder, root)
    return {
        "epoch": statistics.median(after - before for before, after in pairwise(moments["epochs"])),
        "exit": seconds,
        "peak_memory": moments["peak_memory"],
        "accuracy": moments.get("accuracy", float("nan")),
    }


def table(title: str, rows: dict[str, Result]) -> Table:
    """Medians, their spread, and ratios to the first row."""
    columns = "s/epoch", "ratio", "s to exit", "ratio", "MB", "test accuracy"
    printed = Table("contender", *(Column(name, justify="right") for name in columns), title=title)
    base = next(iter(rows.values()))
    for name, row in rows.items():
        cells = []
        for key in ("epoch", "exit"):
            cells.append(f"{row[key]:.2f} ({row[f'{key}_from']:.2f} to {row[f'{key}_to']:.2f})")
            cells.append(f"{row[key] / base[key]:.2f}")
        accuracy = f"{row['accuracy']:.2%} ({row['accuracy_from']:.2%})" if row["accuracy"] > 0 else ""
        printed.add_row(name, *cells, f"{row['peak_memory'] / 1e6:.0f}", accuracy)
    return printed


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--accuracy", action="store_true", help="seconds to 99 % of the test images")
    parser.add_argument("--only", nargs="+", help="of the contenders, by name")
    parser.add_argument("--before", type=Path, help="another checkout of mnist_lit, which takes its turns, too")
    parser.add_argument("--archive", type=Path, default=Path("data/mnist/mnist.pkl.gz"), help="the tutorial's archive")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    archive = args.archive.resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    about, console = machine(), Console(width=160)
    panels = {"accuracy": ACCURACY} if args.accuracy else {model: epochs(model) for model in ("logistic", "cnn")}
    with tempfile.TemporaryDirectory() as folder:
        for title, contenders in panels.items():
            chosen = QUICK if args.quick else args.only or contenders
            commands = {name: (command, ROOT) for name, command in contenders.items() if name in chosen}
            if args.before and not args.accuracy:
                before = args.before.resolve()
                commands["mnist_lit before"] = mnist_lit(title, *EQUAL, root=before), before
            results: dict[str, list[Result]] = {name: [] for name in commands}
            for seed in range(1, args.repeats + 1):
                for name in track(commands, f"{title}, seed {seed}", console=console, transient=True):
                    results[name].append(run(*commands[name], archive, seed, Path(folder)))
            console.print(table(title, {name: medians(measured) for name, measured in results.items()}))
    console.print(described(about))


if __name__ == "__main__":
    main()
