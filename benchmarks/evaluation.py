"""Robust evaluation compared with torchattacks, foolbox and ART on trained ResNets, in fp32.

The protocol of Table 2: clean, FGSM and IFGSM-20 at 8/255 and 12/255, on the same images in batches of 128. The peers
are given an eager NCHW model, as their users do; the ResNet-56 is compared with torchattacks only. Outcomes are
compared example by example with the outcomes of plain `evaluate`. One gradient of a batch is timed separately, because
an evaluation of a compiled model includes the time to compile. This time pays only with many images. The floor of an
evaluation is the time of the convolutions of its gradients, in the same precision. IFGSM-1000, worst so far and by its
last iterate, is compared with torchattacks, which runs every step on every image. The networks are a naturally trained
ResNet-20 and one trained on one-step adversarial examples from random starts. APGD-T (nine targets, 100
steps) is compared with pyautoattack, the authors' code, on a ResNet-8 trained in the same way; both draw their own
starts. Peers that are not installed are left out. Networks are trained once and kept in build/benchmarks/networks.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import odeadv
from odeadv.data import DatasetNotFoundError, ImageDataset, load, to_float
from odeadv.evaluation import PROTOCOLS, AttackSpec, Evaluation, Protocol, evaluate
from odeadv.evaluation._prepare import prepare
from odeadv.training import Natural, Pgd, TrainConfig, train

from ._convolutions import KINDS, convolutions
from ._timing import interleaved, machine, middle, ratio, shown, spread
from .limits import Limit

EPS, ALPHA = (8 / 255, 12 / 255), 2 / 255
AIM = {"full": 1.9, "natural": 20.0, "robust": 2.5, "targeted": 1.0}
COMPILED, ALONE = "odeadv, fold, compile", "its convolutions alone"
OWN: dict[str, dict[str, object]] = {"odeadv": {}, "odeadv, fold": {"fold": True}}
Attack = Callable[[float, int], Tensor]  # maps eps and steps (1 means FGSM) to attacked images


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


@dataclass(frozen=True)
class Network:
    """A network to evaluate, and its training.

    Attributes:
        depth: the depth of a ResNet of width 16.
        images, epochs: the size of its training.
        robust: True if it is trained on FGSM examples at 8/255 from random starts (alpha = 10/255).
    """

    depth: int
    images: int
    epochs: int
    robust: bool = False

    def trained(self, data: ImageDataset, folder: Path) -> nn.Module:
        """Return the network in evaluation mode and NCHW; read it from ``folder`` if the folder has it."""
        net = odeadv.models.preact_resnet(
            self.depth, mean=data.mean, std=data.std, generator=torch.Generator().manual_seed(0)
        )
        kind = "robust" if self.robust else "natural"
        path = folder / f"{data.name}-resnet{self.depth}-{kind}-{self.images}x{self.epochs}.safetensors"
        if path.exists():
            net.load_state_dict(load_file(path))
        else:
            objective = Pgd(eps=EPS[0], alpha=10 / 255, steps=1) if self.robust else Natural()
            drops = (self.epochs // 2, self.epochs * 3 // 4)
            train(net, data.subset(self.images, None), TrainConfig(objective, epochs=self.epochs, milestones=drops))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


NETWORKS = {
    "ResNet-20, natural": Network(20, 10_000, 8),
    "ResNet-20, robust": Network(20, 4_000, 12, robust=True),
    "ResNet-56, natural": Network(56, 4_000, 5),
    "ResNet-8, robust": Network(8, 4_000, 8, robust=True),
}
QUICK = {name: Network(8, 128, 1, network.robust) for name, network in NETWORKS.items()}
FOLDER = Path("build/benchmarks/networks")


def dataset() -> ImageDataset:
    """Load CIFAR-10 if it is found, and the digits otherwise."""
    try:
        return load("cifar10", download=False)
    except DatasetNotFoundError:
        return load("digits")


def peer_outcomes(make: Callable[..., Attack], net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Return clean, FGSM and IFGSM outcomes, bool (5, n), in the code that a user of the library would write."""
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


