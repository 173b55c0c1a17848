"""The cost of a recording on the field of ResNet-56, in evaluations, products and memory, and the memory of gradients.

Memory is the peak of all living tensors; each storage is counted once.
"""

from functools import partial

import torch
from torch import Tensor

import odeadv

from ._memory import peak_mebibytes
from ._timing import interleaved, machine, ratio, shown, spread
from .limits import Limit

ETA = 50.0


def run(quick: bool = False) -> dict[str, object]:
    batch, depth = (2, 8) if quick else (32, 56)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    net = odeadv.models.preact_resnet(depth, generator=torch.Generator().manual_seed(0))
    net = net.to(memory_format=torch.channels_last)

    def solve(scheme: str, checkpoints: int | None) -> odeadv.Solution:
        with torch.no_grad():  # only the recording must keep a graph
            return odeadv.solve(net.field(images, labels, ETA), scheme=scheme, checkpoints=checkpoints)

    counts = {}
    schemes = ("lie", "strang", "strang-midpoint")
    for scheme in schemes:
        stats = solve(scheme, None).stats
        counts[scheme] = {"evaluations of f": stats.evaluations["f"], "vector-Jacobian products": stats.vjps}
    layers = len(net.blocks)
    steps = sum(block.shortcut is None for block in net.blocks)
    choices = {"whole graph": None} | {f"{k} segments": k for k in (3, 9, 27) if k <= layers}
    memory = {name: peak_mebibytes(partial(solve, "lie", checkpoints)) for name, checkpoints in choices.items()}
    functions = {name: (lambda k=checkpoints: solve("lie", k)) for name, checkpoints in choices.items()}
    functions |= {scheme: (lambda s=scheme: solve(s, None)) for scheme in schemes[1:]}
    seconds = interleaved(functions, rounds=2 if quick else 9)
    return {
        "machine": machine(),
        "layers": layers,
        "layers that are steps": steps,
        "counts": counts,
        "MiB of a recording": memory,
        "MiB of states and costates": 2 * sum(node.nbytes for node in solve("lie", None).costate.nodes) / 2**20,
        "MiB of a solve and its gradient": solves(quick),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio to lie": {scheme: ratio(seconds, scheme, "whole graph") for scheme in schemes[1:]},
    }


def solves(quick: bool = False) -> dict[str, object]:
    """Return the peak memory of a solve with its gradient by the number of segments: a neural ODE, plain and LAD-SM."""
    steps, batch, width = (16, 8, 8) if quick else (256, 128, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()
        )
        x0 = torch.randn(batch, width)

    def peak(field: object, checkpoints: int | None) -> float:
        def gradient() -> None:
            sol = odeadv.solve(field, x0, (0.0, 1.0), steps=steps, substep="midpoint", checkpoints=checkpoints)
            torch.autograd.grad(sol.xs[-1].square().mean(), tuple(net.parameters()))

        return peak_mebibytes(gradient)

    def f(t: Tensor, x: Tensor) -> Tensor:
        return net(x)

    fields = {"plain": f, "adversarial": odeadv.AdversarialField(f, lambda x: x.square().mean(), ETA)}
    counts = {"whole graph": None} | {f"{k} segments": k for k in (4, 16, 64, 256) if k <= steps}
    peaks = {name: {label: peak(field, k) for label, k in counts.items()} for name, field in fields.items()}
    return {"steps": steps, "batch": batch, "width": width, "peaks": peaks}


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
    lines += ["", "| `checkpoints`, lie | MiB of tensors | seconds (quartiles) |", "| --- | --- | --- |"]
    for name, mebibytes in data["MiB of a recording"].items():
        lines.append(f"| {name} | {mebibytes:.0f} | {shown(data['seconds'][name])} |")
    solves = data["MiB of a solve and its gradient"]
    lines += [
        "",
        f"A neural ODE with {solves['steps']} midpoint steps, {solves['batch']} samples and two layers of width "
        f"{solves['width']}: MiB of tensors of a solve with its gradient. The adversarial field also has a "
        "recording, which keeps the costates of all nodes:",
        "",
        f"| `checkpoints` | {' | '.join(solves['peaks'])} |",
        "| --- | --- | --- |",
    ]
    for label in solves["peaks"]["plain"]:
        lines.append(f"| {label} | {' | '.join(f'{peaks[label]:.2f}' for peaks in solves['peaks'].values())} |")
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    plain, middle = data["counts"]["strang"], data["counts"]["strang-midpoint"]
    share = data["layers that are steps"] / data["layers"]  # the other layers are jumps, which lack a middle
    rows = [
        Limit(f"exact midpoint, {what} more a layer", (middle[what] - plain[what]) / data["layers"], share, most=1)
        for what in plain
    ]
    passes = sum(middle.values()) / sum(data["counts"]["lie"].values())
    rows.append(Limit("exact midpoint, time / lie", data["ratio to lie"]["strang-midpoint"], passes))
    whole = data["MiB of a recording"]["whole graph"]
    least, kept = min(data["MiB of a recording"].values()), data["MiB of states and costates"]
    return [*rows, Limit("memory of a recording, one segment per layer / whole graph", least / whole, kept / whole)]
