"""Running a user's modules without leaving a trace: modes, buffers and random state come back as they were."""

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
    """Run the body on ``modules`` and put their modes and buffers back afterwards, exceptions included.

    Buffers (batch-norm running statistics among them) are swapped for copies inside the body, so the original
    tensors are never written: their values, identities and autograd versions stay what they were.
    ``requires_grad`` and ``.grad`` are not touched; use `torch.autograd.grad` in the body to keep it so.

    Args:
        modules: the modules to protect; one given twice (or inside another) is protected once.
        mode: ``"eval"`` or ``"train"`` sets every submodule's mode inside the body; ``"unchanged"`` sets none.
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
    """Evaluate inside without effect: buffers of ``modules`` and the global random state come back as they were."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with untouched(*modules), torch.random.fork_rng(devices=cuda):
        yield


@contextlib.contextmanager
def differentiating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Differentiate inside, whatever the caller's grad mode, and without effect on buffers and random state.

    A `torch.Generator` or a Python attribute that a module keeps to itself is not protected.
    """
    # Leaving inference mode comes first: buffers copied within it could not be used for a backward pass.
    with torch.inference_mode(False), torch.enable_grad(), without_effects(modules, device):
        yield


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Run the body under ``no_grad`` where the caller is in inference mode, and as it is elsewhere.

    Inference mode does not count what is written to a tensor, so functions that write to a state go unseen there.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class RandomState:
    """The global random state, of the CPU and of ``device`` if that is a CUDA device, as it is when this is made."""

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
    """Calls that draw the random numbers of the first of them and meet the same buffers.

    The random state goes on as after one call; buffers stay what they are.

    Args:
        modules: whose buffers the calls may write to.
        device: where they draw.
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
    """The buffers of ``modules`` as they are when this is made."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._values = [
            (part, name, buffer.clone())
            for part in parts
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        """Give the modules copies of them; the tensors they have now are not written to."""
        for part, name, value in self._values:
            part._buffers[name] = value.clone()


@dataclass(frozen=True)
class Recompute:
    """Runs a loop in segments whose autograd graph is not kept: the backward pass runs each segment again.

    The second run draws the same random numbers and sees the buffers of the first one, so gradients are the same bit
    for bit, and both are left as they were. Apart from the states between segments, one segment is in memory at a time.

    Attributes:
        every: number of steps of a segment.
        modules: modules whose buffers the steps may write to.
        memory: lists that the steps may change, such as what a costate remembers of the step before.
    """

    every: int
    modules: Sequence[nn.Module]
    memory: Sequence[list[Any]] = ()

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``."""
        result: T = checkpoint(function, *args, use_reentrant=False, context_fn=self._contexts)
        return result

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return _Segment(), _Again(self)


class _Segment(contextlib.ExitStack):
    """Run the body as a segment. It can be entered many times."""

    def __enter__(self) -> _Segment:
        self.callback(_in_segment.reset, _in_segment.set(True))
        return self


class _Again(_Segment):
    """Run the body as a segment, with the buffers and the memory of this moment, and put both back afterwards."""

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
    """Keep the graph of the body, which is differentiated at once, if it is part of a segment of `Recompute`.

    Otherwise each differentiation would run its segment again from the beginning.
    """
    if not _in_segment.get():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept)


def inside_transform() -> bool:
    """Return True inside a torch.func transform (vmap, grad, jvp, ...), where leaves cannot be made."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def read_value(value: Tensor, argument: str) -> float:
    """Return ``value`` as a float, for a decision that ``argument`` asks for.

    Raises:
        ValueError: naming ``argument``, inside torch.func.vmap, where values cannot be read.
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
    """Return the number of writes to ``x``; -1 in inference mode and under torch.compile, where it is not known."""
    if torch.compiler.is_compiling():
        return -1
    while is_wrapped(x):  # within a torch.func transform: the tensor of the values knows
        x = torch._C._functorch.get_unwrapped(x)
    return -1 if x.is_inference() else x._version


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check_unmodified(name: str, x: Tensor, before: int) -> None:
    """Refuse a user's function ``name`` that wrote to the state ``x``, whose old value is still needed.

    Raises:
        ValueError: if the `version` of ``x`` is not ``before`` any more.
    """
    if before >= 0 and version(x) != before:
        raise ValueError(f"{name}: modifies the state in place; return a new tensor (for a module, inplace=False)")
