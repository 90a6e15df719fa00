"""Nothing was lost on the way from the tutorial's hand-written loop to Lightning.

Each rung of ``tutorial.py`` trains from the weights and on the batches of a run of mnist_lit, and is
compared with the rung below it; the last rung is that run.
"""

from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import tutorial
from common import CONFIGS, RUN, Run, assert_same, checkpoint
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from recorder import Recorder
from test_resume import TWO_PROCESSES
from torch import Tensor, nn
from tutorial import Outcome, Problem, Weights

from mnist_lit import CNN, Classifier, Logistic, MNISTDataModule

EPOCHS = 2
MODELS = {"logistic": (Logistic, {"lr": 0.5}), "cnn": (CNN, {"lr": 0.1, "momentum": 0.9})}


def data_module(dataset: str, data_dir: Path, batch_size: int = 64) -> MNISTDataModule:
    torch.manual_seed(1)  # of which the data module takes the order of the images
    return MNISTDataModule(dataset, data_dir=str(data_dir), batch_size=batch_size)


def train(model: LightningModule, data: MNISTDataModule, *callbacks: Callback, **settings) -> Recorder:
    """``Trainer.fit`` for two epochs, with nothing switched off but what writes files."""
    recorder = Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1} | quiet | settings
    Trainer(**settings, callbacks=[*callbacks, recorder]).fit(model, datamodule=data)
    return recorder


def problem_of(data: MNISTDataModule, recorder: Recorder, lr: float, momentum: float = 0.0, **other) -> Problem:
    (x_train, y_train), (x_valid, y_valid) = (data.source.datasets[name].tensors for name in ("train", "valid"))
    rows = [x.flatten(1) / 256 for x in (x_train, x_valid)]
    size = tuple(x_train.shape[2:])
    return Problem(rows[0], y_train, rows[1], y_valid, recorder.order, lr, momentum, size=size, **other)


def start_of(recorder: Recorder) -> Weights:
    return {name.rsplit(".", 1)[-1] if len(recorder.start) == 2 else name: w for name, w in recorder.start.items()}


def trained(model: CNN, data: MNISTDataModule, **settings) -> tuple[Recorder, Problem, Weights]:
    """A CNN after two epochs, and what the oracle has to train from."""
    recorder = train(model, data, **settings)
    return recorder, problem_of(data, recorder, 0.1, 0.9), start_of(recorder)


def in_float64(problem: Problem, start: Weights) -> tuple[Problem, Weights]:
    wide = {name: weight.double() for name, weight in start.items()}
    return problem._replace(x_train=problem.x_train.double(), x_valid=problem.x_valid.double()), wide


