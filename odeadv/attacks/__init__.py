"""Attacks on any module that maps images in [0, 1] to logits, and choosing among their results.

`fgsm`, `ifgsm`, `pgd` and `apgd` follow gradients; `square` only asks for logits; `transfer` attacks other models.

An attack is a few small parts: where it starts (`_start`), the loss and gradient it follows (`_losses`, `_objective`),
the step it takes and the set it projects to (`_linf`, `_l2`), momentum (`_iterates`), and what it returns of what it
tried (`_best`). `_iterates` puts them in a row, lazily, so that a caller may read any iterate of one run. Models come
back as they were: modes, buffers, ``requires_grad`` and ``.grad``, and so does torch's global random state.
Imports torch and `odeadv.support.isolation` only.
"""

from odeadv.attacks._apgd import apgd
from odeadv.attacks._gradient import fgsm, ifgsm, pgd
from odeadv.attacks._square import square
from odeadv.attacks._start import Gaussian
from odeadv.attacks._transfer import transfer, worst_of
from odeadv.attacks.objective import Tally

__all__ = ["Gaussian", "Tally", "apgd", "fgsm", "ifgsm", "pgd", "square", "transfer", "worst_of"]
