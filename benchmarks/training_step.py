"""A training step of ResNet-56 with each objective and defence, compared with the passes that it makes.

The plain loops work like the published code: fp32, NCHW, and the clean probabilities of TRADES are computed again in
every step of its attack. The floor of a ratio is its value if only convolutions took time in our steps. The
convolutions of the network are timed separately, in bf16 and channels_last, on tensors that exist beforehand. Memory is
the peak of all living tensors in a step, including the tensors of the network and the optimiser. Augmentation is the
cost of an augmented batch relative to a natural step of ResNet-20; its floor is a batch without augmentation.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odeadv
from odeadv.data import Batches
from odeadv.training import Draws, Layerwise, Natural, Pgd, Step, Trades, Undefended

from ._convolutions import KINDS, convolutions
from ._memory import peak_mebibytes
from ._timing import interleaved, machine, middle, ratio, shown, spread
from .limits import Limit

ETA, EPS, ALPHA = 50.0, 8 / 255, 2 / 255
PLAIN = "plain eager fp32 NCHW loop"
LAD, MIDPOINT = Layerwise("lie", ETA), Layerwise("strang-midpoint", ETA)
CHEAP = {
    "natural": (Natural(), Undefended()),
    "LAD": (Natural(), LAD),
    "LAD-SM": (Natural(), Layerwise("strang", ETA)),
    "LAD, exact midpoint": (Natural(), MIDPOINT),
}
ATTACKED = {
    "PGD-10": (Pgd(), Undefended()),
    "PGD-10 + LAD": (Pgd(), LAD),
    "TRADES": (Trades(), Undefended()),
    "TRADES + LAD": (Trades(), LAD),
}
# Passes of each kind. A recording, a midpoint and a step of an attack are one forward pass and one backward pass to the
# activations (two of 27 layers are jumps, without a middle). TRADES has one forward pass for the clean probabilities
# and two passes of all three kinds; with LAD, a third pass records.
PASSES = {
    "natural": (1, 1, 1),
    "LAD": (2, 2, 1),
    "LAD-SM": (2, 2, 1),
    "LAD, exact midpoint": (2 + 25 / 27, 2 + 25 / 27, 1),
    "PGD-10": (11, 11, 1),
    "PGD-10 + LAD": (12, 12, 1),
    "TRADES": (13, 12, 2),
    "TRADES + LAD": (15, 14, 3),
}
RATIOS = (
    ("LAD", "natural"),
    ("LAD-SM", "natural"),
    ("LAD, exact midpoint", "LAD"),
    ("PGD-10 + LAD", "PGD-10"),
    ("TRADES + LAD", "TRADES"),
    (f"natural, {PLAIN}", "natural"),
    (f"PGD-10, {PLAIN}", "PGD-10"),
    (f"TRADES, {PLAIN}", "TRADES"),
)


def plain_losses(
    net: nn.Module, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator
) -> dict[str, Callable[[], Tensor]]:
    """Return functions that compute the losses as a plain loop does."""

    def attacked(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        net.eval()
        for _ in range(steps):
            x = x.detach().requires_grad_()
            moved = x.detach() + ALPHA * torch.autograd.grad(loss(net(x)), x)[0].sign()
            x = torch.min(torch.max(moved, images - EPS), images + EPS).clamp(0.0, 1.0)
        net.train()
        return x.detach()

    def divergence(clean: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="batchmean")

    def natural() -> Tensor:
        return F.cross_entropy(net(images), labels)

    def pgd() -> Tensor:
        start = images + EPS * (2 * torch.rand(images.shape, generator=generator) - 1)
        return F.cross_entropy(net(attacked(start, lambda logits: F.cross_entropy(logits, labels))), labels)

    def trades() -> Tensor:
        start = images + 0.001 * torch.randn(images.shape, generator=generator)
        x = attacked(start, lambda logits: divergence(net(images), logits))
        clean = net(images)
        return F.cross_entropy(clean, labels) + 6.0 * divergence(clean, net(x))

    return {f"{name}, {PLAIN}": loss for name, loss in (("natural", natural), ("PGD-10", pgd), ("TRADES", trades))}


def stepping(net: nn.Module, loss: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
    """Return a function that makes one step of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def run(quick: bool = False) -> dict[str, object]:
    depth, batch, attack_steps = (8, 4, 1) if quick else (56, 128, 10)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4 * batch, 32, 32, 3), dtype=torch.uint8, generator=generator)
    classes = torch.randint(0, 10, (4 * batch,), generator=generator)
    images, labels = next(iter(Batches(pixels, classes, batch_size=batch)))

    def network(depth: int, layout: torch.memory_format) -> odeadv.models.PreActResNet:
        net = odeadv.models.preact_resnet(depth, generator=torch.Generator().manual_seed(0))
        return net.to(memory_format=layout).train()

    net, plain = network(depth, torch.channels_last), network(depth, torch.contiguous_format)

    def ours(objective: object, defence: object) -> Callable[[], None]:
        draws = Draws(0, 0, slice(0, batch), batch)
        return stepping(net, lambda: objective(Step(net, images, labels, defence, draws)).loss, bf16=True)

    attacked = {
        name: ours(type(objective)(steps=attack_steps), defence) for name, (objective, defence) in ATTACKED.items()
    }
    losses = plain_losses(plain, images.contiguous(), labels, attack_steps, generator)
    loops = {name: stepping(plain, loss, bf16=False) for name, loss in losses.items()}
    natural = f"natural, {PLAIN}"
    cheap = {name: ours(*parts) for name, parts in CHEAP.items()} | {natural: loops.pop(natural)}
    memory = {name: peak_mebibytes(function) for name, function in cheap.items()}
    alone = convolutions(net, images, torch.bfloat16)
    seconds = interleaved(cheap | alone, rounds=2 if quick else 9)
    passes = {name: spread(seconds.pop(name)) for name in alone}
    # A step with an attack takes seconds, so fewer rounds are affordable. The networks are warm by now.
    seconds |= interleaved(attacked | loops, rounds=2 if quick else 3, warmup=0)

    small = network(8 if quick else 20, torch.channels_last)

    def endless(augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        batches = Batches(pixels, classes, batch_size=batch, shuffle=True, augment=augment, generator=generator)
        return chain.from_iterable(repeat(batches))

    augmented, unchanged = endless(True), endless(False)

    def natural_loss() -> Tensor:
        loss = odeadv.solve(small.field(images, labels)).loss
        assert loss is not None
        return loss

    share = interleaved(
        {
            "augmented batch": lambda: next(augmented),
            "batch": lambda: next(unchanged),
            "natural step": stepping(small, natural_loss, bf16=True),
        },
        rounds=2 if quick else 15,
    )
    return {
        "machine": machine(),
        "network": f"ResNet-{depth}, batch {batch}, bf16 autocast, channels_last unless said",
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "images a second": {name: spread(batch / value for value in values) for name, values in seconds.items()},
        "ratios": {f"{name} / {to}": ratio(seconds, name, to) for name, to in RATIOS},
        "seconds of the convolutions alone": passes,
        "MiB": memory,
        "memory ratio to natural": {name: value / memory["natural"] for name, value in memory.items()},
        "augmentation": ratio(share, "augmented batch", "natural step"),
        "batch without augmentation": ratio(share, "batch", "natural step"),
    }


def floor(ratio: str, data: Mapping[str, Any]) -> float:
    """Return the ratio of two steps if only convolutions took time in ours."""
    name, _, to = ratio.partition(" / ")
    alone = [middle(data["seconds of the convolutions alone"][kind]) for kind in KINDS]

    def least(step: str) -> float:
        return sum(count * seconds for count, seconds in zip(PASSES[step], alone, strict=True))

    return (least(name) if name in PASSES else middle(data["seconds"][name])) / least(to)


def render(data: dict) -> str:
    lines = [
        f"{data['network']}.",
        "",
        "| step | images/s (quartiles) | passes | MiB | MiB / natural |",
        f"|{' --- |' * 5}",
    ]
    for name, rate in data["images a second"].items():
        memory, share = data["MiB"].get(name), data["memory ratio to natural"].get(name)
        sizes = " | " if memory is None else f"{memory:.0f} | {share:.2f}"
        count = f"{sum(PASSES[name]):.3g}" if name in PASSES else ""
        lines.append(f"| {name} | {shown(rate, '.0f')} | {count} | {sizes} |")
    lines += ["", "| ratio of times | measured (quartiles) | floor |", "| --- | --- | --- |"]
    lines += [f"| {name} | {shown(value)} | {floor(name, data):.3f} |" for name, value in data["ratios"].items()]
    lines += ["", "| all convolutions, nothing else | milliseconds (quartiles) |", "| --- | --- |"]
    alone = data["seconds of the convolutions alone"]
    lines += [f"| {kind} | {shown(value, '.0f', 1e3)} |" for kind, value in alone.items()]
    share, least = (100 * middle(data[key]) for key in ("augmentation", "batch without augmentation"))
    lines += ["", f"Making an augmented batch takes {share:.2f} % of a natural step of ResNet-20, one that is not"]
    lines[-1] += f" augmented {least:.2f} %."
    return "\n".join(lines)


AIMS: dict[str, dict[str, float]] = {
    "LAD / natural": {"most": 1.75},
    "LAD-SM / natural": {"most": 1.75},
    "LAD, exact midpoint / LAD": {"most": 1.45},
    "PGD-10 + LAD / PGD-10": {"most": 1.10},
    f"natural, {PLAIN} / natural": {"least": 3},
    f"PGD-10, {PLAIN} / PGD-10": {"least": 3},
    f"TRADES, {PLAIN} / TRADES": {"least": 3},
}


def limits(data: dict) -> list[Limit]:
    """Return the ratios of times and of memory, each with its floor."""
    rows = [
        Limit(f"time, {name}", value, floor(name, data), **AIMS.get(name, {}), form=".3f")
        for name, value in data["ratios"].items()
    ]
    for name, value in data["memory ratio to natural"].items():
        if name in CHEAP and name != "natural":
            rows.append(Limit(f"memory, {name} / natural", value, 1.0, most=1.3 if name == "LAD" else None))
    share, least = data["augmentation"], data["batch without augmentation"]
    return [*rows, Limit("augmented batch / natural step of ResNet-20", share, least, most=0.05, form=".4f")]
