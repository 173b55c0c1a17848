"""Sanity checks of a robustness evaluation: `audit` runs a checklist and returns an `Audit`.

Each line of the checklist is a `Check`: pass, fail or not applicable. It has figures and a sentence that explains what
a failure means. An audit can be written as JSON and as a page of Markdown with plots. The checks come from Carlini et
al. 2019 ("On Evaluating Adversarial Robustness"), Athalye et al. 2018 ("Obfuscated Gradients Give a False Sense of
Security") and Croce and Hein 2020. This package imports `odeadv.evaluation`, `odeadv.attacks`, `odeadv.data` and
`odeadv.support`. It imports matplotlib when it plots.
"""

from odeadv.audit._audit import audit
from odeadv.audit._report import Audit, Check

__all__ = ["Audit", "Check", "audit"]
