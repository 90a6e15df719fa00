"""``python -m benchmarks.processes``: images per second with one process and with two, and what a step costs.

Two processes (DDP, gloo) have one thread each. An epoch is the same 50,000 images; the second of two counts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.measure import BUSY, CLOCK, ROOT, Result, described, machine, medians, start

IMAGES = 50_000
CONFIGS = {"fast": 256, "cnn": 64}  # and their batch sizes
DDP = str(ROOT / "configs" / "overlays" / "ddp.yaml")
TWO = ["--config", DDP, "--trainer.accelerator=cpu", "--trainer.devices=2", "--num_threads=1"]
# By name: the batch size per process as a share of the config's, and arguments.
CONTENDERS: dict[str, tuple[float, list[str]]] = {
    "one process, one thread": (1, ["--num_threads=1"]),
    "one process, two threads": (1, ["--num_threads=2"]),
    "two processes, the same batch in all": (0.5, TWO),
    "two processes, the same batch in each": (1, TWO),
}


def run(config: str, batch_size: int, name: str, data: Path, folder: Path) -> Result:
    """Images per second, and microseconds of a step."""
    share, arguments = CONTENDERS[name]
    size = int(batch_size * share)
    command = ["mnist_lit", "fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), *arguments]
    command += [f"--trainer.callbacks+={json.dumps(CLOCK)}", f"--data.dataset={data}", f"--data.batch_size={size}"]
    done = start([*command, "--trainer.max_epochs=2"], folder)
    _, first, second = done.moments["epochs"]
    steps = math.ceil(IMAGES / (size * (2 if arguments is TWO else 1)))
    return {
        "images": IMAGES / (second - first),
        "step_us": (second - first) / steps * 1e6,
        "others": done.others,
    }


def main() -> None:
    """Prints medians, their spread, and ratios to one process with one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--archive", default="data/mnist/mnist.pkl.gz", help="the tutorial's archive")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    archive = Path(options.archive).resolve()
    if not archive.exists():
        parser.error(f"{archive}: no such file; name the tutorial's archive with --archive")
    about, console = machine(), Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        for config in options.only:
            results: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
            for name in track([*CONTENDERS] * options.repeats, config, console=console, transient=True):
                results[name].append(run(config, CONFIGS[config], name, archive, Path(temporary)))
            columns = ("images/s", "from", "to", "ratio", "us/step")
            table = Table(f"{config}.yaml", *(Column(name, justify="right") for name in columns))
            base = medians(results["one process, one thread"])["images"]
            for name, measured in results.items():
                row = medians(measured)
                speeds = [f"{row[key]:,.0f}" for key in ("images", "images_from", "images_to")]
                star = "*" if row["others"] > BUSY else ""
                table.add_row(name + star, *speeds, f"{row['images'] / base:.2f}", f"{row['step_us']:,.0f}")
            console.print(table)
    console.print(f"medians of {options.repeats}; {described(about)}")


if __name__ == "__main__":
    main()
