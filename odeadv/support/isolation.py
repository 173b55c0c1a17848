"""Run a user's modules without side effects: modes, buffers and random state are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odeadv.support.checks import choice

Mode = Literal["eval", "train", "unchanged"]
T = TypeVar("T")
_in_segment: ContextVar[bool] = ContextVar("in_segment", default=False)


@contextlib.contextmanager
def untouched(*modules: nn.Module, mode: Mode = "unchanged") -> Iterator[None]:
    """Run the body, then restore the modes and buffers of ``modules``, also after an exception.

    Inside the body the buffers (such as the running statistics of batch norms) are replaced by copies. The original
    tensors are never written, so their values, identities and autograd versions do not change.
    ``requires_grad`` and ``.grad`` are not protected; use `torch.autograd.grad` in the body to leave them unchanged.

    Args:
        modules: the modules to protect. A module that is given twice, or is part of another, is protected once.
        mode: ``"eval"`` or ``"train"`` sets the mode of every submodule inside the body; ``"unchanged"`` sets no mode.
    """
    choice("mode", mode, ("eval", "train", "unchanged"))
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    saved = [(part, part.training, dict(part._buffers)) for part in parts]
    try:
        for part, _, buffers in saved:
            for name, buffer in buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.clone()
            if mode != "unchanged":
                part.training = mode == "train"
        yield
    finally:
        for part, training, buffers in saved:
            for name, buffer in buffers.items():
                part._buffers[name] = buffer
            part.training = training


@contextlib.contextmanager
def without_effects(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Run the body, then restore the buffers of ``modules`` and the global random state."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with untouched(*modules), torch.random.fork_rng(devices=cuda):
        yield
    # torch 2.4 reuses weights that autocast has cast without a graph: they would get no gradient.
    torch.clear_autocast_cache()


@contextlib.contextmanager
def differentiating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Run the body with autograd on, in any grad mode of the caller, then restore buffers and random state.

    A module's `torch.Generator` and its Python attributes are not protected.
    """
    # Inference mode is left first: buffers that are copied inside it could not be used for a backward pass.
    with torch.inference_mode(False), torch.enable_grad(), without_effects(modules, device):
        yield


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Run the body under ``no_grad`` if the caller is in inference mode. Otherwise change nothing.

    Inference mode does not count the writes to a tensor, so functions that write to a state would not be detected.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class RandomState:
    """A copy of the global random state of the CPU, and of ``device`` if it is a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        """Restore the random state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Replay:
    """Repeats a computation: every call draws the random numbers of the first call and sees the same buffers.

    After the calls the random state is the one after a single call. The buffers do not change.

    Args:
        modules: the modules with buffers that the calls may write to.
        device: the device on which the calls draw random numbers.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._start: RandomState | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Run one call in the body."""
        if self._start is None:
            self._start = RandomState(self._device)
        else:
            self._start.put_back()
        with untouched(*self._modules):
            yield


class Buffers:
    """Copies of the buffers of ``modules``, made by the constructor."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._values = [
            (part, name, buffer.clone())
            for part in parts
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        """Replace the buffers of the modules by copies of the kept values. Their current tensors are not written."""
        for part, name, value in self._values:
            part._buffers[name] = value.clone()


@dataclass(frozen=True)
class Recompute:
    """Runs a loop in segments and does not keep their autograd graphs: the backward pass runs each segment again.

    The second run draws the same random numbers and sees the same buffers as the first run, so the gradients are
    bit-identical. It then restores the random state and the buffers. Only the states between segments and one segment
    are in memory at a time.

    Attributes:
        every: number of steps per segment.
        modules: modules with buffers that the steps may write to.
        memory: lists that the steps may change, such as the values that a costate keeps from the previous step.
    """

    every: int
    modules: Sequence[nn.Module]
    memory: Sequence[list[Any]] = ()

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, run as one segment."""
        result: T = checkpoint(function, *args, use_reentrant=False, context_fn=self._contexts)
        return result

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return _Segment(), _Again(self)


class _Segment(contextlib.ExitStack):
    """Run the body as a segment. The context can be entered many times."""

    def __enter__(self) -> _Segment:
        self.callback(_in_segment.reset, _in_segment.set(True))
        return self


class _Again(_Segment):
    """Run the body as a segment with the buffers and the memory of the first run, and restore both afterwards."""

    def __init__(self, segments: Recompute) -> None:
        super().__init__()
        self._segments, self._buffers = segments, Buffers(segments.modules)
        self._memory = [list(items) for items in segments.memory]

    def __enter__(self) -> _Again:
        super().__enter__()
        self.enter_context(untouched(*self._segments.modules))
        self._buffers.put_back()
        for items, kept in zip(self._segments.memory, self._memory, strict=True):
            self.callback(items.__setitem__, slice(None), list(items))
            items[:] = kept
        return self


def graph_kept() -> contextlib.AbstractContextManager[Any]:
    """Keep the autograd graph of the body if the body is part of a segment of `Recompute`.

    Use it for a graph that is differentiated at once. Without it each derivative would run the whole segment again.
    """
    if not _in_segment.get():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept)


def inside_transform() -> bool:
    """Return True inside a torch.func transform (vmap, grad, jvp, ...), where autograd leaves cannot be made."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def read_value(value: Tensor, argument: str) -> float:
    """Return the 0-d tensor ``value`` as a float, for a decision that the solver makes because of ``argument``.

    Raises:
        ValueError: inside torch.func.vmap, where values cannot be read. The message names ``argument``.
    """
    try:
        return float(value)
    except RuntimeError:
        if not inside_transform():
            raise
    raise ValueError(
        f"{argument} decides by the values of states, which torch.func.vmap does not allow; give a number, or make the "
        "batch a dimension of the state instead"
    )


def version(x: Tensor) -> int:
    """Return the number of writes to ``x``, or -1 in inference mode and under torch.compile, which do not count."""
    if torch.compiler.is_compiling():
        return -1
    while is_wrapped(x):  # inside a torch.func transform only the innermost tensor counts its writes
        x = torch._C._functorch.get_unwrapped(x)
    return -1 if x.is_inference() else x._version


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check_unmodified(name: str, x: Tensor, before: int) -> None:
    """Raise an error if the user's function ``name`` wrote to the state ``x``, because its old value is still needed.

    Raises:
        ValueError: if the `version` of ``x`` differs from ``before``.
    """
    if before >= 0 and version(x) != before:
        raise ValueError(f"{name}: modifies the state in place; return a new tensor (for a module, inplace=False)")
