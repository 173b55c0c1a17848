"""Inspect a finished run: evaluate its weights, audit the attacks, diagnose its dynamics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odeadv import attacks, data
from odeadv.audit import audit
from odeadv.data import ImageDataset, to_float
from odeadv.diagnostics import diagnose
from odeadv.evaluation import Evaluation, Protocol, evaluate
from odeadv.experiments._config import DataConfig, RunConfig
from odeadv.experiments._folder import load_model
from odeadv.experiments._records import load_record
from odeadv.models import Averaged
from odeadv.support import plain
from odeadv.support.files import check_file, check_folder, write_json


def evaluate_run(
    checkpoint: Path,
    protocol: str | Protocol = "table2",
    *,
    folder: Path | None = None,
    images: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate the weights of a run on its own test images.

    Args:
        checkpoint: folder of a run, or its ``last.safetensors`` or ``best.safetensors``.
        protocol: a protocol of `odeadv.evaluate`, or its name.
        folder: folder with the data sets.
        images: number of test images, balanced over the classes; all if None.
        out: JSON file for the result. A journal next to it keeps finished work. If the evaluation is stopped, the same
            call resumes from the journal.
        progress: see `odeadv.evaluate`.
        options: further keyword arguments of `odeadv.evaluate`, such as ``batch_size``.

    Raises:
        ValueError, TypeError, OSError: naming the argument that does not fit.
    """
    check_file("out", out)
    net, info = _loaded(checkpoint)
    test = run_images(info, folder, images)
    journal = None if out is None else out.with_name(f"{out.name}.journal")
    result = evaluate(
        net, (test.test_images, test.test_labels), protocol, progress=progress, resume=journal, **options
    )  # fmt: skip
    if out is not None and journal is not None:
        write_json(out, result.to_dict())
        journal.unlink(missing_ok=True)
    return result


def audit_run(
    checkpoint: Path,
    *,
    folder: Path | None = None,
    images: int | None = 500,
    eps_255: float = 8.0,
    seed: int = 0,
    surrogate: Path | None = None,
    out: Path | None = None,
) -> tuple[Any, Path]:
    """Check the attacks on a run by the checklist for trustworthy attacks, and write the page.

    Args:
        checkpoint: folder of a run, or its weights.
        folder: folder with the data sets.
        images: number of test images.
        eps_255: radius in 1/255.
        seed: seed of the attacks' random starts.
        surrogate: another run. Its adversarial images are tried on this run.
        out: folder for the page; ``audit`` in the folder of the run if None.

    Returns:
        The result of `odeadv.audit.audit`, and the folder of the page.

    Raises:
        ValueError, TypeError, OSError: naming the argument that does not fit.
    """
    out = out or _run_folder(checkpoint) / "audit"
    check_folder("out", out)
    net, info = _loaded(checkpoint)
    test = run_images(info, folder, images)
    result = audit(
        net,
        (test.test_images, test.test_labels),
        eps=eps_255 / 255,
        generator=torch.Generator().manual_seed(seed),
        surrogate=None if surrogate is None else _loaded(surrogate)[0],
    )
    name = RunConfig.from_dict(info["run"]).name
    result.write(out, f"{name}, weights of epoch {info['epoch']}, the first test images of each class, seed {seed}.")
    return result, out