def distance(one: Outcome, other: Outcome) -> float:
    """The largest difference in any parameter."""
    pairs = zip(one.weights, other.weights, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def same_bits(one: Outcome, other: Outcome) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    return same and one.losses == other.losses


def assert_parity(recorder: Recorder, oracle: Outcome) -> None:
    """Every image seen once an epoch; every parameter and every step's loss bit for bit; the validation
    loss of every epoch to 1e-6.
    """
    assert recorder.saw_every_image_once_an_epoch
    assert same_bits(recorder.outcome, oracle)
    assert recorder.outcome.valid_losses == pytest.approx(oracle.valid_losses, rel=1e-6, abs=0)


# ---------------------------------------------------------------------------------------- the ladder


@pytest.fixture(scope="module", params=["small", pytest.param("mnist", marks=[pytest.mark.mnist, pytest.mark.slow])])
def data(request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory) -> MNISTDataModule:
    """A dataset; no number of images is divisible by its batch size, so the last batches are shorter."""
    if request.param == "small":
        module = data_module(str(small), tmp_path_factory.mktemp("data"))
    else:
        module = data_module("mnist", request.getfixturevalue("mnist_dir"))
    module.prepare_data()
    module.setup("fit")
    assert all(len(targets) % 64 for _, targets in module.source.splits.values())
    return module


class Ladder:
    """The rungs of one model on one dataset; each is trained when it is asked for, and once."""

    def __init__(self, name: str, data: MNISTDataModule) -> None:
        make, settings = MODELS[name]
        seed_everything(1)
        recorder = train(make(**settings), data)
        self.lightning, self.start = recorder, start_of(recorder)
        self.problem = problem_of(data, recorder, **settings)
        self.outcome = cache(lambda rung: rung(self.problem, self.start))
        self.in_float64 = cache(lambda rung: rung(*in_float64(self.problem, self.start)))


@pytest.fixture(scope="module")
def ladders(data: MNISTDataModule):
    return cache(lambda name: Ladder(name, data))


RUNGS = [("logistic", rung) for rung in tutorial.LOGISTIC] + [("cnn", rung) for rung in tutorial.CNN]
# The rungs that change the arithmetic, and how. All others do the same operations in the same order.
ROUNDED = {
    tutorial.rung_2: "the logarithm of the softmax is fused and shifted by the largest score",
    tutorial.rung_4: "the weights are transposed, for which some processors have another kernel",
    tutorial.rung_12: "the mean over the last grid is summed in another order",
}


@pytest.mark.parametrize(("model", "rung"), RUNGS, ids=lambda value: getattr(value, "__name__", value))
def test_rung_changes_nothing(ladders, model: str, rung) -> None:
    ladder: Ladder = ladders(model)
    outcome = ladder.outcome(rung)
    if rung in (tutorial.rung_1, tutorial.rung_10):
        # The first rung of a model has none below it; it must have learnt something.
        assert sum(outcome.losses[-10:]) < sum(outcome.losses[:10])
        return
    rungs = [below for of, below in RUNGS if of == model]
    below_it = rungs[rungs.index(rung) - 1]
    below = ladder.outcome(below_it)
    if rung in ROUNDED:
        # Both rungs round one and the same real computation, and training amplifies what rounding does to
        # the first step, for the CNN until nothing is left to compare. In float64 there is: it rounds by
        # 2**-29 of what float32 does. How far rounding takes a run is what the rung below shows in float32
        # against itself in float64. Two roundings are at most two such distances apart, and a factor of
        # 4 allows for one of them being lucky.
        wide, wide_below = ladder.in_float64(rung), ladder.in_float64(below_it)
        apart = distance(wide, wide_below)
        assert apart <= 8 * 2**-29 * distance(below, wide_below)
        assert apart > 0 or rung is tutorial.rung_4  # not every processor has another kernel
        assert wide.losses == pytest.approx(wide_below.losses, rel=1e-6)
    else:
        assert same_bits(outcome, below)
        if below.valid_losses and rung is not tutorial.rung_9:
            assert outcome.valid_losses == below.valid_losses


@pytest.mark.parametrize(("model", "oracle"), [("logistic", tutorial.rung_9), ("cnn", tutorial.rung_13)])
def test_rung_14_lightning_is_the_tutorial_bit_for_bit(ladders, model: str, oracle) -> None:
    assert_parity(ladders(model).lightning, ladders(model).outcome(oracle))


# ------------------------------------------------------------------------------ through the command line

RECORD = ("--trainer.callbacks+=recorder.Recorder", "--trainer.callbacks.path=recorded.pt")


@pytest.mark.parametrize(
    ("model", "oracle"),
    [pytest.param("logistic", tutorial.rung_9, marks=pytest.mark.slow), ("cnn", tutorial.rung_12)],
)
def test_command_line_is_the_tutorial_bit_for_bit(cli: Run, small: Path, tmp_path: Path, model: str, oracle) -> None:
    """The config as it is shipped, in a process of its own, compared by its checkpoint."""
    cli("fit", "--config", CONFIGS / f"{model}.yaml", *RECORD, "--data.dataset", small)
    recorder = Recorder.load(tmp_path / "recorded.pt")
    data = data_module(str(small), tmp_path / "data")
    data.setup("fit")
    outcome = oracle(problem_of(data, recorder, **MODELS[model][1]), start_of(recorder))
    assert_parity(recorder, outcome)
    assert_same(list(checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["state_dict"].values()), outcome.weights)


# ------------------------------------------------------------------------------------ tests of the test


class UnweightedValidation(Classifier):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/loss", nn.functional.cross_entropy(self(images), labels), batch_size=1)


FAULTS = {
    "none": {},
    "eval mode in training": {"callback": LambdaCallback(on_train_epoch_start=lambda _, net: net.eval())},
    "train mode in validation": {"callback": LambdaCallback(on_validation_epoch_start=lambda _, net: net.train())},
    "a batch skipped": {"limit_train_batches": 15},
    "a learning rate off by 1e-6": {"lr": 0.1 + 1e-6},
    "a validation mean that is not weighted": {"module": UnweightedValidation},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_goes_red_for(small: Path, tmp_path: Path, fault: str) -> None:
    """With a network that behaves differently in training and evaluation."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
    start = deepcopy(net)
    settings = {"module": Classifier, "lr": 0.1, "callback": Callback()} | FAULTS[fault]
    make, lr, callback = (settings.pop(name) for name in ("module", "lr", "callback"))
    module = data_module(str(small), tmp_path)
    recorder = train(make(net, lr, 0.9), module, callback, **settings)
    outcome = tutorial.fit_images(problem_of(module, recorder, 0.1, 0.9), start)
    with nullcontext() if fault == "none" else pytest.raises(AssertionError):
        assert_parity(recorder, outcome)


# ------------------------------------------------------------------------------------------------- setups


def npz_of(small: Path, path: Path, n: int, size: tuple[int, int] = (28, 28)) -> str:
    """The small dataset's first n training images (and 300 others) in another size."""
    with np.load(small) as arrays:
        resized = {name: torch.from_numpy(arrays[name][:n]) for name in arrays}
    for name in ("x_train", "x_valid", "x_test"):
        pixels = nn.functional.interpolate(resized[name][:, None].float(), size, mode="bilinear")
        resized[name] = pixels[:, 0].round().to(torch.uint8)
    np.savez(path, **{name: array.numpy() for name, array in resized.items()})
    return str(path)


@pytest.mark.parametrize(
    ("size", "options"),
    [((20, 20), {}), ((40, 36), {}), ((28, 28), {"steps_per_execution": 8}), ((28, 28), {"channels_last": True})],
    ids=str,
)
def test_cnn_is_the_tutorial_bit_for_bit(small: Path, tmp_path: Path, size: tuple[int, int], options: dict) -> None:
    """With images of other sizes, several steps in one, and the tutorial's network in another memory format."""
    module = data_module(npz_of(small, tmp_path / "sized.npz", 1000, size), tmp_path)
    recorder, problem, start = trained(CNN(**options), module)
    assert problem.size == size
    network = tutorial.set_parameters(tutorial.cnn_layers(nn.AdaptiveAvgPool2d(1)), start)
    if "channels_last" in options:
        network.to(memory_format=torch.channels_last)
    assert_parity(recorder, tutorial.fit_images(problem, network))


@pytest.fixture
def even(small: Path, tmp_path: Path) -> str:
    """960 images: 15 whole batches of 64. A last batch of 32 + 8 would weigh the 8 like the 32."""
    return npz_of(small, tmp_path / "even.npz", 960)


def rounding_of(problem: Problem, start: Weights) -> tuple[Outcome, float]:
    """The oracle, and the distance that any order of the same float32 operations may end from it.

    As on the ladder: eight times what the oracle is off from itself in float64.
    """
    outcome = tutorial.rung_12(problem, start)
    return outcome, 8 * distance(outcome, tutorial.rung_12(*in_float64(problem, start)))


def test_two_half_batches_are_one(even: str, tmp_path: Path) -> None:
    """Tolerance: the rounding of float32 sums in another order."""
    module = data_module(even, tmp_path, batch_size=32)
    recorder, problem, start = trained(CNN(), module, accumulate_grad_batches=2)
    outcome, tolerance = rounding_of(problem, start)
    assert 0 < distance(recorder.outcome, outcome) <= tolerance


@pytest.mark.gpu
def test_gpu_is_the_tutorial_up_to_rounding(even: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerance: the same; TF32 is switched off."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recorder, problem, start = trained(CNN(), data_module(even, tmp_path), accelerator="gpu")
    outcome, tolerance = rounding_of(problem, start)
    on_gpu = tutorial.rung_13(problem._replace(device="cuda"), start)
    assert max(distance(recorder.outcome, other) for other in (outcome, on_gpu)) <= tolerance


@pytest.mark.slow
def test_two_processes_are_one(cli: Run, even: str, tmp_path: Path) -> None:
    """DDP on gloo, 2 x 32 images a step. Tolerance: the rounding of float32 sums in another order."""
    settings = ("--data.dataset", even, "--data.batch_size=32", "--trainer.log_every_n_steps=5", *RECORD)
    cli("fit", "--config", CONFIGS / "cnn.yaml", *TWO_PROCESSES, *settings, fork=False)
    recorder, other = (Recorder.load(tmp_path / f"recorded.pt{rank}") for rank in ("", ".1"))
    assert same_bits(recorder.outcome, other.outcome._replace(losses=recorder.outcome.losses))
    for epoch, (ours, theirs) in enumerate(zip(recorder.order, other.order, strict=True)):
        steps = [ours[i : i + 32] + theirs[i : i + 32] for i in range(0, 480, 32)]
        recorder.order[epoch] = [index for step in steps for index in step]
        assert sorted(recorder.order[epoch]) == list(range(960))
    module = data_module(even, tmp_path / "data")
    module.setup("fit")
    outcome, tolerance = rounding_of(problem_of(module, recorder, 0.1, 0.9), start_of(recorder))
    assert 0 < distance(recorder.outcome, outcome) <= tolerance
    assert recorder.outcome.valid_losses == pytest.approx(outcome.valid_losses, rel=1e-5)


def test_bf16_mixed_follows_within_its_precision(even: str, tmp_path: Path) -> None:
    """Tolerance: a bfloat16 keeps 8 bits, so each of the 8 layers rounds by up to 2**-9 of a value. The first
    loss may be off by 8 * 2**-9 of itself; later ones drift, and the validation loss stays within 5 %.
    """
    recorder, problem, start = trained(CNN(), data_module(even, tmp_path), precision="bf16-mixed")
    outcome = tutorial.rung_12(problem, start)
    assert recorder.outcome.losses != outcome.losses
    assert recorder.outcome.losses[0] == pytest.approx(outcome.losses[0], rel=8 * 2**-9)
    assert recorder.outcome.valid_losses == pytest.approx(outcome.valid_losses, rel=0.05)
