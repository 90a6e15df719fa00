"""The tutorial's training loop, rung by rung, by hand: the oracle of the parity tests.

Every rung is a function ``rung(problem, weights) -> Outcome`` that trains from the same initial weights
on the same batches in the same order, and refactors the rung before it as the tutorial does. Nothing
here knows of Lightning or of mnist_lit.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Sampler, TensorDataset

Batches = Iterable[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


class Problem(NamedTuple):
    """What is trained on.

    ``x`` are rows (n, H * W) of floats and ``y`` int64 labels (n,); ``order`` has a permutation of the
    training rows for each epoch; ``device`` is where rung 13 trains.
    """

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    order: list[list[int]]
    lr: float
    momentum: float = 0.0
    bs: int = 64
    size: tuple[int, int] = (28, 28)
    device: str = "cpu"


class Outcome(NamedTuple):
    """Final parameters in PyTorch's own shapes, the loss of every step, validation losses by epoch."""

    weights: list[Tensor]
    losses: list[float]
    valid_losses: list[float]


def outcome_of(model: nn.Module, losses: list[float], valid_losses: Iterable[float] = ()) -> Outcome:
    return Outcome([p.detach().cpu() for p in model.parameters()], losses, list(valid_losses))


# ------------------------------------------------- rungs 1 to 7: the logistic model, without validation


def log_softmax(x: Tensor) -> Tensor:
    return x - x.exp().sum(-1).log().unsqueeze(-1)


def nll(log_probabilities: Tensor, target: Tensor) -> Tensor:
    return -log_probabilities[range(len(target)), target].mean()


def slices(problem: Problem) -> Batches:
    """All batches of all epochs, cut out by hand."""
    for order in problem.order:
        x, y = problem.x_train[order], problem.y_train[order]
        for i in range((len(x) - 1) // problem.bs + 1):
            start, end = i * problem.bs, (i + 1) * problem.bs
            yield x[start:end], y[start:end]


def by_hand(problem: Problem, start: Weights, forward: Callable, loss_func: Callable) -> Outcome:
    weights = start["weight"].t().clone().requires_grad_()  # (H * W, 10)
    bias = start["bias"].clone().requires_grad_()
    losses = []
    for xb, yb in slices(problem):
        loss = loss_func(forward(xb, weights, bias), yb)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            weights -= weights.grad * problem.lr
            bias -= bias.grad * problem.lr
            weights.grad.zero_()
            bias.grad.zero_()
    return Outcome([weights.detach().t(), bias.detach()], losses, [])


def rung_1(problem: Problem, start: Weights) -> Outcome:
    """Tensors only: log_softmax, negative log-likelihood and update written out."""
    return by_hand(problem, start, lambda xb, weights, bias: log_softmax(xb @ weights + bias), nll)


def rung_2(problem: Problem, start: Weights) -> Outcome:
    """F.cross_entropy for both functions."""
    return by_hand(problem, start, lambda xb, weights, bias: xb @ weights + bias, F.cross_entropy)


class LogisticByHand(nn.Module):
    def __init__(self, start: Weights) -> None:
        super().__init__()
        self.weights = nn.Parameter(start["weight"].t().clone())
        self.bias = nn.Parameter(start["bias"].clone())

    def forward(self, xb: Tensor) -> Tensor:
        return xb @ self.weights + self.bias


def set_parameters(model: nn.Module, start: Weights) -> nn.Module:
    """Starts a model from the weights of another one with the same parameters in the same order."""
    model.to(next(iter(start.values())).dtype)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start.values(), strict=True):
            parameter.copy_(value)
    return model


def over_parameters(problem: Problem, model: nn.Module) -> Outcome:
    losses = []
    for xb, yb in slices(problem):
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * problem.lr
            model.zero_grad()
    return outcome_of(model, losses)


def rung_3(problem: Problem, start: Weights) -> Outcome:
    """nn.Module and nn.Parameter; the update runs over parameters()."""
    outcome = over_parameters(problem, LogisticByHand(start))
    return outcome._replace(weights=[outcome.weights[0].t(), outcome.weights[1]])


def rung_4(problem: Problem, start: Weights) -> Outcome:
    """nn.Linear."""
    return over_parameters(problem, set_parameters(nn.Linear(784, 10), start))


def get_model(problem: Problem, start: Weights) -> tuple[nn.Module, optim.Optimizer]:
    model = set_parameters(nn.Linear(784, 10), start)
    return model, optim.SGD(model.parameters(), lr=problem.lr)


def loss_batch(
    model: nn.Module, loss_func: Callable, xb: Tensor, yb: Tensor, opt: optim.Optimizer | None = None
) -> tuple[float, int]:
    loss = loss_func(model(xb), yb)
    if opt is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.item(), len(xb)


def over_batches(problem: Problem, start: Weights, batches: Batches) -> Outcome:
    model, opt = get_model(problem, start)
    losses = [loss_batch(model, F.cross_entropy, xb, yb, opt)[0] for xb, yb in batches]
    return outcome_of(model, losses)


def rung_5(problem: Problem, start: Weights) -> Outcome:
    """optim.SGD."""
    return over_batches(problem, start, slices(problem))


def rung_6(problem: Problem, start: Weights) -> Outcome:
    """TensorDataset: images and labels are cut out together."""
    train_ds, bs = TensorDataset(problem.x_train, problem.y_train), problem.bs
    batches = (train_ds[order[i : i + bs]] for order in problem.order for i in range(0, len(train_ds), bs))
    return over_batches(problem, start, batches)