def diagnose_run(
    checkpoint: Path,
    other: Path | None = None,
    *,
    folder: Path | None = None,
    images: int | None = 128,
    eta: float | None = None,
    attack_255: float | None = None,
    out: Path | None = None,
) -> tuple[Path, tuple[float, ...]]:
    """Measure the dynamics of trained weights and write the page of `odeadv.diagnostics.diagnose`.

    Args:
        checkpoint: folder of a run, or its weights.
        other: another run, or its weights. It is shown on the same page, for the same images.
        folder: folder with the data sets.
        images: number of test images.
        eta: eta for all networks; the eta of their training if None.
        attack_255: radius of FGSM in 1/255. If it is given, the page follows the perturbation that FGSM makes instead
            of a random perturbation.
        out: folder for the page; ``diagnostics`` in the folder of the run if None.

    Returns:
        The folder of the page, and the eta of each network.

    Raises:
        ValueError, TypeError, OSError: naming the argument that does not fit.
    """
    if attack_255 is not None and not 0 < attack_255 <= 255:
        raise ValueError(f"attack: got {attack_255:g}, expected a radius in 1/255, above 0 and at most 255")
    out = out or _run_folder(checkpoint) / "diagnostics"
    check_folder("out", out)
    loaded = [_loaded(each) for each in (checkpoint, other) if each is not None]
    configs = [RunConfig.from_dict(info["run"]) for _, info in loaded]
    # Noise is averaged at inference, but the diagnostics need the dynamics of a single network.
    nets: list[Any] = [net.net if isinstance(net, Averaged) else net for net, _ in loaded]
    substep = _common_substep(configs, nets)
    etas = _etas(configs, eta)
    test = run_images(loaded[0][1], folder, images)
    device = next(nets[0].parameters()).device
    inputs, labels = to_float(test.test_images).to(device), test.test_labels.to(device)
    names = [config.name for config in configs] if other is not None else [""]
    fields = {name: net.field(inputs, labels, value) for name, net, value in zip(names, nets, etas, strict=True)}
    starts = None
    if attack_255 is not None:
        starts = {name: _attacked(net, inputs, labels, attack_255) for name, net in zip(names, nets, strict=True)}
    runs = " and ".join(f"{config.name}, eta {value:g}" for config, value in zip(configs, etas, strict=True))
    diagnose(fields, out, substep=substep, start=starts, title=f"{runs}, {len(labels)} test images")
    return out, etas


def _common_substep(configs: Sequence[RunConfig], nets: Sequence[Any]) -> Any:
    """Check that the networks can be shown side by side, and return their common sub-step."""
    substeps = [net.solve_options.get("substep") for net in nets]
    if len({config.name for config in configs}) < len(configs) or any(
        config.data.name != configs[0].data.name or substep != substeps[0]
        for config, substep in zip(configs, substeps, strict=True)
    ):
        raise ValueError("beside: expected another run, on the same data, of a network solved by the same sub-steps")
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


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _loaded(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    net, info = load_model(checkpoint)
    return net.to("cuda" if torch.cuda.is_available() else "cpu"), info


def run_images(info: dict[str, Any], folder: Path | None, images: int | None) -> ImageDataset:
    """Return the data of a run (its fold or subset) with some of its test images.

    Args:
        info: the dict that `load_model` returns.
        folder: folder with the data sets.
        images: number of test images, balanced over the classes; all if None.
    """
    config = plain.from_dict(DataConfig, info["run"]["data"])
    subset, _ = config.take(data.load(config.name, folder))
    return subset.subset(None, images)


def read_evaluation(path: Path, protocol: str = "table2", weights: str = "last") -> Evaluation:
    """Read an evaluation: the JSON of `odeadv evaluate`, or an evaluation in the record of a run.

    Args:
        path: JSON of an evaluation, a record, or the folder of a run.
        protocol: name of the evaluation in a record.
        weights: ``"last"`` or ``"best"``: the weights in a record.

    Raises:
        ValueError: if the file does not contain this evaluation.
        OSError: if it cannot be read.
    """
    file = path / "record.json" if path.is_dir() else path
    found = plain.read_json(file)
    if isinstance(found, dict) and "evaluations" in found:
        evaluations = load_record(file)["evaluations"].get(weights, {})
        if protocol not in evaluations:
            names = ", ".join(evaluations) or "none"
            raise ValueError(f"protocol: {file} has no {protocol!r} of its {weights} weights, but {names}")
        found = evaluations[protocol]
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected an evaluation or a run's record")
    try:
        return Evaluation.from_dict(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