def table2(
    net: nn.Module, x: Tensor, y: Tensor, protocol: Protocol, peers: Sequence[str], rounds: int, quick: bool
) -> dict[str, object]:
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
    for name in peers:
        make = PEERS[name]
        try:
            make(net, x[:2], y[:2])
        except ImportError:
            missing.append(name)
        else:
            functions[name] = peer(name, make)
    options = OWN if quick else OWN | {COMPILED: {"fold": True, "compile": True}}
    functions |= {name: own(name, chosen) for name, chosen in options.items()}
    seconds = interleaved(functions, rounds=rounds, warmup=0)
    fastest = min((name for name in functions if name in PEERS), key=lambda n: median(seconds[n]), default=None)
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
    """Time the gradient of the cross-entropy at the images, in each way that `evaluate` can compute it."""
    fast = x.contiguous(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], object]] = {}

    def add(name: str, folded: bool, compiled: bool) -> None:
        ready = prepare(net, fast, folded=folded, compiled=compiled)
        functions[name] = lambda: ready.scorer(y).gradient(fast)

    def plain() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)[0]

    functions["plain loop, NCHW"] = plain
    add("channels_last", False, False)
    add("fold", True, False)
    if not quick:
        add("compile", False, True)
        add("fold and compile", True, True)
    passes = convolutions(net, fast, torch.float32)
    functions[ALONE] = lambda: [passes[kind]() for kind in KINDS[:2]]
    seconds = interleaved(functions, rounds=rounds)
    return {
        "images": len(x),
        "milliseconds": {name: spread(1e3 * value for value in values) for name, values in seconds.items()},
        "times faster than the plain loop": {name: ratio(seconds, "plain loop, NCHW", name) for name in functions},
    }


