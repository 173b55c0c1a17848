"""Inspect a trained network: evaluate its weights, audit the attacks, diagnose its dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odeadv import attacks
from odeadv.attacks.balls import Norm
from odeadv.audit import Audit, audit
from odeadv.data import to_float
from odeadv.diagnostics import diagnose
from odeadv.evaluation import Evaluation, Protocol, evaluate
from odeadv.experiments._config import RunConfig, method_of
from odeadv.experiments._network import (
    check_images,
    inspected,
    is_import_name,
    load_run,
    own_network,
    run_folder,
    run_images,
)
from odeadv.experiments._records import load_record
from odeadv.experiments._tables import Row
from odeadv.models import Averaged
from odeadv.support import plain
from odeadv.support.files import check_file, check_folder, write_json

_AUDITED = 500  # 500 images are enough for the checklist and take minutes with a small network


def evaluate_run(
    network: str | Path,
    protocol: str | Protocol = "table2",
    *,
    weights: Path | None = None,
    dataset: str | None = None,
    folder: Path | None = None,
    images: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate the weights of a run on its own test images, or your own network on a data set.

    Args:
        network: folder of a run, or its ``last.safetensors`` or ``best.safetensors``; or one of
            `odeadv.models.pretrained_names`; or ``"module:name"``, such as ``"my_models:resnet"``: a network, or a
            function without arguments that returns one.
        protocol: a protocol of `odeadv.evaluate`, or its name.
        weights: a file with a state dict for your own network: ``.safetensors``, or written by ``torch.save``. The
            state dict may be a part of a checkpoint, under ``"state_dict"`` or ``"model"``.
        dataset: name of the data set for your own network, see `odeadv.data.load`.
        folder: folder with the data sets.
        images: number of test images, balanced over the classes; all if None.
        out: JSON file for the result. A journal next to it keeps finished work. If the evaluation is stopped, the same
            call resumes from the journal.
        progress: as for `odeadv.evaluate`.
        options: further keyword arguments of `odeadv.evaluate`, such as ``batch_size``.

    Raises:
        ValueError, TypeError, OSError: if an argument is wrong; the message names it.
    """
    check_file("out", out)
    subject = inspected(network, weights=weights, dataset=dataset, folder=folder, images=images)
    journal = None if out is None else out.with_name(f"{out.name}.journal")
    result = evaluate(
        subject.net, subject.data, protocol, progress=progress, resume=journal, num_classes=subject.data.num_classes,
        **options,
    )  # fmt: skip
    if out is not None and journal is not None:
        write_json(out, result.to_dict())
        journal.unlink(missing_ok=True)
    return result


def audit_run(
    network: str | Path,
    *,
    weights: Path | None = None,
    dataset: str | None = None,
    folder: Path | None = None,
    images: int | None = None,
    eps: float | None = None,
    norm: Norm = "linf",
    seed: int = 0,
    surrogate: str | Path | None = None,
    out: Path | None = None,
    **options: Any,
) -> tuple[Audit, Path | None]:
    """Check the attacks on a network by the checklist for trustworthy attacks, and write the page.

    Args:
        network: as for `evaluate_run`.
        weights: as for `evaluate_run`.
        dataset: as for `evaluate_run`.
        folder: folder with the data sets.
        images: number of test images, balanced over the classes; None takes 500, or all if there are fewer.
        eps: radius in pixel units of [0, 1]; None means 8/255, or 0.5 in the L2 norm.
        norm: ``"linf"`` or ``"l2"``.
        seed: seed of the attacks' random starts.
        surrogate: another run or network. Its adversarial images are tried on this one.
        out: folder for the page. None means ``audit`` in the folder of the run (in a folder with the name of a network
            of the package), and no page for your own network.
        options: further keyword arguments of `odeadv.audit.audit`, such as ``batch_size``.

    Returns:
        The result of `odeadv.audit.audit`, and the folder of the page (None if a page was not written).

    Raises:
        ValueError, TypeError, OSError: if an argument is wrong; the message names it.
    """
    if out is None and not is_import_name(network):
        out = run_folder(network) / "audit"
    check_folder("out", out)
    subject = inspected(network, weights=weights, dataset=dataset, folder=folder, images=images)
    other: nn.Module | None = None
    if surrogate is not None and is_import_name(surrogate):
        other = own_network(surrogate)[0]
    elif surrogate is not None:
        other, info = load_run(surrogate)
        if not is_import_name(network):  # the images of your own network may have another name
            check_images("surrogate", surrogate, info, subject.data, folder)
    few = min(_AUDITED, len(subject.data.test_labels))
    result = audit(
        subject.net,
        subject.data.subset(None, few) if images is None else subject.data,
        eps={"linf": 8 / 255, "l2": 0.5}.get(norm, 8 / 255) if eps is None else eps,
        norm=norm,
        generator=torch.Generator().manual_seed(seed),
        surrogate=other,
        num_classes=subject.data.num_classes,
        **options,
    )
    if out is not None:
        result.write(out, f"{subject.title}, {subject.data.name}, the first test images of each class, seed {seed}.")
    return result, out


