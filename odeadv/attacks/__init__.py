"""L-infinity sign-gradient attacks on images in [0, 1]: `fgsm`, `ifgsm`, `pgd`.

An attack is four small parts: where it starts (`_start`), the gradient it follows (`_objective`), the step it takes
and the set it projects to (`_linf`); `_iterates` puts them in a row, lazily, so that a caller may read any iterate of
one run. Models come back as they were: modes, buffers, ``requires_grad`` and ``.grad``.
Imports torch and `odeadv._state` only.
"""

from odeadv.attacks._attacks import fgsm, ifgsm, pgd

__all__ = ["fgsm", "ifgsm", "pgd"]
