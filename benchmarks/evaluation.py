"""Robust evaluation beside torchattacks, foolbox and ART on a briefly trained ResNet-20, in fp32.

The protocol of Table 2: clean, FGSM and IFGSM-20 at 8/255 and 12/255, on the same images in batches of 128. The peers
are given an eager NCHW model, as their users do. Outcomes are compared example by example with those of plain
`evaluate`. The time of bf16 gradients has the check against full ones in it. One gradient of a batch is timed by itself
too: the evaluation of a compiled model has the seconds of compiling in it, which an evaluation of few images does not
make up for. Where the CPU only imitates bfloat16 it is left out.
Worst-so-far IFGSM-1000 is compared with torchattacks, which runs every step on every image, on a naturally trained
network and on one trained on FGSM examples. Peers that are not installed are left out.
"""

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odeadv
from odeadv._precision import bf16_is_native
from odeadv.data import DatasetNotFoundError, load, to_float
from odeadv.evaluation import PROTOCOLS, AttackSpec, Evaluation, Protocol, evaluate
from odeadv.evaluation._prepare import prepare

from ._timing import interleaved, machine, ratio, shown, spread
from .limits import Limit

EPS, ALPHA = (8 / 255, 12 / 255), 2 / 255
AIM = {"full": 1.9, "bf16": 3.0, "natural": 20.0, "robust": 2.5}
NATIVE = bf16_is_native(torch.device("cpu"))
COMPILED = "odeadv, fold, compile"
OWN: dict[str, dict[str, object]] = {"odeadv": {}, "odeadv, fold": {"fold": True}}
if NATIVE:
    OWN["odeadv, fold, bf16 gradients"] = {"fold": True, "gradients": "bf16"}
Attack = Callable[[float, int], Tensor]  # eps and steps (1: FGSM) to attacked images


def torchattacks_attack(net: nn.Module, x: Tensor, y: Tensor) -> Attack:
    import torchattacks

    def attack(eps: float, steps: int) -> Tensor:
        if steps == 1:
            return torchattacks.FGSM(net, eps=eps)(x, y)
        return torchattacks.PGD(net, eps=eps, alpha=ALPHA, steps=steps, random_start=False)(x, y)

    return attack


def foolbox_attack(net: nn.Module, x: Tensor, y: Tensor) -> Attack:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1))

    def attack(eps: float, steps: int) -> Tensor:
        if steps == 1:
            run = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        else:
            run = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=ALPHA, steps=steps, random_start=False)
        return run(model, x, y, epsilons=eps)[1]

    return attack


def art_attack(net: nn.Module, x: Tensor, y: Tensor) -> Attack:
    from art.attacks.evasion import BasicIterativeMethod, FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = nn.CrossEntropyLoss()
        model = PyTorchClassifier(
            net, loss=loss, input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu"
        )
    images, labels = x.numpy(), F.one_hot(y, 10).numpy()

    def attack(eps: float, steps: int) -> Tensor:
        if steps == 1:
            run = FastGradientMethod(model, eps=eps, batch_size=len(x))
        else:
            run = BasicIterativeMethod(model, eps=eps, eps_step=ALPHA, max_iter=steps, batch_size=len(x), verbose=False)
        return torch.from_numpy(run.generate(images, labels))

    return attack


PEERS = {"torchattacks": torchattacks_attack, "foolbox": foolbox_attack, "ART": art_attack}


def images_and_labels() -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """CIFAR-10 if it is found, else the digits: name, training and test images in [0, 1], labels."""
    try:
        data = load("cifar10", download=False)
    except DatasetNotFoundError:
        data = load("digits")
    return data.name, to_float(data.train_images), data.train_labels, to_float(data.test_images), data.test_labels


def trained(depth: int, x: Tensor, y: Tensor, epochs: int, eps: float) -> nn.Module:
    """A ResNet after a few epochs, on FGSM examples if ``eps`` is above 0."""
    generator = torch.Generator().manual_seed(0)
    net = odeadv.models.preact_resnet(depth, generator=generator).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(64):
            images = x[part].contiguous(memory_format=torch.channels_last)
            if eps:
                images = odeadv.attacks.fgsm(net, images, y[part], eps=eps)
            optimizer.zero_grad()
            F.cross_entropy(net.train()(images), y[part]).backward()
            optimizer.step()
    return net.to(memory_format=torch.contiguous_format).eval()


