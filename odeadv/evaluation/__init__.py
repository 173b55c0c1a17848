"""Robust accuracy under fixed attack protocols: `evaluate` runs a `Protocol` on a model and returns an `Evaluation`.

Protocols are data (`PROTOCOLS` has the paper's); the attacks' parts come from `odeadv.attacks`, and work that attacks
share is done once. Every attack is scored twice, under names that are never mixed: on its last iterate (the paper's
tables) and worst so far (stricter). Imports torch, `odeadv._state` and `odeadv.attacks`.
"""

from odeadv.evaluation._evaluate import evaluate
from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation._protocols import PROTOCOLS, AttackSpec, Protocol

__all__ = ["PROTOCOLS", "AttackResult", "AttackSpec", "Evaluation", "Protocol", "evaluate"]