def long_runs(net: nn.Module, x: Tensor, y: Tensor, steps: int, rounds: int) -> dict[str, object]:
    """Time IFGSM at 8/255 with many steps, worst so far and last iterate; torchattacks has only the last iterate."""
    kinds = {"worst so far": "worst", "last iterate": "last"}
    protocols = {
        name: Protocol(name, (AttackSpec("ifgsm", EPS[0], ALPHA, steps, kind),)) for name, kind in kinds.items()
    }
    results: dict[str, Evaluation] = {}
    final: list[Tensor] = []
    functions: dict[str, Callable[[], object]] = {
        name: lambda name=name: results.update({name: evaluate(net, (x, y), protocols[name], fold=True)})
        for name in protocols
    }
    try:
        attack = torchattacks_attack(net, x, y)
    except ImportError:
        attack = None
    else:
        functions["torchattacks"] = lambda: final.append(attack(EPS[0], steps))
    seconds = interleaved(functions, rounds=rounds, warmup=0)
    accuracy = {
        "worst so far": results["worst so far"].attacks[0].worst_so_far_accuracy,
        "last iterate": results["last iterate"].attacks[0].robust_accuracy,
    }
    differ = None
    if attack is not None:
        with torch.no_grad():
            correct = net(final[-1]).argmax(dim=1) == y
        differ = int((correct != results["last iterate"].attacks[0].outcomes).sum())
    return {
        "images": len(x),
        "steps": steps,
        "clean accuracy": results["last iterate"].clean_accuracy,
        "accuracy": accuracy,
        "gradients an image": {name: result.gradient_evaluations / len(x) for name, result in results.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times faster than torchattacks": {name: ratio(seconds, "torchattacks", name) for name in results}
        if attack
        else {},
        "last iterates with another outcome than torchattacks'": differ,
    }


def targeted(net: nn.Module, x: Tensor, y: Tensor, steps: int, rounds: int) -> dict[str, object]:
    """Time APGD-T at 4/255, a radius that some images survive; pyautoattack draws other starts."""
    spec = AttackSpec("apgd_t", 4 / 255, steps=steps, score="worst")
    held: dict[str, Tensor] = {}
    results: list[Evaluation] = []

    def own() -> None:
        results.append(evaluate(net, (x, y), spec))
        held["odeadv"] = results[-1].attacks[0].worst_so_far_outcomes

    functions: dict[str, Callable[[], object]] = {"odeadv": own}
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        pass
    else:

        def authors() -> None:
            with torch.random.fork_rng(devices=[]):
                attack = AutoAttack(net, eps=spec.eps, version="custom", attacks=["apgd-t"], seed=0, device="cpu")
                attack.apgd_targeted.n_iter = steps
                attacked, _ = attack.run_standard_evaluation(x, y, batch_size=128)
            with torch.no_grad():
                held["pyautoattack"] = net(attacked).argmax(dim=1) == y

        functions["pyautoattack"] = authors
    seconds = interleaved(functions, rounds=rounds, warmup=0)
    peer = "pyautoattack" in seconds
    return {
        "images": len(x),
        "steps": steps,
        "clean accuracy": results[-1].clean_accuracy,
        "accuracy": {name: float(rows.float().mean()) for name, rows in held.items()},
        "gradients an image": results[-1].gradient_evaluations / len(x),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "outcomes that differ": int((held["odeadv"] != held["pyautoattack"]).sum()) if peer else None,
        "times faster than pyautoattack": ratio(seconds, "pyautoattack", "odeadv") if peer else None,
    }


def run(quick: bool = False) -> dict[str, object]:
    many, few, long = (8, 4, 10) if quick else (256, 16, 1000)
    data = dataset()
    chosen = QUICK if quick else NETWORKS
    nets = {name: network.trained(data, FOLDER) for name, network in chosen.items()}
    x, y = to_float(data.test_images[:many]).contiguous(), data.test_labels[:many]
    protocol = PROTOCOLS["table2"]
    if quick:
        specs = (AttackSpec(s.name, s.eps, s.alpha, min(s.steps, 3)) for s in protocol.attacks)
        protocol = Protocol("quick", tuple(specs))
    compared = {"ResNet-20, natural": (list(PEERS), many), "ResNet-56, natural": (list(PEERS)[:1], many // 2)}
    return {
        "machine": machine(),
        "data": data.name,
        "networks": {name: asdict(network) for name, network in chosen.items()},
        "table2": {
            name: table2(nets[name], x[:n], y[:n], protocol, peers, 1 if quick else 3, quick)
            for name, (peers, n) in compared.items()
        },
        "gradient": {name: one_gradient(nets[name], x[:128], y[:128], 3 if quick else 9, quick) for name in compared},
        "long": {
            name: long_runs(nets[f"ResNet-20, {name}"], x[:few].contiguous(), y[:few], long, 1 if quick else 3)
            for name in ("natural", "robust")
        },
        "targeted": targeted(
            nets["ResNet-8, robust"],
            to_float(data.test_images[: few if quick else 1000]).contiguous(),
            data.test_labels[: few if quick else 1000],
            5 if quick else 100,
            1,
        ),
    }


def render(data: dict) -> str:
    lines = []
    for name, part in data["table2"].items():
        network = data["networks"][name]
        lines += [
            f"{name}: {network['epochs']} epochs on {network['images']} images of {data['data']}. Accuracy: "
            f"{', '.join(f'{value:.1f}' for value in part['accuracy in %'])} % (clean, FGSM, IFGSM-{part['steps']}) on "
            f"{part['images']} images. Cost: {part['forward passes an image']:g} forward passes and "
            f"{part['gradients an image']:g} gradients per image.",
            "",
            f"| | seconds (quartiles) | times faster than {part['fastest peer']} | differ: clean, FGSM, IFGSM |",
            "| --- | --- | --- | --- |",
        ]
        faster = part["times faster than the fastest peer"]
        for solver, figure in part["seconds"].items():
            times = shown(faster[solver]) if solver in faster else ""
            differ = ", ".join(str(value) for value in part["outcomes that differ"][solver])
            lines.append(f"| {solver} | {shown(figure)} | {times} | {differ} |")
        if part["not installed"]:
            lines += ["", f"Not installed: {', '.join(part['not installed'])}."]
        gradient = data["gradient"][name]
        lines += [
            "",
            f"| one gradient of {gradient['images']} images | milliseconds | times faster than the plain loop |",
            "| --- | --- | --- |",
        ]
        for way, figure in gradient["milliseconds"].items():
            times = shown(gradient["times faster than the plain loop"][way])
            lines.append(f"| {way} | {shown(figure, '.0f')} | {times} |")
        lines.append("")
    lines += [
        "| IFGSM of ResNet-20 | images | steps | score | clean, % | robust, % | gradients per image | seconds | "
        "times faster than torchattacks |",
        f"|{' --- |' * 9}",
    ]
    notes = []
    for kind, row in data["long"].items():
        for score, gradients in row["gradients an image"].items():
            faster = row["times faster than torchattacks"]
            times, took = shown(faster[score], ".1f") if faster else "", shown(row["seconds"][score])
            lines.append(
                f"| {kind} | {row['images']} | {row['steps']} | {score} | {100 * row['clean accuracy']:.1f} | "
                f"{100 * row['accuracy'][score]:.1f} | {gradients:.1f} | {took} | {times} |"
            )
        differ = row["last iterates with another outcome than torchattacks'"]
        if differ is not None:
            notes.append(f"{differ} of {row['images']} ({kind})")
    if notes:
        lines += ["", f"Last iterates with another outcome than torchattacks': {', '.join(notes)}."]
    if "targeted" in data:  # results of earlier versions lack it
        lines += _rendered_targeted(data["targeted"])
    return "\n".join(lines)


def _rendered_targeted(row: dict) -> list[str]:
    lines = [
        "",
        f"| APGD-T of ResNet-8, {row['images']} images, {row['steps']} steps | robust, % | seconds |",
        "| --- | --- | --- |",
    ]
    for name, figure in row["seconds"].items():
        lines.append(f"| {name} | {100 * row['accuracy'][name]:.1f} | {shown(figure)} |")
    lines += ["", f"Clean {100 * row['clean accuracy']:.1f} %; {row['gradients an image']:.1f} gradients per image."]
    if row["outcomes that differ"] is not None:
        lines[-1] += f" {row['outcomes that differ']} outcomes differ; both draw their own starts."
    return lines


def _alone(data: dict, name: str, gradients: float) -> float:
    """Return the seconds that the convolutions take for ``gradients`` gradients of images."""
    gradient = data["gradient"][name]
    one = middle(gradient["milliseconds"][ALONE])
    return gradients * one / 1e3 / gradient["images"]


def limits(data: dict) -> list[Limit]:
    """Return speeds relative to the peers; the floor is the peer's time divided by the time of the convolutions."""
    found = []
    for name, part in data["table2"].items():
        peer = part["fastest peer"]
        if peer is None:
            continue
        for solver, times in part["times faster than the fastest peer"].items():
            least = _alone(data, name, part["gradients an image"] * part["images"])
            what = f"Table 2 protocol, {name}, {solver}: times faster than {peer}"
            ceiling = middle(part["seconds"][peer]) / least
            found.append(Limit(what, times, ceiling, least=AIM["full"]))
    for kind, row in data["long"].items():
        for score, times in row["times faster than torchattacks"].items():
            what = f"IFGSM-{row['steps']}, {kind} network, {score}: times faster than torchattacks"
            aim = AIM[kind] if score == "worst so far" else None
            asked = row["gradients an image"][score] * row["images"]
            least = _alone(data, "ResNet-20, natural", asked)
            ceiling = middle(row["seconds"]["torchattacks"]) / least if least else None
            found.append(Limit(what, times, ceiling, least=aim, form=".1f"))
    row = data.get("targeted")
    if row is not None and row["times faster than pyautoattack"] is not None:
        what = f"APGD-T, {row['images']} images, ResNet-8: times faster than pyautoattack"
        found.append(Limit(what, row["times faster than pyautoattack"], least=AIM["targeted"]))
    return found
