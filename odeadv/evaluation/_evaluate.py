"""evaluate: run a protocol on a model."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odeadv._version import __version__
from odeadv.attacks.checks import check_logits, check_model, own_dtype
from odeadv.attacks.objective import attacking
from odeadv.evaluation._attack import Rules
from odeadv.evaluation._evaluation import Evaluation
from odeadv.evaluation._ifgsm import SHORT
from odeadv.evaluation._journal import Journal, probe_logits
from odeadv.evaluation._prepare import Prepared, prepare
from odeadv.evaluation._session import Session
from odeadv.evaluation.data import Examples, ImageFolder, Output, read_data
from odeadv.evaluation.protocols import AUTOATTACK, AttackSpec, Protocol, resolve_protocol
from odeadv.evaluation.trust import (
    ACCEPTABLE,
    GRADIENT_PROBES,
    PROBES,
    Behaviour,
    batch_dependence,
    batch_forwards,
    behaviour,
    differs,
    doubts,
    is_rounding,
    noted,
    refuse,
    refuse_batches,
    whole_batch_dependence,
)
from odeadv.support.checks import choice, integer, shown
from odeadv.support.digests import data_digest, derived_seed, local_functions, model_digest
from odeadv.support.extras import extra
from odeadv.support.files import check_folder


def evaluate(
    model: nn.Module,
    data: object,
    protocol: str | Protocol | AttackSpec | Sequence[AttackSpec] = "table2",
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    channels_last: bool = True,
    progress: Callable[[int, int], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
    save: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    stochastic: bool = False,
    passes: int = 1,
    output: str | int | Callable[[Any], Tensor] | None = None,
    fold: bool = False,
    compile: bool = False,
    accept: str | Sequence[str] = (),
) -> Evaluation:
    """Measure clean and robust accuracy of ``model`` on ``data``. The model runs in eval mode and is restored.

    The figures are the same as from separate calls of the functions of `odeadv.attacks`, but cost less work:

    - One clean forward and backward pass gives the clean accuracy, FGSM at every radius and the first step of every
      IFGSM.
    - Attacks that differ only in their number of steps share one run. IFGSM at two radii shares one run while the
      iterates are equal. The forward pass that scores an iterate also gives the next gradient.
    - If only the worst-so-far score is requested (`AttackSpec.score`), fooled examples leave the batch, and the batch
      is refilled.
    - Examples whose iterates enter a cycle leave long runs, because the cycle repeats their outcomes. (This needs
      equal gradients for equal images, which is checked first.)

    Weight gradients are never computed. Arithmetic is in the dtype of the model, without autocast.

    Args:
        model: maps images to logits (n, classes), and normalises the images itself.
        data: (images, labels) as tensors or NumPy arrays on any device (they may be memory-mapped); a Dataset or
            DataLoader of such pairs; or an `odeadv.data.ImageDataset` (its test images). Images are floating,
            (n, channels, h, w) or (n, ...), in [0, 1]. Or they are uint8, (n, h, w, channels); each batch is then
            converted to the model's dtype and divided by 255. Labels are (n,) int64.
        protocol: one of `PROTOCOLS` (``"table1"``, ``"table2"``, ``"table6"``, ``"autoattack"``), a `Protocol`, an
            `AttackSpec` or a list of them.
        batch_size: images in one forward pass.
        device: the device to compute on; None means the model's device. The model is not moved.
        channels_last: lay 4-D images out channels-last in memory (same values, often faster convolutions). If the
            model takes only contiguous images, it gets contiguous images, and ``notes`` say so.
        progress: called as ``progress(done, total)``, in batches, after each batch, and once at the start if a journal
            is resumed; `ProgressLine` prints the time left.
        resume: path of a journal, to which finished batches are written. If the file exists, its batches are not run
            again. A journal of another model, data set, protocol, batch size or setting is rejected.
        save: a folder for the attacked images, one .safetensors file per batch; `saved_images` reads them. Attacks
            then share no work, and IFGSM with ``score="last"`` lacks a worst-so-far figure.
        seed: seed of attacks and models that draw random numbers; each batch derives its own seed from it.
        num_classes: reject a model with another number of logits; None does not check.
        stochastic: accept a model whose answers differ between two passes on the same images. Attacks then follow
            single draws unless they have ``eot``, and fresh passes score their final images. The worst-so-far score is
            not measured, because the worst of many draws counts noise as an attack. `odeadv.models.averaged` turns
            such a model into a deterministic one.
        passes: number of fresh forward passes of a ``stochastic`` model. Accuracies are means over these passes, with
            standard errors.
        output: place of the logits in the model's outputs: a key, an attribute, an index, or a function of the outputs.
        fold: fold batch norms on a copy of the model. Outcomes are the same, except for ties decided by rounding.
        compile: compile a copy of the model with ``torch.compile``, for full batches of FGSM and IFGSM. Compiling
            takes seconds to minutes. If it fails, evaluate warns and continues without it.
        accept: ``"batch dependence"`` evaluates a model whose logits depend on the other images of the batch. The
            result records this.

    Returns:
        Robust accuracies of the last iterates, separate worst-so-far accuracies, and the worst case over all attacks,
        with outcomes and cost.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if an argument is out of range or has the wrong shape, or the protocol is unknown. Also if the
            model cannot be attacked in a meaningful way, as in each of these cases:

            - logits or gradients are not finite;
            - a forward pass changes buffers or parameters;
            - two forward passes differ (unless ``stochastic``);
            - logits with and without gradients differ;
            - the logits of an image depend on its batch by more than rounding;
            - the model does not take the images' dtype;
            - the logits of the first images change during the evaluation.
        ImportError: if the protocol has AutoAttack and pyautoattack is not installed.

    Warns:
        RuntimeWarning: if the model could not be folded or compiled, or if the figures show signs that an attack is
            meaningless.

    Example:
        >>> digits = odeadv.data.load("digits").resized(16)
        >>> net = odeadv.models.pretrained("digits-pgd")
        >>> result = odeadv.evaluate(net, (digits.test_images[:10], digits.test_labels[:10]), "table2")
        >>> result.clean_accuracy, result.attacks[2].label
        (1.0, 'ifgsm-20 at 8/255')
    """
    with extra("evaluate"):
        import numpy  # noqa: F401  # a missing package is reported before any work, not when outcomes are packed
    began = time.perf_counter()
    protocol = resolve_protocol(protocol)
    batch_size, passes = integer("batch_size", batch_size), integer("passes", passes)
    check_model(model)
    model = model if output is None else Output(model, output)
    images, labels, release = read_data(data)
    device = _device(model, images, device)
    accepted = _accepted(accept)
    _check_options(progress, seed, num_classes)
    _check_random(protocol, stochastic, passes)
    by_example = {name: spec.by_example(labels) for name, spec in zip(protocol.names, protocol.attacks, strict=True)}
    check_folder("save", folder := None if save is None else Path(save))
    settings: dict[str, Any] = {
        "batch_size": min(batch_size, len(images)), "seed": seed, "channels_last": channels_last, "fold": fold,
        "compile": compile, "stochastic": stochastic, "passes": passes, "accept": list(accepted),
        "saves_images": folder is not None,
    }  # fmt: skip
    # `attacking` also leaves inference mode: the tensors of the session must not be made in inference mode.
    with attacking(model, "eval", device):
        examples = Examples(images, labels, device, own_dtype(model, torch.get_default_dtype()), channels_last, release)
        rules = Rules(
            protocol, seed=seed, stochastic=stochastic, passes=passes, repeatable=not stochastic,
            highest_label=examples.highest_label, keep_images=folder is not None, by_example=by_example,
        )  # fmt: skip
        seen = _examined(model, examples, batch_size, rules, num_classes, accepted)
        examples, settings["channels_last"] = seen.examples, seen.examples.channels_last
        digest = model_digest(model, seen.first.changed_attributes)
        identity = {"model": digest, "data": data_digest(images, labels, release)}
        journal = None if resume is None else _journal(resume, model, protocol, identity, settings, seen)
        saved = None if folder is None else _image_folder(folder, {**identity, "n": len(images)}, journal)
        prepared = prepare(model, seen.whole, folded=fold, compiled=compile)
        rules, tried = _repeatable(prepared, examples, rules)
        notes = [*seen.notes, *prepared.notes, *_not_compiled(protocol, compile), *_not_repeatable(rules, seen)]
        session = Session(prepared, examples, rules, batch_size, journal, progress, saved)
        session.run()
        _look_again(model, seen, rules)
    settings |= {"odeadv": __version__, "torch": str(torch.__version__)}
    result = session.result(time.perf_counter() - began, identity, settings, notes)
    return _judged(result, seen, session.signs, tried, stochastic)


def _judged(
    result: Evaluation, seen: _Examined, signs: Mapping[str, Tensor], tried: int, stochastic: bool
) -> Evaluation:
    """Return the result with the cost of its probes and with notes on possible faults; warn once per note.

    Args:
        result: the result of the protocol.
        seen: the observations of the model before the attacks.
        signs: (n,) bool per sign, see `_attack.BatchOutcomes`.
        tried: number of images differentiated to find out if equal images have equal gradients.
        stochastic: True for a random model.
    """
    checks: dict[str, Any] = {
        "probe_forward_passes": seen.forward_passes + tried,
        "probe_gradients": _times(stochastic) * len(seen.probe) + tried,
    }
    failed = [*doubts(result, seen.probe, seen.first), *noted(result, signs)]
    if failed:
        warnings.warn(f"evaluate: {'; '.join(failed)}", RuntimeWarning, stacklevel=3)
        checks["signs"] = {name: int(sign.sum()) for name, sign in signs.items()}
    return replace(result, checks=checks, notes=(*result.notes, *failed))


@dataclass(frozen=True)
class _Examined:
    """Observations of a model before it is attacked.

    Attributes:
        examples: the data, in a memory format that the model takes.
        probe: the first images.
        whole: the images of the first batch.
        first: the model's behaviour on ``probe``.
        is_function: True if equal images get equal logits.
        forward_passes: number of images sent through the model.
        notes: sentences for the reader.
    """

    examples: Examples
    probe: Tensor
    whole: Tensor
    first: Behaviour
    is_function: bool
    forward_passes: int
    notes: list[str]


def _examined(
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    rules: Rules,
    num_classes: int | None,
    accepted: tuple[str, ...],
) -> _Examined:
    """Observe the model; raise ValueError if attacks on it would be meaningless."""
    notes: list[str] = []
    times = _times(rules.stochastic)

    def look(examples: Examples) -> tuple[Tensor, Behaviour]:
        probe = examples.load(slice(0, PROBES)).images
        if rules.stochastic:
            torch.manual_seed(derived_seed(rules.seed, "probe"))
        return probe, behaviour(model, probe, times=times)

    try:
        probe, first = look(examples)
    except RuntimeError as error:  # a model with ``view`` on images takes only contiguous images
        if not examples.channels_last:
            raise
        examples = replace(examples, channels_last=False)
        why = str(error).partition("\n")[0]
        notes.append(f"not channels_last, because the model does not take such images ({why})")
        probe, first = look(examples)
    check_logits(first.logits, len(probe), rules.highest_label)
    if num_classes is not None and first.logits.shape[1] != num_classes:
        raise ValueError(
            f"model: returned {first.logits.shape[1]} logits per image, expected num_classes, {num_classes}"
        )
    refuse(first, stochastic=rules.stochastic)
    # If the model is random, only bitwise equal answers show that it is a function of the images.
    is_function = first.repeats if rules.stochastic else not first.random
    whole = examples.load(slice(0, batch_size)).images
    if is_function:
        difference = batch_dependence(model, probe, first.logits)
        if difference is None:
            difference = whole_batch_dependence(model, whole, first.logits)
        if difference is not None:
            notes.append(_dependence_note(model, whole, difference, accepted))
    if first.changed_attributes:
        notes.append(
            f"a forward pass changes {', '.join(first.changed_attributes)} of the model; its answers did not follow"
        )
    cost = (2 * times + (not rules.stochastic)) * len(probe)
    cost += is_function * (batch_forwards(len(probe)) + len(whole))
    return _Examined(examples, probe, whole, first, is_function, cost, notes)


def _times(random: bool) -> int:
    """Return the number of probing passes. A random model gets more, because its draws may be equal by chance."""
    return 8 if random else 2


def _dependence_note(model: nn.Module, images: Tensor, difference: float, accepted: tuple[str, ...]) -> str:
    """Return the note for logits that change with the batch; raise ValueError if this is not rounding or accepted."""
    if is_rounding(model, images, difference):
        return (
            f"logits change with the batch by {difference:.2g}: the network amplifies rounding, so outcomes may depend "
            "on the batch size"
        )
    if "batch dependence" not in accepted:
        refuse_batches(difference)
    return f"accepted: logits depend on the other images of the batch (by {difference:.2g})"


def _look_again(model: nn.Module, seen: _Examined, rules: Rules) -> None:
    """Raise ValueError if the logits of the first images have changed, unless the model is random."""
    if rules.stochastic:
        return
    with torch.no_grad():
        again = model(seen.probe)
    if differs(seen.first.logits, again):
        raise ValueError(
            "model: its logits of the first images have changed during the evaluation, so it keeps a state (changed by "
            f"a forward: {', '.join(seen.first.changed_attributes) or 'not seen'}); expected a model whose answers "
            "depend on the image only"
        )


def _repeatable(prepared: Prepared, examples: Examples, rules: Rules) -> tuple[Rules, int]:
    """Measure if equal images have equal gradients; return the rules with the answer, and the number of images used.

    The measurement is skipped if every run is too short to use its answer.
    """
    if not rules.repeatable or all((spec.steps or 1) <= SHORT for spec in rules.protocol.attacks if spec.shared):
        return rules, 0
    images, labels, _ = examples.load(slice(0, GRADIENT_PROBES))
    scorer = prepared.scorer(labels)
    equal = torch.equal(scorer.gradient(images), scorer.gradient(images))
    return replace(rules, repeatable=equal), scorer.gradient_evaluations


def _journal(
    path: str | os.PathLike[str],
    model: nn.Module,
    protocol: Protocol,
    identity: Mapping[str, str],
    settings: Mapping[str, Any],
    seen: _Examined,
) -> Journal:
    """Open the journal; raise ValueError if an option is a function that a journal cannot identify."""
    header = {
        **identity,
        "protocol": protocol.name,
        "attacks": [spec.to_dict() for spec in protocol.attacks],
        "settings": settings,
        "probe": probe_logits(seen.first.logits) if seen.is_function else None,
    }
    found = [what for spec in protocol.attacks for what in spec.local_functions()]
    found += [f"the model's attribute {name}" for name in local_functions(model)]
    if found:
        raise ValueError(
            f"resume: {found[0]} is a lambda or local function, which a journal cannot identify; define it in a module"
        )
    return Journal(path, header)


def _image_folder(folder: Path, about: dict[str, Any], journal: Journal | None) -> ImageFolder:
    return ImageFolder(folder, about, resumed=journal is not None and bool(journal.records))


def _not_compiled(protocol: Protocol, compiled: bool) -> list[str]:
    apart = sorted({spec.label for spec in protocol.attacks if not spec.shared})
    if not compiled or not apart:
        return []
    return [f"compile=True: for FGSM and IFGSM without options only, not for {', '.join(apart)}"]


def _not_repeatable(rules: Rules, seen: _Examined) -> list[str]:
    """Return the note for gradients that differ from pass to pass, if the model shows no other sign of randomness."""
    if rules.repeatable or rules.stochastic or seen.first.random_gradient:
        return []
    return [
        "gradients of the same images differ from one pass to the next: a random backward pass, or sums in an order "
        "that is not fixed; if they are random, average over passes before you believe the accuracies"
    ]


def _check_random(protocol: Protocol, stochastic: bool, passes: int) -> None:
    if passes > 1 and not stochastic:
        raise ValueError(f"passes: got {passes}, expected 1 for a model that is not stochastic")
    worst = [spec.label for spec in protocol.attacks if spec.score == "worst" and spec.name != AUTOATTACK]
    if stochastic and worst:
        raise ValueError(
            f"protocol: got score='worst' for {worst[0]}, expected score='last' with stochastic=True: the worst of "
            "many draws counts noise as an attack; or evaluate odeadv.models.averaged(model, passes=...)"
        )


def _check_options(progress: object, seed: object, num_classes: object) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {shown(progress)}, expected None or a function (done, total)")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {shown(seed)}, expected an integer")
    if num_classes is not None:
        integer("num_classes", num_classes)


def _accepted(accept: str | Sequence[str]) -> tuple[str, ...]:
    given = (accept,) if isinstance(accept, str) else tuple(accept)
    return tuple(choice("accept", each, ACCEPTABLE) for each in given)


def _device(model: nn.Module, images: Tensor, device: torch.device | str | None) -> torch.device:
    own = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    if device is None:
        return own or images.device
    asked = torch.device(device)
    if own is not None and (asked.type != own.type or asked.index not in (None, own.index)):
        raise ValueError(f"device: got {asked}, expected that of the model, {own} (the model is not moved)")
    return own or asked
