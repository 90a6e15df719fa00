"""Transfer learning: networks and weights for other images and classes, and a start with the head alone."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import CONFIGS, LAST, RUN, Run, assert_one_message, checkpoint
from hostile import Calls
from my_net import Wide
from plain import Model, Weights, fit
from torch import nn

from mnist_lit.engine import FineTuning, adapt

QUICK = (
    *("--dashboard.every_n_epochs=0", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=4"),
    *("--data.batch_size=64", "--last_checkpoint.every_n_train_steps=5"),
)
FAST = ("fit", "--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=3", *QUICK)
WIDE = ("fit", "--config", CONFIGS / "cnn.yaml", "--model=Classifier", "--model.net=my_net.wide", *QUICK)
slow = pytest.mark.slow


@pytest.fixture(scope="session")
def five(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images with five classes."""
    arrays = dict(np.load(small))
    path = tmp_path_factory.mktemp("five") / "five.npz"
    np.savez(path, **{name: values // 2 if name[0] == "y" else values for name, values in arrays.items()})
    return path


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


def test_network_that_fits_is_left_alone_and_a_head_may_be_a_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weights, images = list(net.parameters()), torch.rand(2, 1, 9, 9)
    assert adapt(net, channels=4, num_classes=20) == []
    assert all(one is other for one, other in zip(net.parameters(), weights, strict=True))
    assert adapt(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(5)), 3, 7) == []
    expected = net[0](images.expand(2, 4, 9, 9))
    assert adapt(net, 1, 3) == ["0: 4 -> 1 channels", "1: 20 -> 3 classes"]  # groups become one
    torch.testing.assert_close(net[0](images), expected)
    assert net(images).shape == (2, 3)


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("old", "module."), *(pytest.param(*case, marks=slow) for case in (("nested", "backbone."), ("safetensors", "")))],
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


def test_file_that_asks_for_code_is_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    for zipped, reason in ((True, "weights.pth holds sys.exit"), (False, "cannot be used as a checkpoint")):
        torch.save({"a": Calls(sys.exit, 3)}, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
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


# -------------------------------------------------------------------------------------------------- libraries


@slow
@pytest.mark.parametrize(
    ("net", "classes"),
    [
        ("my_net.wide", 20),  # is there, and made by a function like those
        ("torchvision.models.resnet18", 1000),
        ("timm.create_model --model.net.model_name=mobilenetv3_small_050", 1000),
    ],
)
def test_network_of_a_library(cli: Run, five: Path, tmp_path: Path, net: str, classes: int) -> None:
    # A wheel for another torch raises RuntimeError.
    pytest.importorskip(net.partition(".")[0], reason="needs the extra [vision]", exc_type=(ImportError, RuntimeError))
    command = ("fit", "--model=Classifier", *f"--model.net={net}".split(), *QUICK, "--trainer.max_epochs=1")
    done = cli(*command, "--data.dataset", five, "--trainer.limit_train_batches=3")
    (adapted,) = (line for line in done.stderr.splitlines() if " was adapted to the data: " in line)
    assert "3 -> 1 channels" in adapted
    assert f"{classes} -> 5 classes" in adapted
    config = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    assert config["model"]["init_args"]["net"]["class_path"] == net.partition(" ")[0]
    for command in ("test", "predict"):
        cli(command, "--ckpt_path", LAST)
    assert "which takes batches of images (1, 28, 28)" in cli("export", "--format=pt2", "--ckpt_path", LAST).stdout
