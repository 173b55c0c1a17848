"""A training step of a network that odeadv did not make: torchvision's resnet18, wrapped by `models.from_module`.

The plain module is a forward pass, cross-entropy, and a backward pass. Wrapped, the same step is a solve of its field.
ResNet-20 of odeadv is measured in the same rounds. The floor of LAD / natural is its value if only convolutions took
time. LAD has two forward passes, two backward passes to activations, and one to weights; natural has one of each.
Compare times of the same rounds only: the plain and the wrapped module have further rounds of their own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import odeadv
from odeadv.training import Draws, Layerwise, Natural, Step, Undefended

from ._convolutions import KINDS, convolutions
from ._timing import interleaved, machine, middle, ratio, shown, spread
from .limits import Limit
from .training_step import ETA, stepping

PLAIN, WRAPPED, OURS = "resnet18, plain module", "resnet18, wrapped", "ResNet-20 of odeadv"
LAYERS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
RATIOS = ((WRAPPED, PLAIN), (f"{WRAPPED}, LAD", WRAPPED), (f"{OURS}, LAD", OURS))


def run(quick: bool = False) -> dict[str, object]:
    import torchvision

    batch, rounds = (2, 1) if quick else (128, 15)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train()
    # Both networks have the same weights, because the wrapped network consists of the modules of the plain network.
    nets = {WRAPPED: odeadv.models.from_module(plain, layers=LAYERS).train()}
    nets[OURS] = odeadv.models.preact_resnet(20, generator=generator).to(memory_format=torch.channels_last).train()

    def ours(name: str, defence: object) -> Callable[[], None]:
        net, draws = nets[name], Draws(0, 0, slice(0, batch), batch)
        return stepping(net, lambda: Natural()(Step(net, images, labels, defence, draws)).loss, bf16=True)

    steps = {PLAIN: stepping(plain, lambda: F.cross_entropy(plain(images).float(), labels), bf16=True)}
    for name in nets:
        steps |= {name: ours(name, Undefended()), f"{name}, LAD": ours(name, Layerwise("lie", ETA))}
    alone = {
        f"{name}: {kind}": function
        for name, net in ((WRAPPED, plain), (OURS, nets[OURS]))
        for kind, function in convolutions(net, images, torch.bfloat16).items()
    }
    seconds = interleaved(steps | alone, rounds=rounds)
    # A ratio this close to 1 needs more rounds: in 15, the plain module differs from itself by up to 3 %.
    pair = interleaved({name: steps[name] for name in (PLAIN, WRAPPED)}, rounds=4 * rounds)
    own = {f"{name}, rounds of two": values for name, values in pair.items()}
    return {
        "machine": machine(),
        "network": f"batch {batch}, 32x32 images, bf16 autocast, channels_last",
        "seconds": {name: spread(values) for name, values in (seconds | own).items()},
        "ratios": {f"{name} / {to}": ratio(pair if to == PLAIN else seconds, name, to) for name, to in RATIOS},
    }


def floor(data: dict, name: str, to: str) -> float:
    """Return the ratio of two steps if only convolutions took time."""
    if name == WRAPPED:
        return 1.0
    forward, backward, weights = (middle(data["seconds"][f"{to}: {kind}"]) for kind in KINDS)
    return (2 * forward + 2 * backward + weights) / (forward + backward + weights)


def render(data: dict) -> str:
    lines = [f"{data['network']}.", "", "| step | milliseconds (quartiles) |", "| --- | --- |"]
    lines += [f"| {name} | {shown(value, '.1f', 1e3)} |" for name, value in data["seconds"].items()]
    lines += ["", "| ratio of times | measured (quartiles) | floor |", "| --- | --- | --- |"]
    for name, to in RATIOS:
        lines.append(f"| {name} / {to} | {shown(data['ratios'][f'{name} / {to}'])} | {floor(data, name, to):.3f} |")
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    """Return the ratios of times with their floors."""
    most = (1.02, 1.75, 1.75)
    return [
        Limit(f"time, {name} / {to}", data["ratios"][f"{name} / {to}"], floor(data, name, to), most=limit, form=".3f")
        for (name, to), limit in zip(RATIOS, most, strict=True)
    ]
