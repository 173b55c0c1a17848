"""A training step of ResNet-56 with each defence, beside the floor that counts forward and backward passes."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

import odeadv

from ._timing import interleaved, machine, ratio

BATCH, ETA = 128, 50.0
# forward = backward to activations = weight gradients = 1: natural 3, a recording 2 more, a midpoint 2 more
FLOOR = {"LAD": 5 / 3, "LAD-SM": 5 / 3, "LAD, exact midpoint": 7 / 3}


def run() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    fast = images.to(memory_format=torch.channels_last)

    def network(layout: torch.memory_format) -> odeadv.models.PreActResNet:
        net = odeadv.models.resnet56(generator=torch.Generator().manual_seed(0))
        return net.to(memory_format=layout).train()

    net, plain = network(torch.channels_last), network(torch.contiguous_format)

    def step(scheme: str, eta: float) -> Callable[[], None]:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def function() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = odeadv.solve(net.field(fast, labels, eta), scheme=scheme).loss
            loss.backward()
            optimizer.step()

        return function

    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)

    def eager_fp32() -> None:
        plain_optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(plain(images), labels).backward()
        plain_optimizer.step()

    functions = {
        "natural, plain eager fp32 NCHW loop": eager_fp32,
        "natural": step("lie", 0.0),
        "LAD": step("lie", ETA),
        "LAD-SM": step("strang", ETA),
        "LAD, exact midpoint": step("strang-midpoint", ETA),
    }
    seconds = interleaved(functions, rounds=9)
    return {
        "machine": machine(),
        "network": "ResNet-56, batch 128, bf16 autocast, channels_last unless said",
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "images a second": {name: BATCH / statistics.median(values) for name, values in seconds.items()},
        "ratio to natural": {name: ratio(seconds, name, "natural") for name in functions},
    }


def table(data: dict) -> str:
    lines = [
        f"{data['network']}.",
        "",
        "| step | images/s | time / natural (quartiles) | floor |",
        "| --- | --- | --- | --- |",
    ]
    for name, rate in data["images a second"].items():
        r = data["ratio to natural"][name]
        floor = f"{FLOOR[name]:.2f}" if name in FLOOR else ""
        lines.append(f"| {name} | {rate:.0f} | {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {floor} |")
    return "\n".join(lines)
