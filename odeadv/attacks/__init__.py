"""Attacks on any module that maps images in [0, 1] to logits, and the choice among attacked images.

`fgsm`, `ifgsm`, `pgd`, `apgd` and `apgd_t` follow gradients. `square` only needs logits. `transfer` attacks other
models, and `worst_of` chooses among attacked images.

An attack is made of small parts: a start (`_start`), a loss with its gradient (`objective`, `_losses`), and steps with
projections (`balls`). `Best` in `_setting` chooses among all tried images. `_setting` also checks the arguments. It
restores the model's modes, buffers, ``requires_grad`` and ``.grad`` afterwards, and torch's global random state. This
package imports torch and `odeadv.support`.
"""

from odeadv.attacks._apgd import apgd, apgd_t
from odeadv.attacks._gradient import fgsm, ifgsm, pgd
from odeadv.attacks._square import square
from odeadv.attacks._start import Gaussian
from odeadv.attacks._transfer import transfer, worst_of
from odeadv.attacks.objective import Tally

__all__ = ["Gaussian", "Tally", "apgd", "apgd_t", "fgsm", "ifgsm", "pgd", "square", "transfer", "worst_of"]
