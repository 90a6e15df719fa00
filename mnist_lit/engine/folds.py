"""``folds``: cross-validation. Every fold is a normal run of ``fit``, and a table has the mean over them."""

import argparse
import statistics

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from mnist_lit.engine.cli import run
from mnist_lit.engine.options import with_config
from mnist_lit.engine.project import Project


def main(args: list[str], project: Project) -> None:
    """Train once for each fold, each time validated on another one, and print what was reached."""
    parser = argparse.ArgumentParser(
        prog=project.command("folds"),
        description="Cross-validation: fit once for each fold. All other options, such as --config, go to every fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--data.folds", dest="folds", type=int, required=True, help="number of folds")
    parser.add_argument("--run_name", default="folds", help="of the runs, each with its fold (default: folds)")
    known, fit = parser.parse_known_args(args)
    found: dict[str, list[float]] = {}
    for fold in range(known.folds):
        options = (f"--data.folds={known.folds}", f"--data.fold={fold}", f"--run_name={known.run_name}-{fold}")
        metrics = run(project, with_config(["fit", *fit, *options], project)).trainer.callback_metrics
        for name, value in metrics.items():
            if not name.startswith("train/"):
                found.setdefault(name, []).append(value.item())
    columns = [*(f"fold {fold}" for fold in range(known.folds)), "mean", "deviation"]
    table = Table("metric", *(Column(name, justify="right") for name in columns), title="after the last epoch")
    for name, values in found.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        table.add_row(escape(name), *(f"{value:.4f}" for value in (*values, statistics.mean(values), deviation)))
    Console().print(table)
