"""Trust: reasons to reject a model, and signs in the figures that an attack is meaningless."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from odeadv.attacks.checks import answered
from odeadv.evaluation._evaluation import AttackResult, Evaluation
from odeadv.evaluation.protocols import Radius, in_255ths
from odeadv.support.digests import is_own, is_plain

# Number of images in a probing forward pass. Two images can change places, and they cost little.
PROBES = 2
# Number of images whose gradients are computed twice before long runs. If the order of sums is not fixed, the last bit
# of a few gradients changes. 64 images show this almost surely, and cost less than one step of a batch.
GRADIENT_PROBES = 64
# Two answers may differ by this many units in the last place. Kernels for other batch sizes sum in another order, and
# 56 layers amplify this rounding to about 10 units.
_UNITS = 64
# The limit is larger if a whole batch is compared with two images: every convolution then uses another algorithm.
_UNITS_WHOLE_BATCH = 1024
# Logits that are this many times larger than the next smaller logit get a separate scale. Models mask a class by -1e4
# or -1e9, while the other logits of an image lie within a factor of about 100.
_GAP = 1e3
# Rounding in float64 is 2e-9 times the rounding in float32. If more than this share of a change remains in float64,
# the change is not rounding.
_ROUNDING_SHARE = 1e-3
#: Folding rounds every weight once, and a deep network amplifies this: ResNet-56 differs by about 100 units in the last
#: place. A wrong fold changes the leading digits.
FOLD_LIMIT = 1e4
# A sign of a failed attack is noted if it concerns more than this share of the images, and more than one image. Single
# images may have dead units or a tie.
_NOTED = 0.01
# Other signs also occur for single images of sound networks, so they are noted only above the share _OFTEN of all
# images. Clipping is noted if it occurs in more than the share _MOSTLY of the images that can show it.
_OFTEN, _MOSTLY = 0.1, 0.9
#: The logits of an image are flat if the largest exceeds the smallest by less than this.
FLAT = 0.01
# Two gradients may differ by this relative amount: rounding from another order of sums, amplified by steep networks.
_GRADIENT_ROUNDING = 0.01
# With fewer images, an accuracy below the accuracy of guessing may be chance.
FEWEST = 50
ACCEPTABLE = ("batch dependence",)


@dataclass(frozen=True)
class Behaviour:
    """Observations from forward passes on the same images.

    Attributes:
        logits: logits of the first pass.
        difference: largest difference between the logits of two repeated passes.
        random: True if ``difference`` is more than rounding.
        repeats: True if the logits of repeated passes are bitwise equal.
        with_gradient: largest difference between the logits of passes with and without gradients.
        disagrees: True if ``with_gradient`` is more than rounding.
        changed_tensors: buffers and parameters that a forward pass wrote to.
        changed_attributes: other attributes of modules that a forward pass changed.
        training: submodules that were in training mode after a pass, although eval mode was set before it.
        random_gradient: True if the model is not random, but the gradients of two repeated passes differ by more than
            rounding.
    """

    logits: Tensor
    difference: float
    random: bool
    repeats: bool
    with_gradient: float
    disagrees: bool
    changed_tensors: tuple[str, ...]
    changed_attributes: tuple[str, ...]
    training: tuple[str, ...]
    random_gradient: bool


def behaviour(model: nn.Module, images: Tensor, *, times: int = 2) -> Behaviour:
    """Run ``model`` on ``images``, ``times`` times without and ``times`` times with gradients; compare the passes.

    Call it with the model in eval mode and protected (`odeadv.support.isolation.untouched`).

    Raises:
        TypeError: if the model does not return a floating tensor.
        ValueError: if the model writes to the images.
    """
    with torch.no_grad():
        before = _state(model)
        plain = [_logits(answered(model, images.clone()))]
        after = _state(model)
        training = tuple(name or "model" for name, part in model.named_modules() if part.training)
        plain += [_logits(model(images)) for _ in range(times - 1)]
    with torch.enable_grad():
        passes = [_with_gradient(model, images) for _ in range(times)]
    graph = [logits for logits, _ in passes]
    last = _state(model)
    changed = sorted({*_changed(before, after), *_changed(before, last)})
    tensors = sorted(name for kind, name in changed if kind == "tensor")
    attributes = sorted(name for kind, name in changed if kind == "attribute" and not name.endswith(".training"))
    random = any(differs(same[0], other) for same in (plain, graph) for other in same[1:])
    alike = [(same[0], other) for same in (plain, graph) for other in same[1:]]
    return Behaviour(
        plain[0],
        max(_distance(a, b) for a, b in alike),
        random,
        all(torch.equal(a, b) for a, b in alike),
        _distance(plain[0], graph[0]),
        differs(plain[0], graph[0]),
        tuple(tensors),
        tuple(attributes),
        training,
        not random and any(_far(passes[0][1], gradient) for _, gradient in passes[1:]),
    )


def _with_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits, and the gradient of the cross-entropy of the predicted class (None if it is not available)."""
    leaf = images.detach().clone().requires_grad_()
    answer = model(leaf)
    logits = _logits(answer)
    try:
        loss = functional.cross_entropy(answer, logits.argmax(dim=1), reduction="sum")
        return logits, torch.autograd.grad(loss, leaf, allow_unused=True)[0]
    except Exception:  # other checks report models that cannot be differentiated, and faulty logits
        return logits, None


