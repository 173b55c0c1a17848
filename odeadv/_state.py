"""Running a user's modules without leaving a trace: modes, buffers and random state come back as they were."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["eval", "train", "unchanged"]


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
    if mode not in ("eval", "train", "unchanged"):
        raise ValueError(f"mode: got {mode!r}, expected 'eval', 'train' or 'unchanged'")
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
def aside(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Evaluate inside without effect: buffers of ``modules`` and the global random state come back as they were."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with untouched(*modules), torch.random.fork_rng(devices=cuda):
        yield


@contextlib.contextmanager
def recording(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Differentiate inside, whatever the caller's grad mode, and without effect on buffers and random state.

    A `torch.Generator` or a Python attribute that a module keeps to itself is not protected.
    """
    # Leaving inference mode comes first: buffers copied within it could not be used for a backward pass.
    with torch.inference_mode(False), torch.enable_grad(), aside(modules, device):
        yield


def inside_transform() -> bool:
    """Whether the caller runs inside a torch.func transform (vmap, grad, jvp, ...), where leaves cannot be made."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def decides(value: Tensor, argument: str) -> float:
    """``value`` as a float that decides how the solve goes on, as ``argument`` asks for.

    Raises:
        ValueError: naming ``argument``, inside torch.func.vmap, which has no such values.
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


def modules_of(*functions: object) -> tuple[nn.Module, ...]:
    """The modules that ``functions`` run, as far as can be seen.

    Found are modules themselves, bound methods of them, partial functions, what a function closes over or names
    globally, and objects with a tuple ``modules`` (operators and fields).
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = list(functions)
    while waiting:
        item = waiting.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, types.MethodType):
            waiting += [item.__self__, item.__func__]
        elif isinstance(item, types.FunctionType):
            waiting += _names_in(item)
        elif isinstance(getattr(item, "modules", None), tuple):
            waiting += item.modules  # type: ignore[attr-defined]
    return tuple(found.values())


def _names_in(function: types.FunctionType) -> list[object]:
    """What ``function`` closes over, and the modules among the globals it names."""
    values: list[object] = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell: defined later
            values.append(cell.cell_contents)
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return values + [value for value in named if isinstance(value, nn.Module | types.FunctionType | types.MethodType)]
