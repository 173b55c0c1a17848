"""Objectives: what a training step minimises (Appendix B). One file each; none knows the defences."""

from odeadv.training._step import Objective
from odeadv.training.objectives._natural import Natural
from odeadv.training.objectives._pgd import Pgd
from odeadv.training.objectives._trades import Trades

__all__ = ["Natural", "Objective", "Pgd", "Trades"]