def _far(a: Tensor | None, b: Tensor | None) -> bool:
    """Return True if two gradients of the same images differ by more than rounding."""
    if a is None or b is None:
        return a is not b
    return bool((a - b).abs().max() > _GRADIENT_ROUNDING * a.abs().max())


def batch_dependence(model: nn.Module, images: Tensor, logits: Tensor) -> float | None:
    """Return the largest change of ``logits`` if ``images`` are in other batches; None if the change is rounding.

    The batches are: the first images alone, all images in reversed order, and all images at other places of a larger
    batch. `is_rounding` examines a change that is returned.
    """
    pairs = _batch_pairs(model, images, logits)
    return max(_distance(a, b) for a, b in pairs) if any(differs(a, b) for a, b in pairs) else None


def _batch_pairs(model: nn.Module, images: Tensor, logits: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    few = min(PROBES, len(images))
    with torch.no_grad():
        alone = torch.cat([_logits(model(images[i : i + 1])) for i in range(few)])
        reverse = _logits(model(_laid_out(images.flip(0), images))).flip(0)
        odd = 2 * few - 1  # put an odd number of images first, so that places change parity
        before = (1 - images[:few]).repeat_interleave(2, dim=0)[:odd]
        batch = _laid_out(torch.cat([before, images, 1 - images[:few]]), images)
        larger = _logits(model(batch))[len(before) :][: len(images)]
    return (logits[:few], alone), (logits, reverse), (logits, larger)


def whole_batch_dependence(model: nn.Module, images: Tensor, logits: Tensor) -> float | None:
    """Return the largest change of ``logits`` if their images are in a batch of all ``images``; None if it is rounding.

    ``logits`` belong to the first images, and were computed in a smaller batch.
    """
    with torch.no_grad():
        found = _logits(model(images))[: len(logits)]
    logits = logits[: len(found)]
    return _distance(logits, found) if differs(logits, found, units=_UNITS_WHOLE_BATCH) else None


def batch_forwards(n: int) -> int:
    """Return the number of images that `batch_dependence` sends through the model for ``n`` images."""
    few = min(PROBES, n)
    return few + n + (2 * few - 1) + n + few


def _laid_out(images: Tensor, like: Tensor) -> Tensor:
    """Return ``images`` in the memory format of ``like``."""
    last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def _changed(before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    return [key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))]


def refuse(found: Behaviour, *, stochastic: bool) -> None:
    """Raise ValueError if attacks on a model with this behaviour are meaningless."""
    if found.changed_tensors:
        raise ValueError(
            f"model: its forward changes {', '.join(found.changed_tensors)} in eval mode, so every image meets "
            "another model; expected a forward that does not change the state"
        )
    if found.random and not stochastic:
        cause = f" ({', '.join(found.training)} in training mode: dropout left on?)" if found.training else ""
        raise ValueError(
            f"model: two forward passes on the same images differ by {found.difference:.2g}{cause}, so one gradient "
            "says little; evaluate odeadv.models.averaged(model, passes=...), or give stochastic=True and passes=..."
        )
    # Draws of a random model may happen to differ by no more than rounding, so require bitwise equality for it.
    if found.disagrees and (found.repeats if stochastic else not found.random):
        raise ValueError(
            f"model: its logits with gradients differ from those without by {found.with_gradient:.2g}, so attacks meet "
            "another model than is scored; expected a forward that does not depend on the gradient mode"
        )


