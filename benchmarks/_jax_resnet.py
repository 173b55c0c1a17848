"""A trained ResNet in evaluation mode, written in jax because diffrax needs its fields in jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from odeadv.models import PreActBlock, PreActResNet

from ._peers import float64

Function = Callable[[Any], Any]


def velocity(block: PreActBlock) -> Callable[[Any, Any], Any]:
    """Return the function f(t, x) of ``block``."""
    f = _residual(block)
    return lambda t, x: f(x)


def loss_gradient(net: PreActResNet, count: int, labels: Tensor) -> Function:
    """Return the gradient of the mean cross-entropy with respect to the state after ``count`` blocks."""
    import jax
    import jax.numpy as jnp

    rest = [_block(block) for block in net.blocks[count:]]
    head, classes = _chain(*net.head), jnp.asarray(labels.numpy())

    def loss(x: Any) -> Any:
        for block in rest:
            x = block(x)
        scores = jax.nn.log_softmax(head(x))
        return -jnp.take_along_axis(scores, classes[:, None], 1).mean()

    gradient: Function = jax.grad(loss)
    return gradient


def _residual(block: PreActBlock) -> Function:
    return _chain(block.bn1, nn.ReLU(), block.conv1, block.bn2, nn.ReLU(), block.conv2)


def _block(block: PreActBlock) -> Function:
    f = _residual(block)
    shortcut = _chain(*block.shortcut) if block.shortcut is not None else lambda x: x
    return lambda x: shortcut(x) + f(x)


def _chain(*modules: nn.Module) -> Function:
    layers = [_layer(module) for module in modules]

    def apply(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return apply


def _layer(module: nn.Module) -> Function:
    import jax
    import jax.numpy as jnp

    if isinstance(module, nn.BatchNorm2d):
        scale = module.weight / (module.running_var + module.eps).sqrt()
        shift = module.bias - module.running_mean * scale
        a, b = (float64(each.detach()[:, None, None]) for each in (scale, shift))
        return lambda x: x * a + b
    if isinstance(module, nn.Conv2d):
        weight, stride = float64(module.weight.detach()), module.stride
        padding = [(each, each) for each in module.padding]
        return lambda x: jax.lax.conv_general_dilated(x, weight, stride, padding)
    if isinstance(module, nn.Linear):
        weight, bias = float64(module.weight.detach()), float64(module.bias.detach())
        return lambda x: x @ weight.T + bias
    if isinstance(module, nn.ReLU):
        return lambda x: jnp.maximum(x, 0.0)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return lambda x: x.mean((2, 3), keepdims=True)
    if isinstance(module, nn.Flatten):
        return lambda x: x.reshape(len(x), -1)
    raise TypeError(f"{type(module).__name__} is not translated here")
