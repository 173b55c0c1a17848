"""Any network of stem, blocks and head as a field: also from another package, with any states and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.fields import Jump, Loss, Operator, Piecewise, Residual
from odeadv.models._network import FieldNetwork, TargetLoss, check_targets, mean_cross_entropy
from odeadv.support.checks import TO_FLOAT, check_loss
from odeadv.support.isolation import check_unmodified, version, without_effects

#: What to do with a network whose skip connections go around blocks, for messages.
PACK = "pack several tensors, such as the skips of a U-Net, into one (docs/models.md, 'What about a U-Net?')"


def from_blocks(
    stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, *, loss: TargetLoss | None = None
) -> BlockNetwork:
    """Return the network head(blocks(stem(inputs))) as a field, with one block per unit of time.

    ``net(inputs)`` is the plain network. ``net.field(inputs, targets, eta)`` is the field of Eq. 7 with dt = 1. A block
    that keeps the shape and dtype of its state is the step x + f(x) with f(x) = block(x) - x. With eta = 0 the solve is
    bit-identical to the plain network. All other blocks are jumps. To find the jumps, the network is run once on the
    first inputs, without gradients and without effect on buffers and random state. It is run again for inputs of
    another shape, except if only the batch size differs.

    Args:
        stem: module from inputs of any kind (images, tokens, vectors) to the first state, floating or complex.
        blocks: modules from state to state, in the order of the network. A block must not write to its input. For a
            layer that needs more arguments see `bind`. The state is one tensor. For a U-Net, whose skips go around
            blocks, docs/models.md shows how to pack several tensors into one.
        head: module from the last state to the output.
        loss: ``loss(output, targets)`` returns a scalar tensor, for example ``torch.nn.functional.mse_loss``. The
            default is the mean cross-entropy of logits (n, classes) with class numbers (n,) or probabilities
            (n, classes).

    Raises:
        TypeError, ValueError: if an argument does not fit. The message names the argument.

    Example:
        >>> stem, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        >>> wrapped = odeadv.models.from_blocks(stem, [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)], head)
        >>> field = wrapped.field(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]), eta=0.1)
        >>> odeadv.solve(field, scheme="lie").output.shape
        torch.Size([5, 3])
    """
    return BlockNetwork(stem, blocks, head, loss=loss)


@dataclass(frozen=True)
class _BlockShapes:
    """The shapes that one run of the network shows.

    Attributes:
        jumps: for each block, True if it changes the shape or dtype of the state.
        output: shape of the output of the head.
    """

    jumps: tuple[bool, ...]
    output: torch.Size


class BlockNetwork(FieldNetwork):
    """A network of any modules as a field. `from_blocks` and `from_module` make it.

    The modules are not copied, so training this network trains the given modules.

    Attributes:
        stem: module from the inputs to the first state.
        blocks: modules from state to state.
        head: module from the last state to the output.
        loss: ``loss(output, targets)``; None for the mean cross-entropy.
        names: names of the blocks in messages.
    """

    blocks: nn.ModuleList
    loss: TargetLoss | None

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        loss: TargetLoss | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        blocks = list(blocks)
        parts = {"stem": stem, **{f"blocks[{n}]": block for n, block in enumerate(blocks)}, "head": head}
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name}: got {type(part).__name__}, expected a torch.nn.Module")
        if len(parts) == 2:
            raise ValueError("blocks: got none, expected at least one")
        if loss is not None:
            check_loss(loss)
        self.stem, self.blocks, self.head, self.loss = stem, nn.ModuleList(blocks), head, loss
        self.names = tuple(
            f"block {n} ({type(block).__name__})" if names is None else names[n] for n, block in enumerate(blocks)
        )
        self.t_span, self.dt = (0.0, float(len(self.blocks))), 1.0
        # Only this flag is set. The modules keep their modes, because a network may have layers frozen in eval mode.
        self.training = self.blocks.training = any(part.training for part in parts.values())
        self._layouts: dict[object, _BlockShapes] = {}

    @property
    def num_classes(self) -> int:  # type: ignore[override]  # known once `field` was called
        """Number of logits, which is the size of the last dimension of the output.

        Raises:
            AttributeError: before the first call of `field`, because the number is not known yet.
        """
        if not self._layouts:
            raise AttributeError("num_classes")
        return next(reversed(self._layouts.values())).output[-1]

    def forward(self, inputs: Any) -> Tensor:
        """Return the output of the plain network for ``inputs``, whatever the stem takes."""
        x = self.stem(inputs)
        for block in self.blocks:
            x = _on(block, inputs)(x)
        return self.readout(inputs)(x)

    def readout(self, inputs: Any) -> Callable[[Tensor], Tensor]:
        """Return the head as a function of the last state, with arguments of `bind` evaluated on ``inputs``."""
        return _on(self.head, inputs)

    def dynamics(self, dt: float, inputs: Any) -> Operator:
        """Return the field as an operator with one piece per block: block k acts on the times [k, k + 1]."""
        pieces = [
            Jump(_on(block, inputs)) if jumps else Residual(_on(block, inputs), name=name)
            for block, jumps, name in zip(self.blocks, self._layout(inputs).jumps, self.names, strict=True)
        ]
        return Piecewise(pieces, range(len(pieces) + 1))

    def default_loss(self, targets: Any, inputs: Any) -> Loss:
        """Return the ``loss`` of the network. If it is None, check the targets and return the mean cross-entropy.

        Raises:
            TypeError, ValueError: if the targets do not fit, or if ``loss`` is None and the shape of the output is not
                (n, classes).
        """
        loss = self.loss
        if loss is not None:
            return lambda output: loss(output, targets)
        output = self._layout(inputs).output
        if len(output) != 2:
            raise ValueError(
                f"loss: got none for a network with outputs of shape {tuple(output)}, expected loss(output, targets); "
                "the default, mean cross-entropy, needs logits (n, classes)"
            )
        check_targets(targets, inputs, output[1])
        return lambda logits: mean_cross_entropy(logits, targets)

    def _layout(self, inputs: Any) -> _BlockShapes:
        """Return the shapes for inputs like ``inputs``. Run the network only for the first inputs of a shape."""
        first = next(self.parameters(), None)
        kind, dtype = ("cpu", None) if first is None else (first.device.type, first.dtype)
        key = (_signature(inputs), torch.is_autocast_enabled(kind), dtype)
        if key not in self._layouts:
            self._layouts[key] = self._look(inputs)
        return self._layouts[key]

    def _look(self, inputs: Any) -> _BlockShapes:
        """Run the network once, without gradients and without side effects, and return its shapes.

        Raises:
            TypeError: if the stem or a block does not return a state.
            ValueError: if a block writes to its state.
        """
        tensors = [*self.parameters(), inputs]
        device = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))
        jumps = []
        with torch.no_grad(), without_effects([self], device):
            try:
                x = self.stem(inputs)
            except RuntimeError as error:
                if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
                    raise TypeError(f"images: got torch.uint8, which the stem refuses ({error}); {TO_FLOAT}") from error
                raise
            if not isinstance(x, Tensor):
                raise TypeError(f"stem: returned {type(x).__name__}, expected a tensor; {PACK}")
            if not (x.is_floating_point() or x.is_complex()):
                raise TypeError(f"stem: returned {x.dtype}, expected a floating or complex state")
            for block, name in zip(self.blocks, self.names, strict=True):
                state = x.clone()  # a block that writes to its state must not write to the caller's inputs
                before = version(state)
                x = _on(block, inputs)(state)
                check_unmodified(name, state, before)
                if not isinstance(x, Tensor):
                    raise TypeError(
                        f"blocks: {name} returned {type(x).__name__}, expected a tensor; wrap it in a module that "
                        f"returns the state alone, or {PACK}"
                    )
                jumps.append((x.shape, x.dtype) != (state.shape, state.dtype))
            output = self.readout(inputs)(x)
            if not isinstance(output, Tensor):
                raise TypeError(f"head: returned {type(output).__name__}, expected a tensor")
        return _BlockShapes(tuple(jumps), output.shape)

    def extra_repr(self) -> str:
        """Return the loss as text, if a loss was given."""
        return "" if self.loss is None or isinstance(self.loss, nn.Module) else f"loss={self.loss!r}"


def bind(module: nn.Module, /, *args: Any, **kwargs: Any) -> Bound:
    """Return ``module`` with fixed further arguments, such as a mask: ``bind(layer, src_mask=mask)(x)``.

    Args:
        module: a layer, which is called as ``module(x, *args, **kwargs)``.
        args: arguments after the state.
        kwargs: arguments by name. A tensor becomes a buffer: it moves with the network, but is not one of its weights.
            A function is called with the inputs of the network in every pass. Use it for a mask that depends on the
            inputs: ``bind(layer, src_key_padding_mask=lambda tokens: tokens == 0)``. It works for blocks and heads.

    Raises:
        TypeError: if ``module`` is not a module.
    """
    return Bound(module, args, kwargs)


class Bound(nn.Module):
    """A module with fixed arguments after the first argument; see `bind`.

    Args:
        module: as for `bind`.
        args: as for `bind`.
        kwargs: as for `bind`.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
        self.module = module
        self.training = module.training
        # Pairs of the name of a buffer ("" for other values) and the value (None for a buffer), see `_keep`.
        self._positions: list[tuple[str, Any]] = [self._keep(f"argument{n}", value) for n, value in enumerate(args, 1)]
        self._names: dict[str, tuple[str, Any]] = {name: self._keep(name, value) for name, value in kwargs.items()}

    def _keep(self, name: str, value: Any) -> tuple[str, Any]:
        if not isinstance(value, Tensor):
            return "", value
        self.register_buffer(name, value, persistent=False)
        return name, None

    def _value(self, kept: tuple[str, Any], inputs: tuple[Any, ...]) -> Any:
        name, value = kept
        if name:
            return getattr(self, name)
        if callable(value) and not isinstance(value, nn.Module):
            if not inputs:
                raise TypeError("bind: got a function of the network's inputs, expected a call within from_blocks")
            return value(*inputs)
        return value

    def on(self, *inputs: Any) -> Callable[[Tensor], Any]:
        """Return the module with its fixed arguments. Arguments that are functions are evaluated on ``inputs``."""
        args = [self._value(kept, inputs) for kept in self._positions]
        kwargs = {name: self._value(kept, inputs) for name, kept in self._names.items()}
        if not args:
            return functools.partial(self.module, **kwargs)
        return lambda x: self.module(x, *args, **kwargs)

    def forward(self, x: Tensor) -> Any:
        """Return ``module(x, ...)`` for the state ``x`` with the fixed arguments."""
        return self.on()(x)


def _on(module: nn.Module, inputs: Any) -> Callable[[Tensor], Any]:
    """Return ``module`` as a function of the state, for these inputs of the network."""
    return module.on(inputs) if isinstance(module, Bound) else module


def _signature(inputs: Any) -> object:
    """Return shapes (without the batch size), dtypes and structure of ``inputs``. They decide the shapes of states."""
    if isinstance(inputs, Tensor):
        return inputs.shape[1:], inputs.dtype
    if isinstance(inputs, dict):
        return tuple((name, _signature(value)) for name, value in inputs.items())
    if isinstance(inputs, list | tuple):
        return tuple(_signature(value) for value in inputs)
    return type(inputs)