def refuse_batches(difference: float | None) -> None:
    """Raise ValueError if the logits depend on the rest of the batch by ``difference``; None means that they do not."""
    if difference is not None:
        raise ValueError(
            "model: the logits of an image depend on the other images in its batch, its place or the batch size (by "
            f"{difference:.2g}, which is not rounding), so outcomes are not those of the images; expected logits that "
            "depend on the image only. If the model uses statistics of the batch, let it use running statistics in "
            "eval mode. If it has an adaptive ODE solver, which chooses one step size for the whole batch, take fixed "
            "steps or smaller tolerances. accept='batch dependence' evaluates it as it is, and the result records it"
        )


def is_rounding(model: nn.Module, images: Tensor, difference: float) -> bool:
    """Return True if a change of the logits with the batch, by ``difference``, is amplified rounding.

    Steep networks (quantised activations, sines, saturating heads) amplify rounding. The change is measured again in
    float64 on a copy of the model. There rounding nearly vanishes, but a real dependence remains. If the model cannot
    compute in float64, the change is compared with the effect of one unit in the last place of the images.
    """
    try:
        wide, x = copy.deepcopy(model).double(), images.double()
        with torch.no_grad():
            logits = _logits(wide(x))
        if logits.dtype == torch.float64 and not math.isnan(difference):
            few, rest = x[:PROBES], _logits_without_graph(wide, x[:PROBES])
            pairs = [*_batch_pairs(wide, few, rest), (rest, logits[: len(rest)])]
            return max(_distance(a, b) for a, b in pairs) <= _ROUNDING_SHARE * difference
    except Exception:  # copying a user's module, or computing in float64, may raise any error
        pass
    return difference <= 10 * _effect_of_rounding(model, images)


