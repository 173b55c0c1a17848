"""Training: freely combined objectives, defences and networks, with checkpoints that resume bit for bit.

`train` trains a network as a `TrainConfig` says. An objective is the loss that a step minimises: `Natural`, `Pgd`,
`Trades`, `Mart`. A defence is the forward pass of this loss: `Layerwise` is LAD and LAD-SM, and `Undefended` is the
network itself. Every objective combines with every defence. A defence also works in a loop of your own
(docs/tutorials/own_loop.md). The guide is docs/training.md.
"""

from odeadv.training._checkpoint import CheckpointWarning
from odeadv.training._config import TrainConfig
from odeadv.training._defences import Layerwise, Penalty, PerturbationKind, Undefended
from odeadv.training._distributed import make_fabric
from odeadv.training._loop import TrainingDiverged, TrainingStopped
from odeadv.training._objectives import Awp, Mart, Natural, Pgd, Trades
from odeadv.training._results import EpochResult, TrainResult, plot_curves
from odeadv.training._step import Defence, Draws, Objective, Passed, Step
from odeadv.training._strength import Strength
from odeadv.training._train import Logger, load_weights, train, weights_digest

__all__ = [
    "Awp",
    "CheckpointWarning",
    "Defence",
    "Draws",
    "EpochResult",
    "Layerwise",
    "Logger",
    "Mart",
    "Natural",
    "Objective",
    "Passed",
    "Penalty",
    "PerturbationKind",
    "Pgd",
    "Step",
    "Strength",
    "Trades",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingStopped",
    "Undefended",
    "load_weights",
    "make_fabric",
    "plot_curves",
    "train",
    "weights_digest",
]
