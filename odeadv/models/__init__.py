"""Networks that can be used as ordinary modules and as fields dx/dt = f(t, x).

``net(images)`` maps images in [0, 1] to logits. ``net.field(images, labels, eta)`` is the same network as an
`odeadv.AdversarialField`, so `odeadv.solve` is its LAD forward pass. `from_module` wraps a network of your own, and
`pretrained` loads a small trained one. The guide is docs/models.md.
"""

from odeadv.models._blocks import BlockNetwork, Bound, bind, from_blocks
from odeadv.models._damping import Damp, Damping, LambdaDamp
from odeadv.models._layers import Stem
from odeadv.models._mlp import MlpBlock, ResidualMlp, residual_mlp
from odeadv.models._network import FieldNetwork, Network, TargetLoss
from odeadv.models._noise import Averaged, Noise, averaged
from odeadv.models._ode import ConvField, OdeNet, ode_net
from odeadv.models._pretrained import pretrained, pretrained_names, pretrained_record
from odeadv.models._refine import Refined, refine
from odeadv.models._registry import build, names
from odeadv.models._resnet import PreActBlock, PreActResNet, preact_resnet, resnet20, resnet56
from odeadv.models._split import from_module

__all__ = [
    "Averaged",
    "BlockNetwork",
    "Bound",
    "ConvField",
    "Damp",
    "Damping",
    "FieldNetwork",
    "LambdaDamp",
    "MlpBlock",
    "Network",
    "Noise",
    "OdeNet",
    "PreActBlock",
    "PreActResNet",
    "Refined",
    "ResidualMlp",
    "Stem",
    "TargetLoss",
    "averaged",
    "bind",
    "build",
    "from_blocks",
    "from_module",
    "names",
    "ode_net",
    "preact_resnet",
    "pretrained",
    "pretrained_names",
    "pretrained_record",
    "refine",
    "residual_mlp",
    "resnet20",
    "resnet56",
]
