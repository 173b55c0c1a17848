"""The last iterates of IFGSM-20 and PGD-20, compared example by example with torchattacks and foolbox.

The images are test images of CIFAR-10. The networks come from the benchmark `evaluation`, in NCHW. The radius leaves
some images correctly classified, because all attacks agree if every image is misclassified. PGD has the same start in
all libraries. If an outcome differs, the margins of both attacked images are given (the logit of the label minus the
largest other logit). Rounding decides some examples: a gradient that is 0 in one order of summation and 1e-9 in another
moves a pixel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from odeadv.attacks import ifgsm, pgd
from odeadv.data import to_float

from . import evaluation
from ._timing import machine

STEPS, BATCH = 20, 128
# The network, eps and alpha, the attacks, and the libraries to compare with.
CASES = (
    ("ResNet-20, robust", 8 / 255, 2 / 255, ("IFGSM", "PGD"), ("torchattacks", "foolbox")),
    ("ResNet-20, natural", 1 / 255, 0.5 / 255, ("IFGSM", "PGD"), ("torchattacks", "foolbox")),
    ("ResNet-56, natural", 1 / 255, 0.5 / 255, ("IFGSM",), ("torchattacks",)),
)
Iterates = Callable[[nn.Module, Tensor, Tensor, Tensor | None, float, float], Tensor]


def of_torchattacks(net: nn.Module, x: Tensor, y: Tensor, start: Tensor | None, eps: float, alpha: float) -> Tensor:
    import torchattacks

    attack = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=STEPS, random_start=start is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same seed as in `starting_at`, so the start is the same
        return attack(x, y)


def of_foolbox(net: nn.Module, x: Tensor, y: Tensor, start: Tensor | None, eps: float, alpha: float) -> Tensor:
    import eagerpy
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=STEPS, random_start=start is not None)
    attack.get_random_start = lambda x0, epsilon: eagerpy.astensor(start)
    return attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=eps)[0]


PEERS: dict[str, Iterates] = {"torchattacks": of_torchattacks, "foolbox": of_foolbox}


def starting_at(x: Tensor, eps: float) -> Tensor:
    """Return the start that torchattacks draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)


def margins(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the logit of the label minus the largest other logit, shape (n,)."""
    with torch.no_grad():
        logits = net(x)
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def compared(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, kind: str, peers: list[str]
) -> dict[str, object]:
    """Count the outcomes and pixels that differ between our iterates and the iterates of ``peers``."""
    right = 0
    found = {name: {"outcomes that differ": 0, "images with other pixels": 0, "examples": []} for name in peers}
    for first in range(0, len(x), BATCH):
        images, labels = x[first : first + BATCH], y[first : first + BATCH]
        start = None if kind == "IFGSM" else starting_at(images, eps)
        if start is None:
            ours = ifgsm(net, images, labels, eps=eps, alpha=alpha, steps=STEPS)
        else:
            ours = pgd(net, images, labels, eps=eps, alpha=alpha, steps=STEPS, start=start, generator=None)
        own = margins(net, ours, labels)
        right += int((own > 0).sum())
        for name, row in found.items():
            theirs = PEERS[name](net, images, labels, start, eps, alpha)
            other = margins(net, theirs, labels)
            # The radius of the peers is eps up to rounding, so a pixel counts only if a step has another sign.
            pixels = ((ours - theirs).abs() > alpha / 10).flatten(1).any(dim=1)
            differ = ((own > 0) != (other > 0)).nonzero().flatten().tolist()
            row["images with other pixels"] += int(pixels.sum())
            row["outcomes that differ"] += len(differ)
            row["examples"] += [
                {"image": first + i, "margin here": float(own[i]), "margin there": float(other[i])} for i in differ
            ]
    return {"right here in %": 100 * right / len(x), "peers": found}


def run(quick: bool = False) -> dict[str, object]:
    n = 16 if quick else 1000
    data = evaluation.dataset()
    chosen = evaluation.QUICK if quick else evaluation.NETWORKS
    x, y = to_float(data.test_images[:n]).contiguous(), data.test_labels[:n]
    missing = []
    for name, peer in PEERS.items():
        try:
            peer(nn.Flatten(), x[:2, :, 0, :4].contiguous(), y[:2], None, 0.0, 0.0)
        except ImportError:
            missing.append(name)
    rows = []
    for network, eps, alpha, kinds, peers in CASES:
        net = chosen[network].trained(data, evaluation.FOLDER)
        for kind in kinds:
            here = [name for name in peers if name not in missing]
            row = compared(net, x, y, eps, alpha, kind, here)
            rows.append({"network": network, "attack": f"{kind}-{STEPS}", "eps in 1/255": 255 * eps, **row})
    return {"machine": machine(), "data": data.name, "images": n, "rows": rows, "not installed": missing}


def render(data: dict) -> str:
    lines = [
        f"{data['images']} images of {data['data']}.",
        "",
        "| network | attack | eps, 1/255 | right here, % | compared with | outcomes that differ | "
        "images with a pixel of another sign |",
        f"|{' --- |' * 7}",
    ]
    examples = []
    for row in data["rows"]:
        for name, peer in row["peers"].items():
            lines.append(
                f"| {row['network']} | {row['attack']} | {row['eps in 1/255']:g} | {row['right here in %']:.1f} | "
                f"{name} | {peer['outcomes that differ']} | {peer['images with other pixels']} |"
            )
            examples += [
                f"{row['network']}, {row['attack']}, image {e['image']}: margin {e['margin here']:.3g} here, "
                f"{e['margin there']:.3g} in {name}"
                for e in peer["examples"]
            ]
    if examples:
        lines += ["", "Outcomes that differ:", "", *(f"- {example}" for example in examples)]
    if data["not installed"]:
        lines += ["", f"Not installed: {', '.join(data['not installed'])}."]
    return "\n".join(lines)
