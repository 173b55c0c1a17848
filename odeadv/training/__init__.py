"""Training networks with a defence: `TrainConfig` says how, `train` does it.

A defence is nothing but the way the forward pass is solved: the loss trained on is that of
``odeadv.solve(net.field(images, labels, eta), scheme=...)``. Uses the solver, models and data.
"""

from odeadv.training._config import TrainConfig
from odeadv.training._train import EpochResult, TrainingDiverged, train

__all__ = ["EpochResult", "TrainConfig", "TrainingDiverged", "train"]
