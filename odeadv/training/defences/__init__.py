"""Defences: ways to solve the forward pass that is trained on. One file each; none knows the objectives."""

from odeadv.training._step import Defence
from odeadv.training.defences._layerwise import Layerwise
from odeadv.training.defences._undefended import Undefended

__all__ = ["Defence", "Layerwise", "Undefended"]
