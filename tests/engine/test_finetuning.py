"""Transfer learning: networks and weights for other images and classes, and a start with the head alone."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import CONFIGS, OVERLAYS, RUN, Run, assert_one_message, assert_same, checkpoint
from nets import Wide
from plain import Model, Weights, fit
from test_resume import TWO_PROCESSES
from torch import nn

from mnist_lit.engine import FineTuning, adapt

LAST = RUN / "checkpoints" / "last.ckpt"
QUICK = (
    *("--dashboard.every_n_epochs=0", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=4"),
    *("--data.batch_size=64", "--last_checkpoint.every_n_train_steps=5"),
)
FAST = ("fit", "--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=3", *QUICK)
FINETUNE = ("--config", OVERLAYS / "finetune.yaml")
WIDE = ("fit", "--config", CONFIGS / "cnn.yaml", "--model=Classifier", "--model.net=nets.wide", *QUICK)
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def five(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images with five classes."""
    arrays = dict(np.load(small))
    path = tmp_path_factory.mktemp("five") / "five.npz"
    np.savez(path, **{name: values // 2 if name[0] == "y" else values for name, values in arrays.items()})
    return path


@pytest.fixture(scope="session")
def old(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of FastCNN for ten classes."""
    folder = tmp_path_factory.mktemp("old")
    cli_in(folder, *FAST, "--data.dataset", small, "--trainer.max_epochs=1")
    return folder / LAST


# --------------------------------------------------------------------------------------------------- networks


def test_network_is_adapted_in_place() -> None:
    net = Wide().double()
    net.conv1.weight.requires_grad_(False)
    before, images = net.conv1.weight.clone(), torch.rand(2, 1, 28, 28, dtype=torch.double)
    expected = net.conv1(images.expand(2, 3, 28, 28))
    assert adapt(net, channels=1, num_classes=5) == ["conv1: 3 -> 1 channels", "fc: 20 -> 5 classes"]
    torch.testing.assert_close(net.conv1.weight, before.sum(1, keepdim=True))
    torch.testing.assert_close(net.conv1(images), expected)  # a grey image gets the response that it got
    assert not net.conv1.weight.requires_grad
    assert net.fc.weight.requires_grad
    assert net(images).shape == (2, 5)
    assert adapt(net, channels=4, num_classes=5) == ["conv1: 1 -> 4 channels"]
    torch.testing.assert_close(net.conv1(images.expand(2, 4, 28, 28)), expected)


def test_network_that_fits_is_left_alone() -> None:
    net = Wide()
    weights = list(net.parameters())
    assert adapt(net, channels=3, num_classes=20) == []
    assert all(one is other for one, other in zip(net.parameters(), weights, strict=True))
    assert adapt(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(5)), 3, 7) == []


def test_head_may_be_a_convolution_and_groups_become_one() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(2, 1, 9, 9)
    expected = net[0](images.expand(2, 4, 9, 9))
    assert adapt(net, 1, 3) == ["0: 4 -> 1 channels", "1: 20 -> 3 classes"]
    torch.testing.assert_close(net[0](images), expected)
    assert net(images).shape == (2, 3)


@slow
def test_network_by_function_is_adapted_and_used(cli: Run, five: Path, tmp_path: Path) -> None:
    done = cli(*WIDE, "--data.dataset", five, "--trainer.max_epochs=1")
    assert done.stderr.count("Wide was adapted to the data: conv1: 3 -> 1 channels, fc: 20 -> 5 classes") == 1
    config = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["net"] == {"class_path": "nets.wide", "init_args": {"width": 8}}
    assert "channels" not in config["model"]["init_args"]
    for command in ("test", "predict"):
        cli(command, "--ckpt_path", LAST)
    assert "Wrote" in cli("export", "--format=pt2", "--ckpt_path", LAST).stdout
    assert "nets.wide" in cli(*WIDE, "--data.dataset", five, "--print_config").stdout


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("kind", "prefix"), [("pth", "module."), ("old", ""), ("nested", "backbone."), ("safetensors", "")]
)
def test_plain_file_of_weights(cli: Run, five: Path, tmp_path: Path, kind: str, prefix: str) -> None:
    """Those that fit are taken, the first convolution's adapted, and the rest listed."""
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    weights = Wide().state_dict()
    named = {prefix + name: weight for name, weight in weights.items()}
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file(named, path)
    else:
        content = {"state_dict": named} if kind == "nested" else named
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    frozen = ("--model.lr=1e-30", "--model.momentum=0", "--trainer.max_epochs=1")
    command = (*WIDE, "--data.dataset", five, f"--init_from={path}", *frozen)
    if kind == "old":
        assert_one_message(cli(*command, ok=False), "net.conv1.weight ((8, 3, 3, 3) there", "--init_strict=false")
        assert not (tmp_path / LAST).exists()
    done = cli(*command, "--init_strict=false")
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("Started from the weights of"))
    assert "net.conv1.weight from 3 to 1 channels" in said
    assert "net.fc.weight ((20, 128) there, (5, 128) here)" in said
    assert "bn1" not in said
    (last,) = tmp_path.rglob("last.ckpt")
    state = checkpoint(last)["state_dict"]
    torch.testing.assert_close(state["net.conv1.weight"], weights["conv1.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(state["net.bn1.weight"], weights["bn1.weight"])


class Calls:
    def __reduce__(self):
        return sys.exit, (3,)


def test_file_that_asks_for_code_is_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    for zipped, reason in ((True, "weights.pth holds sys.exit"), (False, "cannot be used as a checkpoint")):
        torch.save({"a": Calls()}, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
        refused = cli(*FAST, "--data.dataset", small, "--init_from=weights.pth", ok=False)
        assert_one_message(refused, "weights.pth", reason)


# --------------------------------------------------------------------------------------------------- training


def test_head_is_trained_alone_at_first(tmp_path: Path) -> None:
    model, weights, before = Model(), Weights(), dict(Model().state_dict())
    model.net[1].bias.requires_grad_(False)
    fit(model, tmp_path, FineTuning(1), weights)
    for epoch, state in weights.steps:
        same = {name for name, value in state.items() if torch.equal(value, before[name])}
        assert same == ({name for name in before if "net.4" not in name} if epoch == 0 else {"net.1.bias"}), epoch
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["net.1.bias"]
    assert all(module.training for module in model.modules())
    last = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, tmp_path, max_epochs=1)  # nothing of the callback is left
    assert all(not torch.equal(last[name], value) for name, value in model.state_dict().items() if name != "net.1.bias")


@pytest.mark.matrix
@slow
def test_two_processes(cli: Run, five: Path, old: Path, tmp_path: Path) -> None:
    """After the unfreezing they still agree, and so does what they have frozen before."""
    command = (*FAST, *FINETUNE, f"--init_from={old}", "--data.dataset", five)
    assert "find_unused_parameters=True" in cli(*command, *TWO_PROCESSES, ok=False, fork=False).stderr
    strategy = "--trainer.strategy=ddp_find_unused_parameters_true"
    for _ in range(2):
        cli(*command, *TWO_PROCESSES, strategy, fork=False)
    one, other = (checkpoint(path) for path in tmp_path.glob("lightning_logs/*/checkpoints/last.ckpt"))
    assert_same(one["state_dict"], other["state_dict"])
    assert not torch.equal(one["state_dict"]["net.0.weight"], checkpoint(old)["state_dict"]["net.0.weight"])


# ---------------------------------------------------------------------------------------- torchvision and timm


@slow
@pytest.mark.parametrize(
    "net",
    [
        ("torchvision.models.resnet18",),
        ("timm.models.resnet18",),
        ("timm.create_model", "--model.net.model_name=mobilenetv3_small_050"),
    ],
    ids=lambda net: net[0],
)
def test_network_of_a_library(cli: Run, five: Path, net: tuple[str, ...]) -> None:
    try:
        import_module(net[0].partition(".")[0])
    except Exception as error:  # a wheel for another torch raises RuntimeError
        pytest.skip(f"needs the extra [vision]: {error}")
    command = ("fit", "--model=Classifier", f"--model.net={net[0]}", *net[1:], *QUICK, "--trainer.max_epochs=1")
    done = cli(*command, "--data.dataset", five, "--trainer.limit_train_batches=3")
    assert "3 -> 1 channels" in done.stderr
    assert "1000 -> 5 classes" in done.stderr
    cli("test", "--ckpt_path", LAST)
    assert "which takes batches of images (1, 28, 28)" in cli("export", "--format=pt2", "--ckpt_path", LAST).stdout
