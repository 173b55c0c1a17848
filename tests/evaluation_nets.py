"""A small network trained on digits, shared by the tests of the evaluation and of the audit."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv.data import load

EPS = 8 / 255


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) in [0, 1], with labels."""
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
    """`Small`, trained for a few epochs on one-step adversarial examples: honest, and somewhat robust."""
    with torch.random.fork_rng(devices=[]):
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
    """The first ``n`` test images and labels."""
    _, _, images, labels = digits()
    return images[:n], labels[:n]