def _effect_of_rounding(model: nn.Module, images: Tensor) -> float:
    """Return the largest change of the logits if every pixel changes by one unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(0)
    logits = _logits_without_graph(model, images)
    changes = []
    for _ in range(8):  # one direction often fails to flip a steep unit, eight directions rarely do
        up = (torch.rand(images.shape, generator=generator) < 0.5).to(images.device)
        moved = torch.nextafter(images, up.to(images))
        changes.append(_distance(logits, _logits_without_graph(model, moved)))
    return max(changes)


def _logits_without_graph(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return _logits(model(images))


def doubts(result: Evaluation, probe: Tensor, first: Behaviour) -> list[str]:
    """Return a sentence for every sign that the data or the attacks do not fit the model.

    Args:
        result: the evaluation.
        probe: the first images, in the form that the model takes.
        first: the behaviour of the model on ``probe``.
    """
    notes = []
    classes = first.logits.shape[1]
    if first.random_gradient and not result.clean_pass_accuracies:
        notes.append(
            "gradients of the same images differ from one pass to the next: a random backward pass hides the true "
            "gradient, so the accuracies may be too high; give attacks options={'eot': 20}, and add 'square'"
        )
    largest = float(probe.max())
    if 0 < largest <= 1 / 255:
        notes.append(
            f"the first images have values up to {largest:.2g}, so they may have been divided by 255 twice; "
            "every radius is large for such images"
        )
    if result.n >= FEWEST and result.clean_accuracy <= 1 / classes:
        notes.append(
            f"the clean accuracy is {100 * result.clean_accuracy:.3g} %, no better than guessing among {classes} "
            "classes: check the weights, the order of the classes, and if the model normalises images in [0, 1] itself"
        )
    notes += _coarse(result, probe.dtype)
    return notes


def _coarse(result: Evaluation, dtype: torch.dtype) -> list[str]:
    """Return a note if a step of an attack is less than the spacing of pixels near 1 in this dtype."""
    spacing = torch.finfo(dtype).eps / 2  # spacing of the numbers between 0.5 and 1
    rough = [
        name
        for name, attack in zip(result.names, result.attacks, strict=True)
        if in_255ths(attack.options) and 0 < _largest(attack.alpha or attack.eps) < 2 * spacing
    ]
    if not rough:
        return []
    return [
        f"the images are in {str(dtype).removeprefix('torch.')}, whose numbers between 0.5 and 1 are "
        f"{255 * spacing:.2g}/255 apart: too coarse for the steps of {', '.join(rough)}, so this accuracy may be too "
        "high; evaluate the model in float32"
    ]


def _largest(length: Radius) -> float:
    return max(length) if isinstance(length, tuple) else length


def noted(result: Evaluation, signs: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for every sign that an attack is meaningless for robustness.

    Args:
        result: the evaluation.
        signs: (n,) bool per sign, see `_attack.BatchOutcomes`.
    """
    rows = [result.clean_outcomes, *(row for attack in result.attacks for row in attack.measured)]
    survived = torch.stack(rows).all(dim=0)
    limit = max(1, _NOTED * result.n)
    notes = []
    zero = int((signs["no gradient"] & survived).sum())
    if zero > limit:
        notes.append(
            f"the gradient with respect to the image is exactly zero for {zero} of {result.n} images that stay "
            "right under every attack: it is masked, so attacks that follow it say nothing about robustness; add "
            "'square', or make the model differentiable"
        )
    if bool(signs["probabilities"].all()):
        notes.append(
            "the outputs look like probabilities, of which the cross-entropy has weak gradients; return logits, for "
            "example the logarithms"
        )
    elif bool(signs["bounded"].all()) and result.n >= FEWEST:
        notes.append(
            "all outputs lie in [0, 1], as after a sigmoid: their cross-entropy has weak gradients; return logits, the "
            "values before it"
        )
    if bool(signs["flat"].all()) and result.n >= FEWEST:
        notes.append(
            f"the outputs of each image lie within {FLAT:g} of each other, so their cross-entropy hardly sees which "
            "class is nearest; return logits of the scale that was trained, or add an attack with loss='margin'"
        )
    clipped = int(signs["clipped"].sum())
    if clipped > limit and clipped > _MOSTLY * int(signs["at bounds"].sum()):
        notes.append(
            f"the gradient is exactly zero at all pixels that are 0 or 1 for {clipped} of {result.n} images: the model "
            "seems to clip its images, whose gradient is zero at the bounds, so these pixels cannot be attacked; leave "
            "out the clipping: attacks keep images in [0, 1] themselves"
        )
    cut = int((signs["clipped logits"] & survived).sum())
    if cut > _OFTEN * result.n:
        notes.append(
            f"several outputs are exactly 0 and none is negative for {cut} of {result.n} images that stay right under "
            "every attack: the last layer clips the logits, whose gradients are then zero; return the values before it"
        )
    lowered = int((signs["lowered"] & survived).sum())
    # The loss of a random model may fall by chance.
    if lowered > max(limit, _OFTEN * result.n) and not result.clean_pass_accuracies:
        notes.append(
            f"IFGSM lowered the cross-entropy of {lowered} of {result.n} images that stay right under every attack: "
            "its steps should raise it, so the gradient is wrong or misleads; add 'square'"
        )
    saturated = int((signs["saturated"] & survived).sum())
    if saturated > limit:
        notes.append(
            f"the cross-entropy is exactly 0 for {saturated} of {result.n} images that stay right under every attack: "
            "its gradient is rounded there; add an attack with loss='margin', which sees other gradients"
        )
    return [*notes, *_attacks_that_help(result, limit), *_one_step_beats_many(result, limit)]


def _attacks_that_help(result: Evaluation, limit: float) -> list[str]:
    notes = []
    for name, attack in zip(result.names, result.attacks, strict=True):
        if attack.outcomes is not None:
            more = _excess(attack.outcomes, result.clean_outcomes, limit, 3 if result.clean_pass_accuracies else 0)
            if more:
                notes.append(
                    f"{more} more images are right after {name} than before it, so its gradient does not lead to errors"
                )
    return notes


