"""Attacks on any module that maps images in [0, 1] to logits, and the choice among attacked images.

`fgsm`, `ifgsm`, `pgd`, `apgd` and `apgd_t` follow gradients. `square` needs logits only. `transfer` attacks other
models, and `worst_of` chooses for each image the version that fools the model. Every attack is one call,
``pgd(net, images, labels, eps=8 / 255)``. It returns attacked images and leaves the model as it was: modes, buffers,
``requires_grad`` and ``.grad``. The guide is docs/attacks.md.
"""

from odeadv.attacks._apgd import apgd, apgd_t
from odeadv.attacks._gradient import fgsm, ifgsm, pgd
from odeadv.attacks._square import square
from odeadv.attacks._start import Gaussian
from odeadv.attacks._transfer import transfer, worst_of
from odeadv.attacks.objective import Tally

__all__ = ["Gaussian", "Tally", "apgd", "apgd_t", "fgsm", "ifgsm", "pgd", "square", "transfer", "worst_of"]
