"""``python -m benchmarks.accuracy``: seconds to 99 % of MNIST's test images.

Every run is a process of its own that trains on the 50,000 training images and is tested on the 10,000 test
images; the contenders take turns, with another seed in every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import BUSY, CLOCK, ROOT, Result, described, machine, medians, start

CONTENDERS = {
    "the published recipe": ["recipe", "--epochs=1", "--batch_size=256"],
    "fast.yaml": "fast",
    "accurate.yaml": "accurate",
}


def run(name: str, seed: int, data: Path, folder: Path) -> Result:
    """Seconds of training and from start to exit, and the share of the test images that are right."""
    contender = CONTENDERS[name]
    if isinstance(contender, str):
        arguments = ["mnist_lit", "fit", "--config", str(ROOT / "configs" / f"{contender}.yaml")]
        arguments += [f"--trainer.callbacks+={json.dumps(CLOCK)}", "--test_after_fit=true"]
        arguments += [f"--data.dataset={data}", f"--seed_everything={seed}"]
    else:
        script, *options = contender
        arguments = ["benchmarks.contenders", script, "cnn", str(data), "clock.json", *options, f"--seed={seed}"]
    done = start(arguments, folder)
    return {
        "accuracy": done.moments["accuracy"],
        "training": done.moments["last_step"] - done.moments["epochs"][0],
        "exit": done.ended - done.began,
        "others": done.others,
    }


def main() -> None:
    """Prints accuracies, seconds, and ratios to the published recipe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--archive", default="data/mnist/mnist.pkl.gz", help="the tutorial's archive")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS)[:-1], choices=CONTENDERS, help="all but the last")
    options = parser.parse_args()
    archive = Path(options.archive).resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    about, console = machine(), Console(width=120)
    results: dict[str, list[Result]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as temporary:
        for round_ in range(options.repeats):
            for name in track(options.only, f"seed {round_ + 1}", console=console, transient=True):
                results[name].append(run(name, round_ + 1, archive, Path(temporary)))
    columns = ("test accuracy", "lowest", "s training", "ratio", "s to exit", "ratio")
    table = Table("", *(Column(name, justify="right") for name in columns))
    rows = {name: medians(measured) for name, measured in results.items()}
    base = next(iter(rows.values()))
    for name, row in rows.items():
        mean = statistics.mean(result["accuracy"] for result in results[name])
        cells = [f"{mean:.2%}", f"{row['accuracy_from']:.2%}"]
        for key in ("training", "exit"):
            cells.append(f"{row[key]:.1f} ({row[f'{key}_from']:.1f} to {row[f'{key}_to']:.1f})")
            cells.append(f"{row[key] / base[key]:.2f}")
        table.add_row(name + ("*" if row["others"] > BUSY else ""), *cells)
    console.print(table)
    console.print(f"means of {options.repeats} seeds; {described(about)}")


if __name__ == "__main__":
    main()
