"""Schemes as training methods, compared on a ResNet-8 of width 8, digits of 16 by 16 pixels and equal seeds.

Loss and accuracies are measured on test images; IFGSM-20 is scored by its last iterate at eps = 8/255. The figures are
medians over the seeds, with quartiles. eta is the paper's 50 for batches of 128, halved for batches of 64. The cost of
a step is its time divided by the time of a step of natural training. Evaluations of f and vector-Jacobian products for
the loss are also counted. The gradient with respect to the weights is not counted; it costs the same for all schemes.
"""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import odeadv
from odeadv.data import ImageDataset, load, to_float
from odeadv.training import Defence, Draws, Layerwise, Natural, Step, TrainConfig, Undefended, train

from ._plots import panels, save
from ._timing import interleaved, machine, middle, ratio, shown, spread

BATCH, ETA, EPS, ALPHA, STEPS = 64, 25.0, 8 / 255, 2 / 255, 20
DEFENCES: dict[str, Defence] = {
    "natural": Undefended(),
    "lie": Layerwise("lie", ETA),
    "strang": Layerwise("strang", ETA),
    "strang-midpoint": Layerwise("strang-midpoint", ETA),
    "strang-symmetric": Layerwise("strang-symmetric", ETA),
    "lie, 2 sweeps": Layerwise("lie", ETA, sweeps=2),
    "lie, 4 sweeps": Layerwise("lie", ETA, sweeps=4),
}


def network(seed: int) -> odeadv.models.PreActResNet:
    return odeadv.models.preact_resnet(8, 8, generator=torch.Generator().manual_seed(seed))


def small(data: ImageDataset, quick: bool) -> ImageDataset:
    """Return the data set with every second pixel of the images in each direction."""
    count, tested = (BATCH, 20) if quick else (None, None)
    return dataclasses.replace(
        data,
        train_images=data.train_images[:count, ::2, ::2].contiguous(),
        train_labels=data.train_labels[:count],
        test_images=data.test_images[:tested, ::2, ::2].contiguous(),
        test_labels=data.test_labels[:tested],
    )


def trained(data: ImageDataset, defence: Defence, seed: int, epochs: int) -> dict[str, float]:
    """Train once; return loss and accuracies in percent on the test images."""
    net = network(seed)
    milestones = (epochs // 2, 3 * epochs // 4)
    config = TrainConfig(Natural(), defence, epochs=epochs, batch_size=BATCH, milestones=milestones, seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="eta")  # eta is already halved for batches of 64
        train(net, data, config)
    net.eval()
    images, labels = to_float(data.test_images), data.test_labels
    attacked = odeadv.attacks.ifgsm(net, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS)
    with torch.no_grad():
        logits, after = net(images), net(attacked)
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": 100.0 * float((logits.argmax(1) == labels).double().mean()),
        "IFGSM-20": 100.0 * float((after.argmax(1) == labels).double().mean()),
    }


def run(quick: bool = False) -> dict[str, object]:
    data = small(load("digits"), quick)
    seeds, epochs = ((0,), 1) if quick else ((0, 1, 2), 6)
    results = {}
    for name, defence in DEFENCES.items():
        rows = [trained(data, defence, seed, epochs) for seed in seeds]
        results[name] = {key: spread(row[key] for row in rows) for key in rows[0]}

    images, labels = to_float(data.train_images[:BATCH]), data.train_labels[:BATCH]
    net = network(0).to(memory_format=torch.channels_last).train()

    def step(defence: Defence) -> Callable[[], None]:
        def function() -> None:
            net.zero_grad(set_to_none=True)
            Natural()(Step(net, images, labels, defence, Draws(0, 0, slice(0, BATCH), BATCH))).loss.backward()

        return function

    seconds = interleaved({name: step(d) for name, d in DEFENCES.items()}, rounds=2 if quick else 15, warmup=2)
    cost = {}
    for name, defence in DEFENCES.items():
        if isinstance(defence, Layerwise):
            stats = odeadv.solve(net.field(images, labels, ETA), scheme=defence.scheme, sweeps=defence.sweeps).stats
        else:
            stats = odeadv.solve(net.field(images, labels)).stats
        cost[name] = {
            "recordings": stats.recordings,
            "evaluations of f": stats.evaluations["f"],
            "vector-Jacobian products": stats.vjps,
            "milliseconds": spread(1e3 * value for value in seconds[name]),
            "time to natural": ratio(seconds, name, "natural"),
        }
    return {"machine": machine(), "seeds": len(seeds), "epochs": epochs, "results": results, "cost": cost}


def render(data: dict) -> str:
    lines = [
        f"{data['epochs']} epochs, {data['seeds']} seeds, eta = {ETA:g} at batch {BATCH}.",
        "",
        "| pass | test loss | accuracy % | IFGSM-20 % | recordings | evaluations of f | products | time / natural |",
        f"|{' --- |' * 8}",
    ]
    for name, row in data["results"].items():
        cost = data["cost"][name]
        cells = [shown(row["loss"], ".3f"), shown(row["accuracy"], ".1f"), shown(row["IFGSM-20"], ".1f")]
        cells += [str(cost[key]) for key in ("recordings", "evaluations of f", "vector-Jacobian products")]
        lines.append(f"| {name} | {' | '.join(cells)} | {shown(cost['time to natural'])} |")
    return "\n".join(lines)


def plot(data: dict, path: Path) -> None:
    figure, axes = panels(1, 1, width=6.5)
    axis = axes[0, 0]
    for k, (name, row) in enumerate(data["results"].items()):
        x, y = data["cost"][name]["time to natural"], row["IFGSM-20"]
        bars = [[[middle(v) - v["low"]], [v["high"] - middle(v)]] for v in (x, y)]
        axis.errorbar(middle(x), middle(y), xerr=bars[0], yerr=bars[1], marker="o", color=f"C{k}", label=name)
    axis.set_xlabel("time of a step / natural")
    axis.set_ylabel("accuracy under IFGSM-20, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
