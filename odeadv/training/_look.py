"""Checks of training steps whose results are read many steps later, so that a step does not wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from odeadv.training._checkpoint import load_optimizer, optimizer_tensors


class Flags:
    """The results of the checks of all steps since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[Tensor] = []

    def __len__(self) -> int:
        """Return the number of steps that have not been read."""
        return len(self._steps)

    def add(self, checks: list[Tensor]) -> None:
        """Add the check results of a step, 0-d bool tensors on any device."""
        self._steps.append(torch.stack([check.detach().to(self._device) for check in checks]).all())

    def failed(self) -> Tensor:
        """Return one int64 per step, 1 if one of its checks has failed; forget these steps."""
        failed = (~torch.stack(self._steps)).to(torch.int64)
        self._steps = []
        return failed


class Snapshot:
    """A copy of the present weights, buffers, optimiser, random state and sums of the loop.

    Args:
        net: the network.
        optimizer: the optimiser of its parameters.
        sums: other tensors to copy, by name; a value may be None.
        done: number of finished steps of the epoch.
        scaling: state of the gradient scaling of fp16.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: dict[str, Tensor | None],
        done: int,
        scaling: dict[str, Any],
    ) -> None:
        self.done, self.scaling = done, dict(scaling)
        self.sums = {name: None if value is None else value.clone() for name, value in sums.items()}
        self._net = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self._optimizer = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
        self._device = next(net.parameters()).device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def put_back(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the network, the optimiser and the random state."""
        net.load_state_dict(self._net)
        optimizer.state.clear()
        load_optimizer(optimizer, self._optimizer)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
