"""Sanity checks of a robustness evaluation: `audit` runs a checklist and returns an `Audit`.

Use it before you believe a high accuracy under attack. Each line of the checklist is a `Check`: pass, fail or not
applicable, with its figures and a sentence that explains what a failure means. ``print(report)`` shows the list, and
``report.write(folder)`` writes a page with plots and a JSON file. The checks come from Carlini et al. 2019 ("On
Evaluating Adversarial Robustness"), Athalye et al. 2018 ("Obfuscated Gradients Give a False Sense of Security") and
Croce and Hein 2020. The guide is docs/evaluation.md; docs/tutorials/measure.md finds a fake defence.
"""

from odeadv.audit._audit import audit
from odeadv.audit._report import Audit, Check

__all__ = ["Audit", "Check", "audit"]