class Shuffled(Sampler[int]):
    """Stands where ``shuffle=True`` draws a permutation for each epoch, and replays the problem's."""

    def __init__(self, order: list[list[int]]) -> None:
        self.order, self.epoch = order, 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(self.order[self.epoch - 1])


def get_data(problem: Problem) -> tuple[DataLoader, DataLoader]:
    train_ds = TensorDataset(problem.x_train, problem.y_train)
    valid_ds = TensorDataset(problem.x_valid, problem.y_valid)
    train_dl = DataLoader(train_ds, batch_size=problem.bs, sampler=Shuffled(problem.order))
    return train_dl, DataLoader(valid_ds, batch_size=problem.bs * 2)


def rung_7(problem: Problem, start: Weights) -> Outcome:
    """DataLoader: batches come by themselves."""
    train_dl, _ = get_data(problem)
    return over_batches(problem, start, (batch for _ in problem.order for batch in train_dl))


# ---------------------------------------------------------------- rungs 8 to 13: validation and the CNN


def rung_8(problem: Problem, start: Weights) -> Outcome:
    """Shuffled training batches; validation in batches of twice the size, between train() and eval()."""
    model, opt = get_model(problem, start)
    train_dl, valid_dl = get_data(problem)
    losses, valid_losses = [], []
    for _ in problem.order:
        model.train()
        for xb, yb in train_dl:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            # The mean of the batches' means, as the tutorial has it at this rung; the next one weighs them.
            valid_loss = sum(F.cross_entropy(model(xb), yb) for xb, yb in valid_dl)
        valid_losses.append(float(valid_loss) / len(valid_dl))
    return outcome_of(model, losses, valid_losses)


def fit(
    epochs: int, model: nn.Module, loss_func: Callable, opt: optim.Optimizer, train_dl: Any, valid_dl: Any
) -> Outcome:
    losses, valid_losses = [], []
    for _ in range(epochs):
        model.train()
        for xb, yb in train_dl:
            losses.append(loss_batch(model, loss_func, xb, yb, opt)[0])
        model.eval()
        with torch.no_grad():
            each, nums = zip(*[loss_batch(model, loss_func, xb, yb) for xb, yb in valid_dl], strict=True)
        valid_losses.append(float(np.sum(np.multiply(each, nums)) / np.sum(nums)))
    return outcome_of(model, losses, valid_losses)


def rung_9(problem: Problem, start: Weights) -> Outcome:
    """loss_batch, fit and get_data."""
    model, opt = get_model(problem, start)
    return fit(len(problem.order), model, F.cross_entropy, opt, *get_data(problem))


class CNNByHand(nn.Module):
    """Rung 10's network; it takes rows of pixels and makes images of them itself."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(16, 10, kernel_size=3, stride=2, padding=1)

    def forward(self, xb: Tensor) -> Tensor:
        xb = xb.view(-1, 1, *self.size)
        xb = F.relu(self.conv1(xb))
        xb = F.relu(self.conv2(xb))
        xb = F.relu(self.conv3(xb))
        xb = F.avg_pool2d(xb, 4)  # (B, 10, 1, 1)
        return xb.view(-1, xb.size(1))


class Lambda(nn.Module):
    def __init__(self, func: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.func = func

    def forward(self, x: Tensor) -> Tensor:
        return self.func(x)


def cnn_layers(pool: nn.Module, *first: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *first,
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 10, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        pool,
        Lambda(lambda x: x.view(x.size(0), -1)),
    )


class WrappedDataLoader:
    """A data loader whose batches pass through a function."""

    def __init__(self, dl: DataLoader, func: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.dl, self.func = dl, func

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.dl:
            yield self.func(*batch)


def fit_cnn(problem: Problem, model: nn.Module, train_dl: Any, valid_dl: Any) -> Outcome:
    opt = optim.SGD(model.parameters(), lr=problem.lr, momentum=problem.momentum)
    return fit(len(problem.order), model, F.cross_entropy, opt, train_dl, valid_dl)


def rung_10(problem: Problem, start: Weights) -> Outcome:
    """The CNN as a class, with momentum; fit needs no change."""
    return fit_cnn(problem, set_parameters(CNNByHand(problem.size), start), *get_data(problem))


def rung_11(problem: Problem, start: Weights) -> Outcome:
    """nn.Sequential, with Lambda where there is no layer."""
    to_images = Lambda(lambda x: x.view(-1, 1, *problem.size))
    return fit_cnn(problem, set_parameters(cnn_layers(nn.AvgPool2d(4), to_images), start), *get_data(problem))


def fit_images(problem: Problem, model: nn.Module) -> Outcome:
    """Rung 12's loop for any network that takes images."""
    dev = torch.device(problem.device)

    def preprocess(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(-1, 1, *problem.size).to(dev), y.to(dev)

    train_dl, valid_dl = (WrappedDataLoader(dl, preprocess) for dl in get_data(problem))
    return fit_cnn(problem, model.to(dev), train_dl, valid_dl)


def rung_12(problem: Problem, start: Weights) -> Outcome:
    """Images of any size: the reshape moves into the data loader, AdaptiveAvgPool2d takes any grid."""
    return rung_13(problem._replace(device="cpu"), start)


def rung_13(problem: Problem, start: Weights) -> Outcome:
    """Model and batches on a device."""
    return fit_images(problem, set_parameters(cnn_layers(nn.AdaptiveAvgPool2d(1)), start))


LOGISTIC = (rung_1, rung_2, rung_3, rung_4, rung_5, rung_6, rung_7, rung_8, rung_9)
CNN = (rung_10, rung_11, rung_12, rung_13)