def peer_outcomes(make: Callable[..., Attack], net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Clean, FGSM and IFGSM outcomes, (5, n) bool: what a user of the library would write."""
    rows = []
    for images, labels in zip(x.split(128), y.split(128), strict=True):
        attack = make(net, images, labels)
        with torch.no_grad():
            row = [net(images)]
        for count in (1, steps):
            for eps in EPS:
                attacked = attack(eps, count)
                with torch.no_grad():
                    row.append(net(attacked))
        rows.append(torch.stack([logits.argmax(dim=1) == labels for logits in row]))
    return torch.cat(rows, dim=1)


def own_outcomes(result: Evaluation) -> Tensor:
    return torch.stack([result.clean_outcomes, *(attack.outcomes for attack in result.attacks)])


def table2(net: nn.Module, x: Tensor, y: Tensor, protocol: Protocol, rounds: int, quick: bool) -> dict[str, object]:
    steps = protocol.attacks[2].steps
    found: dict[str, Tensor] = {}
    functions: dict[str, Callable[[], None]] = {}

    def own(name: str, options: dict[str, object]) -> Callable[[], None]:
        def function() -> None:
            found[name] = own_outcomes(evaluate(net, (x, y), protocol, **options))

        return function

    def peer(name: str, make: Callable[..., Attack]) -> Callable[[], None]:
        def function() -> None:
            found[name] = peer_outcomes(make, net, x, y, steps)

        return function

    missing = []
    for name, make in PEERS.items():
        try:
            make(net, x[:2], y[:2])
        except ImportError:
            missing.append(name)
        else:
            functions[name] = peer(name, make)
    options = OWN if quick else OWN | {COMPILED: {"fold": True, "compile": True}}
    functions |= {name: own(name, chosen) for name, chosen in options.items()}
    seconds = interleaved(functions, rounds=rounds, warmup=0 if not quick else 1)
    fastest = min((name for name in functions if name in PEERS), key=lambda n: min(seconds[n]), default=None)
    plain = evaluate(net, (x, y), protocol)
    reference = own_outcomes(plain)
    return {
        "images": len(x),
        "steps": steps,
        "accuracy in %": (100 * reference.float().mean(dim=1)).tolist(),
        "forward passes an image": plain.forward_passes / len(x),
        "gradients an image": plain.gradient_evaluations / len(x),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "outcomes that differ": {name: (rows != reference).sum(dim=1).tolist() for name, rows in found.items()},
        "fastest peer": fastest,
        "times faster than the fastest peer": {name: ratio(seconds, fastest, name) for name in options}
        if fastest
        else {},
        "not installed": missing,
    }


def one_gradient(net: nn.Module, x: Tensor, y: Tensor, rounds: int, quick: bool) -> dict[str, object]:
    """Cross-entropy's gradient at the images, by the ways that `evaluate` has of computing it."""
    fast = x.contiguous(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], object]] = {}

    def add(name: str, folded: bool, compiled: bool, kind: str) -> None:
        ready = prepare(net, fast, batch_size=len(x), folded=folded, compiled=compiled, gradients=kind)
        functions[name] = lambda: ready.scorer(y).gradient(fast)

    def plain() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)[0]

    functions["plain loop, NCHW"] = plain
    add("channels_last", False, False, "full")
    add("fold", True, False, "full")
    if not quick:
        add("compile", False, True, "full")
        add("fold and compile", True, True, "full")
    if NATIVE:
        add("fold, bf16", True, False, "bf16")
    seconds = interleaved(functions, rounds=rounds)
    return {
        "images": len(x),
        "milliseconds": {name: spread(1e3 * value for value in values) for name, values in seconds.items()},
        "times faster than the plain loop": {name: ratio(seconds, "plain loop, NCHW", name) for name in functions},
    }


