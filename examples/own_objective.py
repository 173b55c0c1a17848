"""Your own objective: natural training with label smoothing, usable with every defence and from a configuration.

python examples/own_objective.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from odeadv import data, models
from odeadv.training import Layerwise, Objective, Passed, TrainConfig, train


@dataclass(frozen=True)
class Smoothed(Objective, name="smoothed"):
    """Half of the defended loss, half of the cross-entropy with smoothed labels."""

    smoothing: float = 0.1

    def __call__(self, step):
        """Return the loss to minimise, and the logits for the accuracy."""
        defended = step.defended(step.images)
        logits = step.plain(step.images)
        smooth = F.cross_entropy(logits, step.labels, label_smoothing=self.smoothing)
        return Passed(0.5 * defended.loss + 0.5 * smooth, logits)


def main(epochs=3):
    """Train a small network with the objective and LAD, and print the accuracy and the strength of each epoch."""
    digits = data.load("digits").resized(8)
    net = models.residual_mlp(
        4, 32, image_size=8, mean=digits.mean, std=digits.std, generator=torch.Generator().manual_seed(0)
    )
    config = TrainConfig(
        objective=Smoothed(), defence=Layerwise("lie", eta=5.0), epochs=epochs, milestones=(), lr=0.05, augment="none"
    )
    for epoch in train(net, digits, config).epochs:
        print(f"epoch {epoch.epoch}: accuracy {100 * epoch.accuracy:.1f} %, s = {100 * epoch.strength:.2g} %")


if __name__ == "__main__":
    main()
