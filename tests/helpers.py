"""Seeded generators, small networks with a batch, and problems with a closed form, for several test modules."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import odeadv
from odeadv.data import load
from odeadv.models import PreActResNet, preact_resnet

EPS = 8 / 255
COMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # what compile_solver needs, torch 2.13


def seeded(seed: int = 0) -> torch.Generator:
    """Return a new CPU generator."""
    return torch.Generator().manual_seed(seed)


def measured_order(error: Callable[[int], float], steps: Sequence[int] = (16, 32, 64)) -> float:
    """Return the slope of log(error) against log(1 / steps), by least squares."""
    logs = [(math.log(1.0 / n), math.log(error(n))) for n in steps]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


# ---- networks with a batch, not trained ----


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a convolutional network for 3x8x8 images and 5 classes, in training mode.

    It has what an attack could disturb: batch norm with running statistics, and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(54, 5),
        ).to(dtype)


def image_batch(dtype: torch.dtype = torch.float64, n: int = 6) -> tuple[Tensor, Tensor]:
    """Return n 3x8x8 images and labels of 5 classes; two images lie on the bounds of the box."""
    images = torch.rand(n, 3, 8, 8, generator=seeded(1), dtype=torch.float64).to(dtype)
    images[0], images[1] = 0.0, 1.0  # the box, not the ball, is their bound
    return images, torch.arange(n) % 5


def small_resnet(
    dtype: torch.dtype = torch.float64,
    depth: int = 14,
    seed: int = 0,
    *,
    width: int = 4,
    num_classes: int = 7,
    labels: Sequence[int] = (0, 1, 2, 3, 6),
    size: int = 16,
    statistics: bool = True,
    **options: object,
) -> tuple[PreActResNet, Tensor, Tensor]:
    """Return a residual network, one image per label, and the labels.

    With ``statistics`` the batch norms have running statistics and weights that evaluation mode would notice.
    """
    generator = seeded(seed)
    net = preact_resnet(depth, width, num_classes, generator=generator, **options).to(dtype)
    for module in net.modules() if statistics else ():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    images = torch.rand(len(labels), 3, size, size, generator=generator, dtype=dtype)
    return net, images, torch.tensor(labels)


# ---- problems with a closed form ----

# dx/dt = LAM x + eta a with L = x^2 / 2. INTEGRAL is the integral of exp(2 LAM (T - t)) over (0, T).
LAM, T = -0.7, 1.5
X0 = torch.tensor([1.3], dtype=torch.float64)
INTEGRAL = (math.exp(2 * LAM * T) - 1) / (2 * LAM)

# dx/dt = A x + eta a, L = x.Qx / 2
A = torch.tensor([[-0.4, 1.1, 0.0], [-0.9, 0.2, 0.5], [0.3, 0.0, -0.8]], dtype=torch.float64)
Q = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
Y0 = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)


def scalar_field(eta: float = 0.3) -> odeadv.AdversarialField:
    """Return dx/dt = LAM x + eta dL/dx with L = x^2 / 2."""
    return odeadv.AdversarialField(lambda t, x: LAM * x, lambda x: 0.5 * (x**2).sum(), eta=eta)


# ---- a network trained on digits ----


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images (n, 1, 8, 8) in [0, 1], with labels."""
    data = load("digits")
    small = (
        functional.avg_pool2d(images.permute(0, 3, 1, 2)[:, :1].float() / 255, 4)
        for images in (data.train_images, data.test_images)
    )
    train, test = small
    return train, data.train_labels, test, data.test_labels


class Small(nn.Module):
    """Conv-BN-ReLU twice, with a pre-activated residual block; 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.norm2 = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x - 0.5)))
        x = x + self.second(torch.relu(self.norm2(x)))
        return self.last(functional.avg_pool2d(x, 2).flatten(1))


@functools.cache
def trained() -> nn.Module:
    """Return `Small`, trained for a few epochs on one-step adversarial examples. Its gradients are honest."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # a forward pass under no_grad may be the first caller
        torch.manual_seed(0)
        net = Small()
        images, labels, _, _ = digits()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(6):
            for part in torch.randperm(len(images)).split(64):
                x, y = images[part], labels[part]
                leaf = x.clone().requires_grad_()
                slope = torch.autograd.grad(functional.cross_entropy(net.eval()(leaf), y), leaf)[0]
                x = (x + EPS * slope.sign()).clamp(0, 1)
                optimizer.zero_grad()
                functional.cross_entropy(net.train()(x), y).backward()
                optimizer.step()
    return net.eval().requires_grad_(False)


def held_out(n: int = 100) -> tuple[Tensor, Tensor]:
    """Return the first ``n`` test images and labels."""
    _, _, images, labels = digits()
    return images[:n], labels[:n]
