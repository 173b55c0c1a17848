"""Robust accuracy under fixed attack protocols: `evaluate` runs a `Protocol` on a model and returns an `Evaluation`.

A protocol is a list of attacks with their radii. `PROTOCOLS` has the protocols of the paper by name, and a list of
`AttackSpec` is one of your own. An attack has two scores, which are never mixed: its last iterate (the paper's tables),
and the worst of all iterates so far (stricter). `Evaluation.worst_case` counts an example only if the model classifies
it correctly under every attack. Outcomes are kept for every example, so `mcnemar` and `compare` can compare two models
in pairs. The guide is docs/evaluation.md.
"""

from odeadv.evaluation._compare import McNemar, compare, mcnemar
from odeadv.evaluation._evaluate import evaluate
from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation.data import saved_images
from odeadv.evaluation.protocols import PROTOCOLS, AttackSpec, Protocol
from odeadv.support.progress import ProgressLine

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
    "saved_images",
]
