"""No defence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from odeadv.models import Network
from odeadv.solver._solve import solve
from odeadv.training._step import Defence, Draws, Passed


@dataclass(frozen=True)
class Undefended(Defence, name="none"):
    """The network as it is: Eq. 6, solved without a costate."""

    active = False

    def __call__(self, net: Network, images: Tensor, labels: Tensor, *, share: float, draws: Draws) -> Passed:
        """Loss and logits of the plain pass."""
        solution = solve(net.field(images, labels), **net.solve_options)
        assert solution.loss is not None
        assert solution.output is not None
        return Passed(solution.loss, solution.output)