def diagnose_run(
    checkpoint: str | Path,
    other: str | Path | None = None,
    *,
    folder: Path | None = None,
    images: int | None = 128,
    eta: float | None = None,
    attack_255: float | None = None,
    out: Path | None = None,
) -> tuple[Path, tuple[float, ...]]:
    """Measure the dynamics of trained weights and write the page of `odeadv.diagnostics.diagnose`.

    Args:
        checkpoint: folder of a run, or its weights, or one of `odeadv.models.pretrained_names`.
        other: another one. It is shown on the same page, for the same images.
        folder: folder with the data sets.
        images: number of test images.
        eta: eta for all networks; the eta of their training if None.
        attack_255: radius of FGSM in 1/255. If it is given, the page follows the perturbation of FGSM instead of a
            random perturbation.
        out: folder for the page; ``diagnostics`` in the folder of the run if None, as in `audit_run`.

    Returns:
        The folder of the page, and the eta of each network.

    Raises:
        ValueError, TypeError, OSError: if an argument is wrong; the message names it.
    """
    if attack_255 is not None and not 0 < attack_255 <= 255:
        raise ValueError(f"attack: got {attack_255:g}, expected a radius in 1/255, above 0 and at most 255")
    out = out or run_folder(checkpoint) / "diagnostics"
    check_folder("out", out)
    loaded = [load_run(each) for each in (checkpoint, other) if each is not None]
    configs = [RunConfig.from_dict(info["run"]) for _, info in loaded]
    # Noise is averaged at inference, but the diagnostics need the dynamics of a single network.
    nets: list[Any] = [net.net if isinstance(net, Averaged) else net for net, _ in loaded]
    substep = _common_substep(configs, nets)
    etas = _etas(configs, eta)
    test = run_images(loaded[0][1], folder, images)
    if other is not None:
        check_images("other", other, loaded[1][1], test, folder)
    device = next(nets[0].parameters()).device
    inputs, labels = to_float(test.test_images).to(device), test.test_labels.to(device)
    names = _names(configs)
    fields = {name: net.field(inputs, labels, value) for name, net, value in zip(names, nets, etas, strict=True)}
    starts = None
    if attack_255 is not None:
        starts = {name: _attacked(net, inputs, labels, attack_255) for name, net in zip(names, nets, strict=True)}
    title, about = _headline(configs, etas, len(labels))
    diagnose(fields, out, substep=substep, start=starts, title=title, about=about)
    return out, etas


def _names(configs: Sequence[RunConfig]) -> list[str]:
    """Return a short name of each network for legends: its method, or its run if both have the same method."""
    labels = [Row(method_of(config)).label for config in configs]
    if len(configs) == 1:
        return [""]
    return labels if len({*labels}) > 1 else [config.name for config in configs]


def _headline(configs: Sequence[RunConfig], etas: Sequence[float], images: int) -> tuple[str, str]:
    """Return the title of the page of a diagnosis, for readers, and the line below it, which names the runs."""
    methods = " and ".join(dict.fromkeys(Row(method_of(config)).label for config in configs))
    networks = " and ".join(dict.fromkeys(config.model.label for config in configs))
    runs = " and ".join(f"{config.name} {_with_eta(config, eta)}" for config, eta in zip(configs, etas, strict=True))
    return f"Dynamics: {methods}, {networks}, {configs[0].data.label}", f"{runs}, on {images} test images."


def _with_eta(config: RunConfig, eta: float) -> str:
    """Return the eta of a diagnosis as text. If the network was trained with another one, the text says so."""
    trained = float(getattr(config.training.defence, "eta", 0.0))
    if trained == eta:
        return f"with eta {eta:g}"
    return f"with eta {eta:g} (trained {f'with {trained:g}' if trained else 'without a defence'})"


def _common_substep(configs: Sequence[RunConfig], nets: Sequence[Any]) -> Any:
    """Check that the networks can be shown side by side, and return their common sub-step."""
    substeps = [net.solve_options.get("substep") for net in nets]
    if len({config.name for config in configs}) < len(configs):
        raise ValueError(f"other: got {configs[0].name} twice, expected another run")
    if any(substep != substeps[0] for substep in substeps):
        raise ValueError(f"other: got a network with sub-step {substeps[1]!r}, expected {substeps[0]!r}, as the first")
    return substeps[0]


def _etas(configs: Sequence[RunConfig], eta: float | None) -> tuple[float, ...]:
    """Return the eta of each network: ``eta`` if it is given, else the eta of the training."""
    if eta is not None:
        return (eta,) * len(configs)
    etas = [float(getattr(config.training.defence, "eta", 0.0)) for config in configs]
    # A run without a defence has eta 0. Next to another run it gets the eta of that run, so that they compare.
    return tuple(etas) if all(etas) else (max(etas),) * len(etas)


def _attacked(net: Any, images: Tensor, labels: Tensor, eps_255: float) -> Tensor:
    """Attack ``images`` with FGSM and return the initial state of the attacked images."""
    with torch.no_grad():
        state: Tensor = net.stem(attacks.fgsm(net, images, labels, eps=eps_255 / 255))
    return state


def read_evaluation(path: Path, protocol: str = "table2", weights: str = "last") -> Evaluation:
    """Read an evaluation: the JSON of `odeadv evaluate`, or an evaluation in the record of a run.

    Args:
        path: JSON of an evaluation, a record, or the folder of a run.
        protocol: name of the evaluation in a record.
        weights: ``"last"`` or ``"best"``: the weights in a record.

    Raises:
        ValueError: if the file does not contain this evaluation.
        OSError: if the file cannot be read.
    """
    file = path / "record.json" if path.is_dir() else path
    found = plain.read_json(file)
    if isinstance(found, dict) and "evaluations" in found:
        evaluations = load_record(file)["evaluations"].get(weights, {})
        if protocol not in evaluations:
            names = ", ".join(evaluations) or "another record, this one has none"
            raise ValueError(f"protocol: got {protocol!r} of the {weights} weights in {file}, expected {names}")
        found = evaluations[protocol]
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an evaluation or a run's record")
    try:
        return Evaluation.from_dict(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
