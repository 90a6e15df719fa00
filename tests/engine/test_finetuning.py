"""Transfer learning: networks and weights for other images and classes, and a start with the head alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import CONFIGS, OVERLAYS, RUN, Run, assert_one_message, assert_same, checkpoint
from interrupt import signal_at
from nets import Wide
from plain import Model, Weights, fit
from test_resume import TWO_PROCESSES
from torch import nn

from mnist_lit.engine.errors import UserError
from mnist_lit.engine.finetuning import FineTuning, adapt, to_channels

LAST = RUN / "checkpoints" / "last.ckpt"
QUICK = (
    *("--dashboard.every_n_epochs=0", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=4"),
    *("--data.batch_size=64", "--last_checkpoint.every_n_train_steps=5"),
)
FAST = ("fit", "--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=3", *QUICK)
FINETUNE = ("--config", OVERLAYS / "finetune.yaml")
CALLBACK = "--trainer.callbacks+=mnist_lit.engine.FineTuning"
WIDE = ("fit", "--config", CONFIGS / "cnn.yaml", "--model=Classifier", "--model.net=nets.wide", *QUICK)
slow, matrix = pytest.mark.slow, pytest.mark.matrix


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
    weights, state, random = list(net.parameters()), dict(net.state_dict()), torch.get_rng_state()
    assert adapt(net, channels=3, num_classes=20) == []
    assert all(one is other for one, other in zip(net.parameters(), weights, strict=True))
    assert_same(dict(net.state_dict()), state)
    assert torch.equal(torch.get_rng_state(), random)


def test_head_may_be_a_convolution_and_groups_become_one() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(2, 1, 9, 9)
    expected = net[0](images.expand(2, 4, 9, 9))
    assert adapt(net, 1, 3) == ["0: 4 -> 1 channels", "1: 20 -> 3 classes"]
    torch.testing.assert_close(net[0](images), expected)
    assert net(images).shape == (2, 3)


@pytest.mark.parametrize("net", [nn.Flatten(), nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(5))])
def test_nothing_to_adapt(net: nn.Module) -> None:
    assert adapt(net, 3, 7) == []


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


def save(path: Path, **more: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    weights = Wide().state_dict()
    torch.save(weights, path, **more)
    return weights


@pytest.mark.parametrize(
    ("kind", "prefix"), [("pth", ""), ("pth", "module."), ("old", ""), ("nested", "backbone."), ("safetensors", "")]
)
def test_plain_file_of_weights(cli: Run, five: Path, tmp_path: Path, kind: str, prefix: str) -> None:
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    weights = save(path)
    named = {prefix + name: weight for name, weight in weights.items()}
    if kind == "safetensors":
        pytest.importorskip("safetensors", reason="needs safetensors").torch.save_file(named, path)
    else:
        content = {"state_dict": named} if kind == "nested" else named
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    frozen = ("--model.lr=1e-30", "--model.momentum=0", "--trainer.max_epochs=1")
    done = cli(*WIDE, "--data.dataset", five, f"--init_from={path}", "--init_strict=false", *frozen)
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("Started from the weights of"))
    assert "net.conv1.weight from 3 to 1 channels" in said
    assert "net.fc.weight ((20, 128) there, (5, 128) here)" in said
    assert "bn1" not in said
    state = checkpoint(tmp_path / LAST)["state_dict"]
    torch.testing.assert_close(state["net.conv1.weight"], to_channels(weights["conv1.weight"], 1))
    torch.testing.assert_close(state["net.bn1.weight"], weights["bn1.weight"])


@pytest.mark.parametrize(
    ("command", "strict", "parts"),
    [
        (WIDE, "true", ("net.conv1.weight ((8, 3, 3, 3) there, (8, 1, 3, 3) here)", "--init_strict=false")),
        (FAST, "false", ("none of its weights fits FastCNN", "conv1.weight, bn1.weight", "net.0.weight")),
    ],
    ids=["some", "none"],
)
def test_weights_that_do_not_fit_are_refused(
    cli: Run, five: Path, tmp_path: Path, command: tuple, strict: str, parts: tuple[str, ...]
) -> None:
    save(tmp_path / "weights.pth")
    refused = cli(*command, "--data.dataset", five, "--init_from=weights.pth", f"--init_strict={strict}", ok=False)
    assert_one_message(refused, "--init_from=weights.pth", *parts)
    assert not (tmp_path / LAST).exists()


class Calls:
    def __reduce__(self):
        return sys.exit, (3,)


@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=slow)])
def test_file_that_asks_for_code_or_holds_no_weights(cli: Run, small: Path, tmp_path: Path, zipped: bool) -> None:
    code = "weights.pth holds sys.exit" if zipped else "cannot be used as a checkpoint"
    for content, reason in (({"a": Calls()}, code), ({"a": 1}, "no state dict")):
        torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
        refused = cli(*FAST, "--data.dataset", small, "--init_from=weights.pth", ok=False)
        assert_one_message(refused, "weights.pth", reason)


# --------------------------------------------------------------------------------------------------- training


class Groups(Model):
    """What the callback stands for: two groups of parameters.

    Args:
        kind: of the optimizer.
        factor: of the learning rate of everything but the head; None for one group.
    """

    def __init__(self, kind: str, factor: float | None) -> None:
        super().__init__()
        self.kind, self.factor = kind, factor

    def configure_optimizers(self):
        head = set(self.net[-1].parameters())
        groups = [{"params": list(head)}, {"params": [p for p in self.parameters() if p not in head]}]
        rates = [0.02, 0.02 * self.factor] if self.factor else 0.02
        params = groups if self.factor else self.parameters()
        options = {"momentum": 0.9, "weight_decay": 0.01} if self.kind == "SGD" else {}
        optimizer = getattr(torch.optim, self.kind)(params, lr=0.02, **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=8, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("factor", [0.3, 2.0])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_rest_is_trained_as_with_a_learning_rate_of_its_own(tmp_path: Path, kind: str, factor: float) -> None:
    tuned, groups, plain = Groups(kind, None), Groups(kind, factor), Groups(kind, None)
    fit(tuned, tmp_path, FineTuning(0, factor))
    fit(groups, tmp_path)
    fit(plain, tmp_path)
    for name, value in groups.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert (plain.net[0].weight - groups.net[0].weight).abs().max() > 1e-3


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


def test_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute `fc`"):
        fit(Model(), tmp_path, FineTuning(head="net.fc"))
    model = Model()
    model.net = nn.BatchNorm1d(3)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"finds no head in Model; .* option head"):
        fit(model, tmp_path, FineTuning())


@slow
def test_resuming_with_other_options_is_refused_and_without_the_callback_warned_of(cli: Run, small: Path) -> None:
    command = (*FAST, "--data.dataset", small)
    cli(*command, CALLBACK, *signal_at("SIGTERM", "on_train_batch_end", 8), ok=False)
    other = cli(*command, CALLBACK, "--trainer.callbacks.lr_factor=0.5", "--ckpt_path=last", ok=False)
    assert_one_message(other, "FineTuning.lr_factor=0.5 (0.1 in the checkpoint)")
    assert "add the following callbacks: ['FineTuning']" in cli(*command, "--ckpt_path=last").stderr


# ---------------------------------------------------------------------------------------- torchvision and timm


@pytest.fixture(scope="module")
def vision() -> None:
    for name in ("torchvision", "timm"):
        try:
            __import__(name)
        except Exception as error:  # a wheel for another torch raises RuntimeError
            pytest.skip(f"needs the extra [vision]: {error}")


@slow
@pytest.mark.usefixtures("vision")
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
    command = ("fit", "--model=Classifier", f"--model.net={net[0]}", *net[1:], *QUICK, "--trainer.max_epochs=1")
    done = cli(*command, "--data.dataset", five, "--trainer.limit_train_batches=3")
    assert "3 -> 1 channels" in done.stderr
    assert "1000 -> 5 classes" in done.stderr
    cli("test", "--ckpt_path", LAST)
    assert "which takes batches of images (1, 28, 28)" in cli("export", "--format=pt2", "--ckpt_path", LAST).stdout
