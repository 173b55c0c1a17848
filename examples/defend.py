"""Defend your own network: LAD in your own training loop, on handwritten digits.

python examples/defend.py
"""

import torch
from torch import nn

from odeadv import attacks, data, evaluate, models
from odeadv.training import Layerwise


class Residual(nn.Module):
    """A residual layer: x -> x + conv(relu(x))."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        """Return the next state."""
        return x + self.conv(torch.relu(x))


def main(epochs=3):
    """Train on attacked images with LAD-SM and print the robust accuracy."""
    torch.manual_seed(0)
    digits = data.load("digits")
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    net = models.from_blocks(stem, [Residual(8) for _ in range(3)], head)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    defence = Layerwise("strang", eta=5.0)
    batches = data.Batches(
        digits.train_images,
        digits.train_labels,
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    for epoch in range(epochs):
        for images, labels in batches:
            attacked = attacks.fgsm(net, images, labels, eps=8 / 255)
            passed = defence(net, attacked, labels)
            optimizer.zero_grad()
            passed.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {passed.loss.item():.3f}")
    print(evaluate(net, (digits.test_images, digits.test_labels), protocol="table1"))


if __name__ == "__main__":
    main()