def worst_so_far(net: nn.Module, x: Tensor, y: Tensor, steps: int, rounds: int) -> dict[str, object]:
    """IFGSM at 8/255 of many steps: our queue, and torchattacks, which scores the last iterate."""
    protocol = Protocol("worst", (AttackSpec("ifgsm", EPS[0], ALPHA, steps, "worst"),))
    result = evaluate(net, (x, y), protocol, fold=True)
    functions: dict[str, Callable[[], object]] = {"odeadv, fold": lambda: evaluate(net, (x, y), protocol, fold=True)}
    try:
        attack = torchattacks_attack(net, x, y)
        attack(EPS[0], 2)
    except ImportError:
        attack = None
    else:
        functions["torchattacks"] = lambda: attack(EPS[0], steps)
    seconds = interleaved(functions, rounds=rounds, warmup=0)
    times = ratio(seconds, "torchattacks", "odeadv, fold") if attack else None
    return {
        "images": len(x),
        "steps": steps,
        "clean accuracy": result.clean_accuracy,
        "worst-so-far accuracy": result.attacks[0].worst_so_far_accuracy,
        "gradients an image": result.gradient_evaluations / len(x),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times faster than torchattacks": times,
    }


def run(quick: bool = False) -> dict[str, object]:
    depth, epochs, n, few, long, rounds = (8, 1, 16, 8, 20, 1) if quick else (20, 4, 128, 32, 1000, 3)
    name, train, train_labels, test, test_labels = images_and_labels()
    count = 256 if quick else 2048
    began = time.perf_counter()
    natural = trained(depth, train[:count], train_labels[:count], epochs, 0.0)
    robust = trained(depth, train[:count], train_labels[:count], epochs, EPS[0])
    took = time.perf_counter() - began
    x, y = test[:n].contiguous(), test_labels[:n]
    protocol = PROTOCOLS["table2"]
    if quick:
        specs = (AttackSpec(s.name, s.eps, s.alpha, min(s.steps, 3)) for s in protocol.attacks)
        protocol = Protocol("quick", tuple(specs))
    return {
        "machine": machine(),
        "network": f"ResNet-{depth}, {epochs} epochs on {count} images of {name}",
        "seconds of training": took,
        "table2": table2(natural, x, y, protocol, rounds, quick),
        "gradient": one_gradient(natural, x[:128], y[:128], 3 if quick else 15, quick),
        "worst": {
            kind: worst_so_far(net, x[:few], y[:few], long, 1)
            for kind, net in (("natural", natural), ("robust", robust))
        },
    }


def render(data: dict) -> str:
    part = data["table2"]
    lines = [
        f"{data['network']}; {part['images']} images, IFGSM-{part['steps']}: {part['forward passes an image']:g} "
        f"forward passes and {part['gradients an image']:g} gradients an image.",
        "",
        f"| | seconds (quartiles) | times faster than {part['fastest peer']} | differ: clean, FGSM, IFGSM |",
        "| --- | --- | --- | --- |",
    ]
    faster = part["times faster than the fastest peer"]
    for name, figure in part["seconds"].items():
        times = shown(faster[name]) if name in faster else ""
        differ = ", ".join(str(value) for value in part["outcomes that differ"][name])
        lines.append(f"| {name} | {shown(figure)} | {times} | {differ} |")
    gradient = data["gradient"]
    lines += [
        "",
        f"| one gradient of {gradient['images']} images | milliseconds | times faster than the plain loop |",
        "| --- | --- | --- |",
    ]
    for name, figure in gradient["milliseconds"].items():
        times = shown(gradient["times faster than the plain loop"][name])
        lines.append(f"| {name} | {shown(figure, '.0f')} | {times} |")
    lines += [
        "",
        "| worst-so-far IFGSM | steps | clean, % | robust, % | gradients an image | times faster than torchattacks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in data["worst"].items():
        times = row["times faster than torchattacks"]
        faster = shown(times) if times else ""
        lines.append(
            f"| {kind} | {row['steps']} | {100 * row['clean accuracy']:.1f} | "
            f"{100 * row['worst-so-far accuracy']:.1f} | {row['gradients an image']:.1f} | {faster} |"
        )
    if part["not installed"]:
        lines += ["", f"Not installed: {', '.join(part['not installed'])}."]
    return "\n".join(lines)


def limits(data: dict) -> list[Limit]:
    """Speed against the peers."""
    found = []
    faster = data["table2"]["times faster than the fastest peer"]
    for name, times in faster.items():
        aim = AIM["bf16" if "bf16" in name else "full"]
        found.append(Limit(f"Table 2 protocol, {name}: times faster than the fastest peer", times, least=aim))
    for kind, row in data["worst"].items():
        times = row["times faster than torchattacks"]
        if times is not None:
            what = f"worst-so-far IFGSM-{row['steps']}, {kind} network: times faster than torchattacks"
            found.append(Limit(what, times, least=AIM[kind]))
    return found
