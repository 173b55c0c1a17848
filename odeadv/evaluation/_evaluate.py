"""Running a protocol, sharing the work that its attacks have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from odeadv._version import __version__
from odeadv.attacks.checks import check_images, check_labels, check_logits, check_model
from odeadv.attacks.objective import attacking
from odeadv.evaluation._evaluation import Evaluation
from odeadv.evaluation._journal import Journal, probe_logits
from odeadv.evaluation._prepare import Gradients, prepare
from odeadv.evaluation._session import Session
from odeadv.evaluation.protocols import Protocol, resolve_protocol
from odeadv.evaluation.trust import (
    GRADIENT_PROBES,
    PROBES,
    Behaviour,
    batch_dependence,
    batch_forwards,
    behaviour,
    differs,
    refuse,
    refuse_batches,
    whole_batch_dependence,
)
from odeadv.support.checks import integer
from odeadv.support.digests import data_digest, model_digest
from odeadv.support.extras import extra
from odeadv.support.precision import warn_of_imitated_bf16


def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    protocol: str | Protocol = "table2",
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    channels_last: bool = True,
    progress: Callable[[int, int], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    stochastic: bool = False,
    fold: bool = False,
    compile: bool = False,
    gradients: Gradients = "full",
) -> Evaluation:
    """Clean and robust accuracy of ``model`` on ``data``; the model runs in eval mode and is restored afterwards.

    The figures are those of the functions of `odeadv.attacks` called one by one, with less work: one clean forward
    and backward pass gives the clean accuracy, FGSM at every radius and the first step of every IFGSM; attacks that
    differ in their number of steps only come from one run; IFGSM at two radii is one run for as long as the iterates
    are the same; the forward pass that scores an iterate is that of the next step's gradient. Where only the
    worst-so-far score is asked for (`AttackSpec.score`), fooled examples leave and the batch is refilled. Examples
    whose iterates come back, to the last bit, to where they were go round in a cycle and leave long runs: their later
    outcomes are those of the cycle (where the same images have the same gradients, which is tried first). Weight
    gradients are never computed. Arithmetic is in the dtype of the images, without any autocast of its own.

    Args:
        model: images to logits (n, classes); its normalisation inside.
        data: (images, labels) on any device. Images: floating, (n, channels, h, w) or (n, ...), in [0, 1]; or uint8,
            (n, h, w, channels), converted batch by batch to the model's dtype / 255. Labels: (n,) int64.
        protocol: one of `PROTOCOLS` (``"table1"``, ``"table2"``, ``"table6"``, ``"autoattack"``) or a `Protocol`.
        batch_size: images in one forward pass.
        device: where to compute; None takes the model's. The model is not moved.
        channels_last: lay 4-D images out channels-last in memory (same values; often faster convolutions),
            unless the model takes contiguous ones only, which ``notes`` then say.
        progress: called as ``progress(done, total)``, in batches, after each batch, and before the first where a
            journal is resumed; `ProgressLine` prints the time left.
        resume: path of a journal. Finished batches are written there, and if it exists already its batches are not
            run again. A journal of another model, data set, protocol, batch size or setting is refused.
        seed: of the attacks and models that draw random numbers; each batch starts from its own.
        num_classes: refuse a model with another number of logits; None does not check.
        stochastic: accept a model whose answers differ between two passes on the same images; every outcome is then
            one draw. Average over passes (EOT) where you can.
        fold: fold batch norms, on a copy of the model; outcomes are the same but for ties decided by rounding.
        compile: compile a copy of the model with ``torch.compile``, for full batches of FGSM and IFGSM; it takes
            seconds to minutes. Where it fails a warning says so and the evaluation goes on without.
        gradients: ``"bf16"`` differentiates a copy of the model under bfloat16 autocast, for FGSM and IFGSM; what an
            option does not serve is in ``notes``. Images are scored in full
            precision all the same, and ``checks`` of the result says how many outcomes of a subsample differ from
            those by full gradients.

    Returns:
        Robust accuracies by last iterate, and apart from them worst-so-far accuracies, with outcomes and cost.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if an argument is out of range or of the wrong shape, the protocol is unknown, logits or gradients
            are not finite, the forward changes buffers or parameters, two forward passes differ (unless
            ``stochastic``), a pass differs where a gradient could be asked for, the answer to an image depends on its
            batch, the images' dtype is none that the model takes, or the first images have other logits at the end than
            they had at the beginning.
        ImportError: if the protocol has AutoAttack and pyautoattack is not installed.

    Warns:
        RuntimeWarning: if the model could not be folded or compiled, or bf16 is only imitated on this CPU.
    """
    with extra("evaluate"):
        import numpy  # noqa: F401  # said before any work, not when outcomes are packed
    began = time.perf_counter()
    protocol = resolve_protocol(protocol)
    batch_size = integer("batch_size", batch_size)
    check_model(model)
    images, labels = _checked(data)
    device = _device(model, images, device)
    _check_options(progress, seed, num_classes, gradients)
    if gradients == "bf16":
        warn_of_imitated_bf16("gradients", device, "full")
    settings: dict[str, Any] = {
        "batch_size": min(batch_size, len(images)),
        "seed": seed,
        "channels_last": channels_last,
    }
    settings |= {"fold": fold, "compile": compile, "gradients": gradients, "stochastic": stochastic}
    # This leaves inference mode too, which the session's tensors must not be made in.
    with attacking(model, "eval", device):
        run = Session(model, images, labels, protocol, batch_size, device, channels_last, progress, seed, stochastic)
        look = partial(_looked_at, model, run, num_classes)
        try:
            probe, first = look()
        except RuntimeError as error:  # what flattens images with ``view`` takes contiguous ones only
            if not channels_last:
                raise
            settings["channels_last"] = run.channels_last = False
            why = str(error).partition("\n")[0]
            run.notes.append(f"not channels_last, as the model does not take such images ({why})")
            probe, first = look()
        single = _single(first, stochastic)
        whole = run.load(slice(0, batch_size)).images
        if single:
            refuse_batches(whole_batch_dependence(model, whole, first.logits))
        ignored = first.changed_attributes
        identity = {"model": model_digest(model, ignored), "data": data_digest(images, labels)}
        journal = None
        if resume is not None:
            header = {
                **identity,
                "protocol": protocol.name,
                "attacks": [spec.to_dict() for spec in protocol.attacks],
                "settings": settings,
                "probe": probe_logits(first.logits) if single else None,
            }
            journal = Journal(resume, header)
        if ignored:
            run.notes.append(f"a forward pass changes {', '.join(ignored)} of the model; its answers did not follow")
        run.prepared = prepare(
            model,
            whole if fold or compile else probe,
            batch_size=batch_size,
            folded=fold,
            compiled=compile,
            gradients=gradients,
        )
        run.notes += run.prepared.notes
        apart = sorted({spec.label for spec in protocol.attacks if not spec.shared})
        if apart and (compile or gradients == "bf16"):
            asked = " and ".join(["compile=True"] * compile + ["gradients='bf16'"] * (gradients == "bf16"))
            run.notes.append(f"{asked}: for FGSM and IFGSM without options only, not for {', '.join(apart)}")
        probed = (2 * _passes(stochastic) + (not stochastic)) * len(probe)
        probed += single * (batch_forwards(len(probe)) + len(whole))
        checks: dict[str, Any] = {"probe_forward_passes": probed}
        tried = run.try_gradients(GRADIENT_PROBES)
        checks["probe_forward_passes"] += tried
        run.everything(journal)
        if gradients == "bf16":
            checks["bf16"] = run.bf16_check(model)
        if not stochastic:
            _look_again(model, probe, first)
    settings |= {"odeadv": __version__, "torch": str(torch.__version__)}
    return run.result(time.perf_counter() - began, identity, settings, checks)


def _looked_at(model: nn.Module, run: Session, num_classes: int | None) -> tuple[Tensor, Behaviour]:
    """The first images, and what the model does with them; ValueError if outcomes would mean nothing."""
    probe, stochastic, highest = run.load(slice(0, PROBES)).images, run.stochastic, int(run.labels.max())
    run.reseed("probe")
    first = behaviour(model, probe, times=_passes(stochastic))
    check_logits(first.logits, len(probe), highest)
    if num_classes is not None and first.logits.shape[1] != num_classes:
        raise ValueError(
            f"model: returned {first.logits.shape[1]} logits an image, expected num_classes, {num_classes}"
        )
    refuse(first, stochastic=stochastic)
    if _single(first, stochastic):
        refuse_batches(batch_dependence(model, probe, first.logits))
    return probe, first


def _passes(stochastic: bool) -> int:
    """How often the first images are looked at alike: draws may be equal by chance."""
    return 8 if stochastic else 2


def _single(first: Behaviour, stochastic: bool) -> bool:
    """Whether the model has one answer to an image; if not, nothing can be told from two that differ."""
    return first.repeats if stochastic else not first.random


def _look_again(model: nn.Module, probe: Tensor, first: Behaviour) -> None:
    """ValueError if the first images do not have the logits they had at the beginning."""
    with torch.no_grad():
        again = model(probe)
    if differs(first.logits, again):
        raise ValueError(
            "model: its logits of the first images have changed during the evaluation, so it keeps a state (changed by "
            f"a forward: {', '.join(first.changed_attributes) or 'not seen'}); expected a model whose answers depend "
            "on the image only"
        )


def _checked(data: object) -> tuple[Tensor, Tensor]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data: got {type(data).__name__}, expected a pair (images, labels)")
    images, labels = data
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                f"images: got uint8 of shape {tuple(images.shape)}, expected (n, h, w, channels) with 1 or 3 channels"
            )
    else:
        check_images(images)
    check_labels(labels, len(images))
    return images, labels


def _check_options(progress: object, seed: object, num_classes: object, gradients: object) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {progress!r}, expected None or a function (done, total)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {seed!r}, expected an integer")
    if num_classes is not None:
        integer("num_classes", num_classes)
    if gradients not in ("full", "bf16"):
        raise ValueError(f"gradients: got {gradients!r}, expected 'full' or 'bf16'")


def _device(model: nn.Module, images: Tensor, device: torch.device | str | None) -> torch.device:
    own = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    if device is None:
        return own or images.device
    asked = torch.device(device)
    if own is not None and (asked.type != own.type or asked.index not in (None, own.index)):
        raise ValueError(f"device: got {asked}, expected that of the model, {own} (the model is not moved)")
    return own or asked
