"""Sanity checks of a robustness evaluation: `audit` runs a checklist and returns an `Audit`.

Each line of it is a `Check`: pass, fail or not applicable, with its figures and a sentence on what failure means. An
audit is written as JSON and as a page of Markdown with plots. The checks are those of Carlini et al. 2019 ("On
Evaluating Adversarial Robustness"), Athalye et al. 2018 ("Obfuscated Gradients Give a False Sense of Security") and
Croce and Hein 2020. This package imports `odeadv.evaluation`, `odeadv.attacks`, `odeadv.data` and `odeadv.support`, and
matplotlib when it plots.
"""

from odeadv.audit._audit import audit
from odeadv.audit._report import Audit, Check

__all__ = ["Audit", "Check", "audit"]