def _one_step_beats_many(result: Evaluation, limit: float) -> list[str]:
    scored = [(n, a) for n, a in zip(result.names, result.attacks, strict=True) if a.outcomes is not None]
    notes = []
    for one_name, one in scored:
        for many_name, many in scored:
            if not _one_step_of(one, many) or one.outcomes is None or many.outcomes is None:
                continue
            more = _excess(many.outcomes, one.outcomes, 2 * limit, 3)
            if more:
                notes.append(
                    f"{many_name} leaves {more} more images right than {one_name}: many steps should do more than one, "
                    "so gradients along the way mislead"
                )
    return notes


def _one_step_of(one: AttackResult, many: AttackResult) -> bool:
    alike = one.eps == many.eps and dict(one.options) == dict(many.options)
    return alike and one.name == "fgsm" and many.name == "ifgsm" and (many.steps or 1) > 1


def _excess(a: Tensor, b: Tensor, limit: float, deviations: int) -> int:
    """Return how many more outcomes are true in ``a`` than in ``b``; 0 if the excess may be chance.

    An excess may be chance if it is at most ``limit``, or at most ``deviations`` standard deviations of fair coin
    tosses, one toss per example that differs.
    """
    more, differing = int(a.sum()) - int(b.sum()), int((a != b).sum())
    return more if more > limit and more > deviations * math.sqrt(differing) else 0


def differs(a: Tensor, b: Tensor, *, units: float = _UNITS) -> bool:
    """Return True if two logits (n, classes) of the same images differ by more than ``units`` in the last place."""
    return beyond(a, b, units * torch.finfo(a.dtype).eps)


def beyond(a: Tensor, b: Tensor, relative: float) -> bool:
    """Return True if logits (n, classes) differ by more than ``relative`` times their scale, see `scales`.

    NaN equals only NaN; inf equals only inf.
    """
    if a.shape != b.shape:
        return True
    if a.ndim != 2:  # these are not logits; the caller rejects them
        return not torch.equal(a, b)
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs()
    return not bool((same | (apart.isfinite() & (apart <= relative * scales(a)))).all())


def scales(logits: Tensor) -> Tensor:
    """Return (classes,): the scale that rounding in each column of ``logits`` (n, classes) is compared with.

    The scale is the largest absolute logit. Classes whose logits are a thousand times larger than all others get a
    separate scale, so that a class masked by -1e9 does not hide differences in the other classes.
    """
    sizes, order = logits.abs().amax(dim=0).sort()
    jump = sizes[1:] > _GAP * sizes[:-1]
    # Two kinds of columns do not get a separate scale: columns of zeros (a class that is never predicted), and a single
    # smallest column, which may be small by cancellation.
    jump &= (sizes[:-1] > 0).cumsum(0) >= 2
    group = torch.cat([jump.new_zeros(1), jump]).cumsum(0)
    largest = torch.stack([sizes[group == k][-1] for k in range(int(group[-1]) + 1)])
    return torch.empty_like(sizes).scatter_(0, order, largest[group])


def _logits(value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"model: returned {got}, expected a floating tensor of logits; give output= if they are a part")
    return value.detach().clone()


def _state(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return copies of all tensors, and of the plain attributes of all modules, by name."""
    state: dict[tuple[str, str], Any] = {}
    for prefix, part in model.named_modules():
        own: Mapping[str, Any] = part.__dict__
        dot = f"{prefix}." if prefix else ""
        for name, tensor in [*part._buffers.items(), *part._parameters.items()]:
            if tensor is not None:
                state["tensor", dot + name] = tensor.detach().clone()
        for name, value in own.items():
            if isinstance(value, Tensor):
                state["attribute", dot + name] = value.detach().clone()
            elif isinstance(value, torch.Generator):
                state["attribute", dot + name] = value.get_state()
            elif value is None or isinstance(value, (bool, int, float, str, tuple)):
                state["attribute", dot + name] = value
            elif isinstance(value, (list, dict, set)) and (
                not name.startswith("_") or (is_own(name) and is_plain(value))
            ):
                state["attribute", dot + name] = repr(value) if len(value) < 1000 else len(value)
    return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b) or (a != a).any())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
