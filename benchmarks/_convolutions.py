"""Run only the convolutions of a network: their time is the floor of its steps and gradients."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeadv.support.isolation import untouched

KINDS = ("forward", "backward to activations", "weight gradients")


def convolutions(net: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return functions that run all convolutions of ``net`` on ``images``, by kind of pass, in channels_last.

    Convolutions of one shape share their tensors, which are more likely to be in a cache than the tensors of a network.
    """
    calls: list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]] = []
    handles = [
        module.register_forward_hook(lambda module, x, y: calls.append((module, x[0].shape, y.shape)))
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad(), untouched(net, mode="eval"):
        net(images)
    for handle in handles:
        handle.remove()
    made: dict[tuple[int, ...], Tensor] = {}

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if shape not in made:
            made[shape] = torch.rand(shape).to(dtype, memory_format=torch.channels_last)
        return made[shape]

    work = []
    for module, given, found in calls:
        weight = module.weight.detach().to(dtype, memory_format=torch.channels_last)
        work.append((tensor(found), tensor(given), weight, module.stride, module.padding))

    def forward() -> None:
        for _, x, weight, stride, padding in work:
            F.conv2d(x, weight, None, stride, padding)

    def backward(asked: list[bool]) -> None:
        for y, x, weight, stride, padding in work:
            ones, zeros = [1, 1], [0, 0]
            torch.ops.aten.convolution_backward(y, x, weight, None, stride, padding, ones, False, zeros, 1, asked)

    functions = (forward, lambda: backward([True, False, False]), lambda: backward([False, True, False]))
    return dict(zip(KINDS, functions, strict=True))
