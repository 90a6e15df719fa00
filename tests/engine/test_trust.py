"""Run folders as they may come from anybody: nothing in them does harm, and every end is one message."""

import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import CONFIGS, RUN, Run
from hostile import Calls

NUMBER = 200
FOREIGN_CLASSES = (
    "subprocess.getoutput", "os.system", "torch.fx.symbolic_trace", "builtins.exec", "shutil.rmtree",
    "lightning.pytorch.loggers.CSVLogger", "pathlib.Path", "my_missing.Model",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    cli_in(folder, "fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, "--trainer.max_epochs=1")
    return folder


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a nest of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in (leaves(value, (*path, key)) or [(*path, key)])]


def put(tree: Any, place: tuple[Any, ...], value: Any, rename: bool = False) -> None:
    for key in place[:-1]:
        tree = tree[key]
    if rename and isinstance(tree, dict):
        tree[f"{place[-1]}_"] = tree.pop(place[-1])
    else:
        tree[place[-1]] = value


class Mutations:
    """Changes of a run's folder, drawn at random.

    Args:
        run: the folder, which is changed.
        canary: a folder outside, which everything foreign points to.
    """

    def __init__(self, rng: random.Random, run: Path, canary: Path) -> None:
        self.rng, self.run, self.canary = rng, run, canary
        self.foreign = [str(canary), str(canary / "file"), f"{run}/../../../canary/file", "/dev/zero", "s3://bucket/x"]

    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / self.rng.choice(["last.ckpt", "best.ckpt"])

    def flipped_bits(self) -> None:
        path = self.checkpoint()
        content = bytearray(path.read_bytes())
        for _ in range(self.rng.choice([1, 8, 500])):
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)

    def renamed_keys(self) -> None:
        self.changed(rename=True)

    def changed(self, rename: bool = False) -> None:
        """Values in a checkpoint of other types, sizes and signs."""
        path = self.checkpoint()
        content = torch.load(path, weights_only=True)
        values = [None, "x", -1, 1e308, math.nan, [], {}, 10**30, torch.zeros(0), torch.zeros(3, dtype=torch.int8)]
        for key in self.rng.sample(list(content), 3):  # the random states have most of the values
            place = self.rng.choice([place for place in leaves(content) if place[0] == key] or [(key,)])
            put(content, place, self.rng.choice(values), rename)
        torch.save(content, path)

    def foreign_paths(self) -> None:
        """Every text in a checkpoint names what is outside, as do the files that it says it has kept."""
        path = self.checkpoint()
        content = torch.load(path, weights_only=True)
        for place in leaves(content):
            value = content
            for key in place:
                value = value[key]
            if isinstance(value, str) and place[-1] != "pytorch-lightning_version" and place[0] != "optimizer_states":
                put(content, place, self.rng.choice(self.foreign))
        for state in content["callbacks"].values():
            if "best_model_path" in state:
                kept = {self.rng.choice(self.foreign): torch.tensor(99.0), str(self.canary): torch.tensor(98.0)}
                state |= {
                    "best_k_models": kept,
                    "kth_best_model_path": str(self.canary),
                    "best_model_path": str(self.canary),
                }
                state |= {"last_model_path": str(self.canary / "file"), "dirpath": str(self.canary)}
        torch.save(content, path)

    def code_in_checkpoint(self) -> None:
        path = self.checkpoint()
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"]["x"] = Calls(os.system, f"touch {self.canary}/ran")
        torch.save(content, path)
        config = yaml.safe_load((self.run / "config.yaml").read_text())
        (self.run / "config.yaml").write_text(yaml.safe_dump(config | {"weights_only": False}))

    def config(self) -> None:
        """A config that names foreign classes and places, or whose sections are something else."""
        config = yaml.safe_load((self.run / "config.yaml").read_text())
        put(config, (self.rng.choice(list(config)),), self.rng.choice([None, "x", 3, [], ["x"], {}, {"class_path": 3}]))
        for place in self.rng.sample(leaves(config), 4):
            put(config, place, self.rng.choice([*self.foreign, *FOREIGN_CLASSES, -1, None, [], "${oc.env:HOME}"]))
        call = {"class_path": self.rng.choice(FOREIGN_CLASSES), "init_args": {"cmd": f"touch {self.canary}/ran"}}
        config[self.rng.choice(["model", "data"])] = call
        if isinstance(config["trainer"], dict):
            config["trainer"][self.rng.choice(["callbacks", "logger"])] = call
        (self.run / "config.yaml").write_text(yaml.safe_dump(config))

    def links(self) -> None:
        """Files and folders replaced by links to what is outside, or pipes, but for those that the command names."""
        named = self.run / "config.yaml", self.checkpoint().parent / "best.ckpt", self.checkpoint().parent / "last.ckpt"
        path = self.rng.choice([path for path in self.run.rglob("*") if path not in named])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if target := self.rng.choice([self.canary, self.canary / "file", None]):
            path.symlink_to(target)
        else:
            os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.matrix
def test_mutated_run_folders_do_no_harm(cli_in: Run, good: Path, small: Path, tmp_path: Path) -> None:
    canary, log = tmp_path / "canary", tmp_path / "log"
    bad = []
    kinds = ["flipped_bits", "renamed_keys", "changed", "foreign_paths", "code_in_checkpoint", "config", "links"]
    for number in range(NUMBER):
        folder = tmp_path / f"{number}"
        shutil.copytree(good, folder)
        shutil.rmtree(canary, ignore_errors=True)
        canary.mkdir()
        (canary / "file").write_text("mine")
        run, kind = folder / RUN, kinds[number % len(kinds)]
        # For each folder its own, because the bits that are flipped depend on the sizes of files.
        getattr(Mutations(random.Random(number), run, canary), kind)()
        resume = ("--config", good / RUN / "config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2")
        best = ("--ckpt_path", run / "checkpoints" / "best.ckpt")
        command = [("fit", *resume), ("test", *best), ("predict", *best), ("export", *best)][number % 4]
        environment = {"WATCH": f"{canary}:{log}", "TORCHINDUCTOR_CACHE_DIR": str(folder)}
        done = cli_in(folder, *command, env=environment, ok=None)
        harm = log.read_text() if log.exists() else ""
        if [(path.name, path.read_text()) for path in canary.iterdir()] != [("file", "mine")]:
            harm += f"{sorted(canary.iterdir())}\n"
        one_message = done.returncode == 0 or (done.stderr.count("error:") == 1 and "Traceback" not in done.stderr)
        if harm or not one_message:
            bad.append(f"{number}: {kind}, {command[0]}: exit code {done.returncode}\n{harm}{done.stderr[-1500:]}")
        log.unlink(missing_ok=True)
        shutil.rmtree(folder)
    assert not bad, "\n\n".join(bad)
