"""Robust accuracy under fixed attack protocols: `evaluate` runs a `Protocol` on a model and returns an `Evaluation`.

Protocols are data (`PROTOCOLS` has the paper's); the attacks come from `odeadv.attacks`, and work that they share is
done once. Every attack is scored under two names that are never mixed: on its last iterate (the paper's tables) and
worst so far (stricter). Outcomes are kept for every example, so that `mcnemar` and `compare` can set two models
side by side. Imports torch, numpy, `odeadv.support.isolation` and `odeadv.attacks`; pyautoattack when used.
"""

from odeadv.evaluation._compare import McNemar, compare, mcnemar
from odeadv.evaluation._evaluate import evaluate
from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation._progress import ProgressLine
from odeadv.evaluation.protocols import PROTOCOLS, AttackSpec, Protocol

__all__ = [
    "PROTOCOLS",
    "AttackResult",
    "AttackSpec",
    "Evaluation",
    "McNemar",
    "ProgressLine",
    "Protocol",
    "compare",
    "evaluate",
    "mcnemar",
]
