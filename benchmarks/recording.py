"""What a recording costs on the field of ResNet-56: evaluations and products, and the memory of its graph.

The graph's memory is the peak of the bytes that autograd keeps for the backward pass, each storage counted once.
"""

import statistics

import torch
from torch import Tensor

import odeadv

from ._timing import interleaved, machine

BATCH, ETA = 32, 50.0


class Ledger:
    """Counts the bytes of distinct storages that saved tensors keep alive, and their peak."""

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


def run() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    net = odeadv.models.resnet56(generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)

    def solve(scheme: str, checkpoints: int | None) -> odeadv.Solution:
        with torch.no_grad():  # so that only the recording keeps a graph
            return odeadv.solve(net.field(images, labels, ETA), scheme=scheme, checkpoints=checkpoints)

    counts = {}
    for scheme in ("lie", "strang", "strang-midpoint"):
        stats = solve(scheme, None).stats
        counts[scheme] = {"evaluations of f": stats.evaluations["f"], "vector-Jacobian products": stats.vjps}
    choices = {"whole graph": None, "3 segments": 3, "9 segments": 9, "27 segments": 27}
    memory = {}
    for name, checkpoints in choices.items():
        ledger = Ledger()
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda kept: kept.tensor):
            solve("lie", checkpoints)
        memory[name] = ledger.peak / 2**20
    functions = {name: (lambda k=checkpoints: solve("lie", k)) for name, checkpoints in choices.items()}
    seconds = interleaved(functions, rounds=7)
    return {
        "machine": machine(),
        "layers": len(net.blocks),
        "counts": counts,
        "MiB of the graph": memory,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


def table(data: dict) -> str:
    lines = [
        f"{data['layers']} layers, one recording and the pass it drives:",
        "",
        "| scheme | evaluations of f | vector-Jacobian products |",
        "| --- | --- | --- |",
    ]
    for scheme, row in data["counts"].items():
        lines.append(f"| {scheme} | {row['evaluations of f']} | {row['vector-Jacobian products']} |")
    lines += ["", "| `checkpoints`, lie | MiB of the graph | seconds |", "| --- | --- | --- |"]
    for name, mebibytes in data["MiB of the graph"].items():
        lines.append(f"| {name} | {mebibytes:.0f} | {data['seconds'][name]:.2f} |")
    return "\n".join(lines)
