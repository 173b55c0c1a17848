"""Residual networks that are fields: an ordinary module outside, dx/dt = f(t, x) with dt = 1 inside.

``net(images)`` maps images in [0, 1] to logits; ``net.field(images, labels, eta)`` is the same network as an
`odeadv.AdversarialField`, so `odeadv.solve` is its LAD forward pass. Uses fields only.
"""

from odeadv.models._resnet import PreActBlock, PreActResNet, Stem, preact_resnet, resnet20, resnet56

__all__ = ["PreActBlock", "PreActResNet", "Stem", "preact_resnet", "resnet20", "resnet56"]
