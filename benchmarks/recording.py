"""The cost of a recording on the field of ResNet-56: evaluations, products, and the memory of its graph.

The graph's memory is the peak of the bytes that autograd keeps for the backward pass, each storage counted once.
"""

import torch
from torch import Tensor

import odeadv

from ._timing import interleaved, machine, ratio, shown, spread
from .limits import Limit

ETA = 50.0


class Ledger:
    """Count the bytes of the distinct storages that saved tensors keep alive, and their peak."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> "Kept":
        return Kept(self, tensor)


class Kept:
    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.ledger, self.tensor, self.key, self.size = ledger, tensor, storage.data_ptr(), storage.nbytes()
        if not ledger.count.get(self.key):
            ledger.bytes += self.size
            ledger.peak = max(ledger.peak, ledger.bytes)
        ledger.count[self.key] = ledger.count.get(self.key, 0) + 1

    def __del__(self) -> None:
        self.ledger.count[self.key] -= 1
        if not self.ledger.count[self.key]:
            self.ledger.bytes -= self.size


def run(quick: bool = False) -> dict[str, object]:
    batch, depth = (2, 8) if quick else (32, 56)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    net = odeadv.models.preact_resnet(depth, generator=torch.Generator().manual_seed(0))
    net = net.to(memory_format=torch.channels_last)

    def solve(scheme: str, checkpoints: int | None) -> odeadv.Solution:
        with torch.no_grad():  # so that only the recording keeps a graph
            return odeadv.solve(net.field(images, labels, ETA), scheme=scheme, checkpoints=checkpoints)

    counts = {}
    schemes = ("lie", "strang", "strang-midpoint")
    for scheme in schemes:
        stats = solve(scheme, None).stats
        counts[scheme] = {"evaluations of f": stats.evaluations["f"], "vector-Jacobian products": stats.vjps}
    layers = len(net.blocks)
    steps = sum(block.shortcut is None for block in net.blocks)
    choices = {"whole graph": None} | {f"{k} segments": k for k in (3, 9, 27) if k <= layers}
    memory = {}
    for name, checkpoints in choices.items():
        ledger = Ledger()
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda kept: kept.tensor):
            solve("lie", checkpoints)
        memory[name] = ledger.peak / 2**20
    functions = {name: (lambda k=checkpoints: solve("lie", k)) for name, checkpoints in choices.items()}
    functions |= {scheme: (lambda s=scheme: solve(s, None)) for scheme in schemes[1:]}
    seconds = interleaved(functions, rounds=2 if quick else 9)
    return {
        "machine": machine(),
        "layers": layers,
        "layers that are steps": steps,
        "counts": counts,
        "MiB of the graph": memory,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio to lie": {scheme: ratio(seconds, scheme, "whole graph") for scheme in schemes[1:]},
    }


def render(data: dict) -> str:
    lines = [
        f"{data['layers']} layers, one recording and the pass it drives:",
        "",
        "| scheme | evaluations of f | vector-Jacobian products | time / lie (quartiles) |",
        "| --- | --- | --- | --- |",
    ]
    for scheme, row in data["counts"].items():
        counts = f"{row['evaluations of f']} | {row['vector-Jacobian products']}"
        times = data["ratio to lie"]
        lines.append(f"| {scheme} | {counts} | {shown(times[scheme]) if scheme in times else ''} |")
    lines += ["", "| `checkpoints`, lie | MiB of the graph | seconds (quartiles) |", "| --- | --- | --- |"]
    for name, mebibytes in data["MiB of the graph"].items():
        lines.append(f"| {name} | {mebibytes:.0f} | {shown(data['seconds'][name])} |")
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    plain, middle = data["counts"]["strang"], data["counts"]["strang-midpoint"]
    share = data["layers that are steps"] / data["layers"]  # the others are jumps, which lack a middle
    rows = [
        Limit(f"exact midpoint, {what} more a layer", (middle[what] - plain[what]) / data["layers"], share, most=1)
        for what in plain
    ]
    passes = sum(middle.values()) / sum(data["counts"]["lie"].values())
    rows.append(Limit("exact midpoint, time / lie", data["ratio to lie"]["strang-midpoint"], passes))
    whole = data["MiB of the graph"]["whole graph"]
    least = min(data["MiB of the graph"].values())
    return [*rows, Limit("graph of a recording, one segment a layer / whole", least / whole, 1 / data["layers"])]
