"""Gaussian noise on the state of a residual network (Wang et al. 2019, arXiv:1811.10745), and means over noise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odeadv.support.checks import choice, integer, number
from odeadv.support.isolation import untouched

if TYPE_CHECKING:
    from jaxtyping import Float

NoiseKind = Literal["absolute", "relative"]
DEFAULT_STD = 0.1  # the paper's N(0, 0.01), read as mean and variance


class Noise(nn.Module):
    """The diffusion term of a block: noise on the residual sum x + dt f(x), drawn from torch's global random state.

    Like dropout, the noise is on in training mode, and off in evaluation mode unless `at_inference` is set. A recording
    pass restores the random state, so the next pass draws the same noise.

    Args:
        std: standard deviation over a unit of time.
        kind: ``"absolute"``, or ``"relative"`` to the standard deviation of the sum. This deviation is taken over the
            whole batch tensor, and gradients do not pass through it.

    Attributes:
        at_inference: True if the noise is on in evaluation mode too.
        shared: True if all images of a batch get the same noise. Relative noise is then relative to the sum of each
            image.
    """

    def __init__(self, std: float, kind: NoiseKind) -> None:
        super().__init__()
        self.std, self.kind = std, kind
        self.at_inference = self.shared = False

    @property
    def active(self) -> bool:
        """True if the noise is on in the current mode."""
        return self.training or self.at_inference

    def forward(
        self, x: Float[Tensor, "n c h w"], f: Float[Tensor, "n c h w"], dt: float = 1.0
    ) -> Float[Tensor, "n c h w"]:
        """Return the noise for the velocity ``f`` at ``x``. An Euler step of ``dt`` then adds std sqrt(dt) N(0, 1)."""
        # A contiguous draw in float32 is several times faster, and its values do not depend on the memory layout of f.
        shape = (1, *f.shape[1:]) if self.shared else f.shape
        drawn = torch.randn(shape, dtype=torch.promote_types(f.dtype, torch.float32), device=f.device)
        with torch.no_grad():
            scale = self.std / math.sqrt(dt)
            if self.kind == "relative":
                total = torch.add(x, f, alpha=dt).to(drawn.dtype)
                drawn = drawn * (scale * (total.std(dim=(1, 2, 3), keepdim=True) if self.shared else total.std()))
            else:
                drawn *= scale
            return torch.empty_like(f).copy_(drawn)

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        return f"std={self.std:g}, kind={self.kind!r}"


def make_noise(std: float, kind: NoiseKind) -> Noise | None:
    """Return the noise of one block, or None if ``std`` is 0."""
    return Noise(std, kind) if std else None


def read_noise(noise: float | bool, kind: str) -> tuple[float, NoiseKind]:
    """Return standard deviation and kind of the noise. If ``noise`` is True, the deviation is 0.1, as in the paper.

    Raises:
        TypeError, ValueError: if ``noise`` or ``kind`` does not fit. The message names ``noise`` or ``noise_kind``.
    """
    chosen: NoiseKind = choice("noise_kind", kind, get_args(NoiseKind))  # type: ignore[assignment]  # checked
    if isinstance(noise, bool):
        return (DEFAULT_STD if noise else 0.0), chosen
    return number("noise", noise, least=0.0), chosen


def noises_of(net: nn.Module) -> list[Noise]:
    """Return all `Noise` modules of ``net``.

    Raises:
        ValueError: if ``net`` has no `Noise` module.
    """
    found = [module for module in net.modules() if isinstance(module, Noise)]
    if not found:
        raise ValueError("net: got a network without noise, expected one with it; make it with noise=0.1")
    return found


def averaged(
    net: nn.Module,
    passes: int = 100,
    generator: torch.Generator | int | None = None,
    *,
    recompute: bool = True,
) -> Averaged:
    """Return a network that averages ``passes`` forward passes of the random network ``net``.

    The arguments are described in `Averaged`.
    """
    return Averaged(net, passes, generator, recompute=recompute)


class Averaged(nn.Module):
    """Averages the logits over forward passes of a random network in evaluation mode.

    ``net`` is a network made with ``noise``, and its noise is switched on. Or it is any other module that draws from
    torch's global random state in evaluation mode (random transformations, noise, ``dropout(x, training=True)``).

    The mean is differentiable, so an attack uses the mean over the noise (EOT, Athalye et al. 2018, arXiv:1707.07397).
    A call does not change modes, statistics or the global random state. The weights are shared with ``net``.

    Args:
        net: any module from images to logits.
        passes: number of forward passes.
        generator: a seed (None means 0) or a CPU generator. With a seed, every call draws the same noise, and all
            images of the batch share it. The logits are then a function of the image that an attack can use. (Relative
            noise is relative to the sum of each image.) A module without `Noise` is then run by ``torch.func.vmap``. If
            vmap cannot run it, it is run image by image, which is slow. With a generator, every call draws new noise
            for every image. A generator in the same state repeats the same sequence of calls.
        recompute: True keeps the graph of one pass at a time if gradients are needed, and runs each pass again in the
            backward pass. It needs the memory of one pass and a third more time. Logits and gradients are the same.

    Raises:
        TypeError: if ``passes`` is not an integer, or ``generator`` is not a seed, a generator or None.
        ValueError: if ``passes`` is below 1.
    """

    def __init__(
        self,
        net: nn.Module,
        passes: int = 100,
        generator: torch.Generator | int | None = None,
        *,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        passes = integer("passes", passes)
        if not isinstance(generator, torch.Generator | int | None) or isinstance(generator, bool):
            raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator, a seed or None")
        self.net, self.passes, self.recompute = net, passes, recompute
        self.generator = 0 if generator is None else generator

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        count: int = self.net.num_classes  # type: ignore[assignment]
        return count

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the mean logits of ``images`` with pixels in [0, 1]."""
        given = self.generator
        source = given if isinstance(given, torch.Generator) else torch.Generator().manual_seed(given)
        seeds = torch.randint(2**62, (self.passes,), generator=source).tolist()
        total: Tensor | None = None
        for seed in seeds:
            if self.recompute and torch.is_grad_enabled():
                logits = checkpoint(self._once, images, seed, use_reentrant=False, preserve_rng_state=False)
            else:
                logits = self._once(images, seed)
            total = logits if total is None else total + logits
        assert total is not None
        return total / self.passes

    def _once(self, images: Tensor, seed: int) -> Tensor:
        shared = not isinstance(self.generator, torch.Generator)
        with untouched(self.net, mode="eval"):
            if any(isinstance(module, Noise) for module in self.net.modules()):
                with noisy(self.net, shared=shared), _seeded(seed, images.device):
                    logits: Tensor = self.net(images)
                    return logits
            return self._one_draw(images, seed) if shared else self._drawn(images, seed)

    def _drawn(self, images: Tensor, seed: int) -> Tensor:
        with _seeded(seed, images.device):
            logits: Tensor = self.net(images)
        return logits

    def _one_draw(self, images: Tensor, seed: int) -> Tensor:
        """Return logits with the same random numbers for every image, at any place in the batch."""
        run = torch.func.vmap(lambda image: self.net(image[None])[0], randomness="same")
        try:
            with _seeded(seed, images.device):
                logits: Tensor = run(images)
            return logits
        except RuntimeError:  # vmap cannot run all modules, for example a module that branches on values
            return torch.cat([self._drawn(image, seed) for image in torch.split(images, 1)])

    def extra_repr(self) -> str:
        """Return the arguments as text."""
        return f"passes={self.passes}"


@contextlib.contextmanager
def noisy(net: nn.Module, *, shared: bool = False) -> Iterator[None]:
    """Run the body with the noise of ``net`` on, in any mode. If ``shared``, all images get the same noise."""
    before = [(noise, noise.at_inference, noise.shared) for noise in noises_of(net)]
    try:
        for noise, _, _ in before:
            noise.at_inference, noise.shared = True, shared
        yield
    finally:
        for noise, on, together in before:
            noise.at_inference, noise.shared = on, together


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the body with the global random state of the CPU and of ``device`` seeded, then restore this state."""
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
