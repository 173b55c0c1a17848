"""The training loop: the same for every objective, defence, network and number of processes."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from odeadv import attacks
from odeadv.data import to_float
from odeadv.diagnostics import Perturbation, perturbation
from odeadv.evaluation.trust import FOLD_LIMIT, beyond
from odeadv.models import FieldNetwork
from odeadv.solver import SolveError
from odeadv.support.deferred import deferring, holds
from odeadv.support.folding import Folded
from odeadv.support.isolation import untouched, without_effects
from odeadv.training import _checkpoint as saved
from odeadv.training._config import TrainConfig
from odeadv.training._distributed import rows_of, synchronise_batch_norm
from odeadv.training._look import Flags, Snapshot
from odeadv.training._recipe import MovingAverage
from odeadv.training._results import EpochResult, TrainResult
from odeadv.training._step import Defence, Draws, StepModule
from odeadv.training._strength import EpochStrength

if TYPE_CHECKING:
    from lightning_fabric import Fabric


#: Number of steps of the attack on validation images. The committed records chose their best epochs with ten steps.
VALIDATION_STEPS = 10

#: Several processes agree on a checkpoint only every this many steps, because agreeing needs communication.
AGREE_EVERY = 20

#: Number of batches from which eta is chosen. Their mean differs by a few percent from the mean of an epoch.
CALIBRATION_BATCHES = 8

#: If a diverged batch has larger inputs, the message names them. Normalised images are smaller, raw pixels are larger.
LARGE_INPUT = 10.0


class TrainingDiverged(RuntimeError):
    """The loss or a state became NaN, infinite or absurdly large."""


class TrainingStopped(SystemExit):
    """SIGTERM arrived and a checkpoint was saved; the program ends with exit code 143 unless this is caught.

    Args:
        message: text of the exception, which names the checkpoint.
    """

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        """Return the message, which names the checkpoint."""
        return self.message


class Source(Protocol):
    """The training data of the loop: full batches, in an order that follows from a generator."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch."""
        ...

    def pass_over(self, batches: int) -> None:
        """Skip ``batches`` batches in the next iteration."""
        ...


@dataclass(frozen=True)
class TrainingPlan:
    """The checked arguments of one call of `train`.

    Attributes:
        net: the network.
        batches: the training data.
        generator: the generator of the order of ``batches``.
        config: the configuration.
        fabric: the engine.
        validation: images and labels on which the best epoch is chosen.
        checkpoints: the checkpoints of the run; None writes no checkpoints.
        every: seconds between checkpoints within an epoch.
    """

    net: FieldNetwork
    batches: Source
    generator: torch.Generator
    config: TrainConfig
    fabric: Fabric
    validation: tuple[Tensor, Tensor] | None
    checkpoints: saved.Checkpoints | None
    every: float


class TrainingRun:
    """One training: the loop, and saving and restoring its state."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan, self.net, self.config, self.fabric = plan, plan.net, plan.config, plan.fabric
        self.batches, self.generator, self.checkpoints = plan.batches, plan.generator, plan.checkpoints
        config, fabric = self.config, self.fabric
        if fabric.world_size > 1 and config.sync_batchnorm:
            synchronise_batch_norm(self.net)
        self.step_module = StepModule(self.net, config.objective, config.defence, config.label_smoothing)
        self.optimizer = config.make_optimizer(self.net)
        self.rates = config.learning_rates(len(self.batches))
        self.module, self.engine_optimizer = fabric.setup(self.step_module, self.optimizer)
        self._prepare_attacks()
        self.precision = fabric.strategy.precision
        self.averaged = MovingAverage(self.net, config.ema) if config.ema else None
        self.result = TrainResult()
        self.done = 0  # number of finished steps of the current epoch
        self.loss_sum = torch.zeros((), device=fabric.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=fabric.device)
        self.strength_sum: Tensor | None = None  # sum of `Strength.flat`; the network determines its length
        self.eta: float | None = None if config.defence.strength is not None else config.defence.eta
        self.seconds = 0.0  # time spent in the current epoch so far
        self.order_state = self.generator.get_state()
        self.stopped_by: int | None = None  # the signal that requested a stop
        self.flags = Flags(fabric.device)
        self.reads_at_once = config.check_every == 1
        self.snapshot: Snapshot | None = None

    def go(
        self, on_step: Callable[[int, int, int], object] | None, on_epoch: Callable[[EpochResult], object] | None
    ) -> TrainResult:
        """Train all remaining epochs."""
        self._restore()
        first = self.fabric.is_global_zero
        if first and on_epoch is not None:
            for result in self.result.epochs:
                on_epoch(result)
        self.net.train()
        if self.eta is None:
            self.eta = self._chosen_eta()
        with self._heeding_signals():
            for epoch in range(len(self.result.epochs), self.config.epochs):
                if self._has_lost_patience():
                    break
                result = self._epoch(epoch, on_step if first else None)
                if first and on_epoch is not None:
                    on_epoch(result)
                self._stop_if_asked(epoch)
        if self.averaged is not None:
            self.net.load_state_dict(self.averaged.tensors)
        return self.result

    def _prepare_attacks(self) -> None:
        """Let attacks run on a folded or compiled form of the network if the configuration says so."""
        folded = Folded(self.net) if self.config.fold else None
        if folded is not None and not folded.count:
            raise ValueError("fold: got a network without a batch norm that can be folded; leave out fold=True")
        self.fold_is_checked = folded is None
        attacked = self.net if folded is None else folded
        if self.config.compile:
            attacked = torch.compile(attacked)  # type: ignore[assignment]
        self.step_module.attack_through(attacked, folded)

    def _check_fold(self, images: Tensor) -> None:
        """Compare the folded network with the original network on some images of the first step."""
        folded = self.step_module.folded
        assert folded is not None
        folded.follow()  # a checkpoint may have changed the weights
        with torch.no_grad(), without_effects([self.net], images.device), untouched(self.net, folded, mode="eval"):
            plain, other = self.net(images[:8]), folded(images[:8])
        limit = FOLD_LIMIT * torch.finfo(plain.dtype).eps
        if beyond(plain, other, limit):
            distance = float((plain - other).abs().max())
            raise ValueError(
                f"fold: the logits of the folded network differ by {distance:.3g}, expected at most {limit:.3g} of "
                "their scale (is the network random in evaluation mode?); leave out fold=True"
            )
        self.fold_is_checked = True

    def _has_lost_patience(self) -> bool:
        patience, best = self.config.patience, self.result.best_epoch
        return patience is not None and best is not None and len(self.result.epochs) - best >= patience

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """Request a checkpoint when SIGTERM or Ctrl-C arrives; a second Ctrl-C stops at once.

        Only the main thread may set handlers. Without checkpoints the handlers stay as they are.
        """
        if self.checkpoints is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def heed(number: int, frame: object) -> None:
            if number == signal.SIGINT and self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = number

        before = {number: signal.signal(number, heed) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self, epoch: int) -> None:
        """Save and stop after a signal; all processes take the same decision."""
        if self.checkpoints is None:
            return
        asked = self.stopped_by or 0
        if self.fabric.world_size > 1:
            if self.done % AGREE_EVERY:
                return
            found: Any = self.fabric.all_reduce(torch.tensor(asked, device=self.fabric.device), reduce_op="max")
            asked = int(found)
        if not asked:
            return
        if self.done:  # a finished epoch is already saved
            self._look(epoch)
            self._save()
        self.fabric.barrier()  # wait for the first process, which writes the file
        at = f"in epoch {epoch + 1}, after step {self.done}" if self.done else f"after epoch {epoch + 1}"
        message = f"training: stopped {at}; saved in {self.checkpoints.paths()[-1]}"
        raise KeyboardInterrupt(message) if asked == signal.SIGINT else TrainingStopped(message)

    def _epoch(self, epoch: int, on_step: Callable[[int, int, int], object] | None) -> EpochResult:
        began = time.perf_counter() - self.seconds
        last_saved = time.perf_counter()
        self.order_state = self.generator.get_state()
        self.batches.pass_over(self.done)
        self._take_snapshot()
        for images, labels in self.batches:
            self._checked_step(epoch, images, labels)
            self.done += 1
            if len(self.flags) >= self.config.check_every:
                self._look(epoch)
            if on_step is not None:
                on_step(epoch + 1, self.done, len(self.batches))
            self.seconds = time.perf_counter() - began
            if self.done == len(self.batches):
                break  # the epoch must be measured before it is saved
            self._stop_if_asked(epoch)
            if self._due(last_saved):
                last_saved = time.perf_counter()
                self._look(epoch)
                self._save()
        self._look(epoch)
        strength = EpochStrength.of(None if self.strength_sum is None else self._over_processes(self.strength_sum))
        loss, correct = self._over_processes(self.loss_sum), self._over_processes(self.correct)
        with self._watching(epoch):
            measured, validation = self._measured(), self._validated()
        result = EpochResult(
            epoch=epoch + 1,
            loss=float(loss) / (len(self.batches) * self.fabric.world_size),
            accuracy=int(correct) / (len(self.batches) * self.config.batch_size),
            lr=self.rates[(epoch + 1) * len(self.batches) - 1],
            seconds=time.perf_counter() - began,
            # The costate of the mean loss of a part is larger than the costate of the mean loss of the whole batch. The
            # factor is the number of parts.
            ratio=_finite(measured.ratio * self.config.accumulate * self.fabric.world_size),
            relative=tuple(measured.relative) if all(map(math.isfinite, measured.relative)) else (),
            validation=validation,
            strength=strength.measured,
            strength_first_order=strength.first_order,
            strength_nodes=strength.nodes,
            eta=self.step_module.defence.eta,
        )
        self.result.epochs.append(result)
        self._keep_best(result)
        self.done, self.seconds = 0, 0.0
        self.loss_sum.zero_()
        self.correct.zero_()
        self.strength_sum = None
        self.order_state = self.generator.get_state()
        self._save()
        return result

    def _due(self, last_saved: float) -> bool:
        """Return True if a checkpoint is due within the epoch; all processes take the same decision."""
        if self.checkpoints is None:
            return False
        if self.fabric.world_size == 1:
            return time.perf_counter() - last_saved > self.plan.every
        if self.done % AGREE_EVERY:
            return False
        answer: bool = self.fabric.broadcast(time.perf_counter() - last_saved > self.plan.every)
        return answer

    def _checked_step(self, epoch: int, images: Tensor, labels: Tensor) -> None:
        """Make a step; store the results of its checks for `_look` unless they are read at once."""
        if self.reads_at_once:
            self._step(epoch, images, labels)
            return
        try:
            with deferring() as checks:
                self._step(epoch, images, labels)
        except Exception:
            if self.fabric.world_size == 1:  # with several processes, the others may be at another step
                self._redo(epoch, len(self.flags) + 1)  # raises if this step or an earlier step fails a check
            raise
        self.flags.add(checks)

    def _look(self, epoch: int) -> None:
        """Read the checks of the steps since the last look; redo these steps if one has failed.

        Raises:
            TrainingDiverged: the same error that reading the checks at once would have raised.
        """
        if not len(self.flags):
            return
        failed = self._over_processes(self.flags.failed()).tolist()
        if any(failed):
            self._redo(epoch, 1 + next(number for number, found in enumerate(failed) if found))
            raise self._diverged(epoch, "a state or the loss was not finite, but was finite when the step was redone")
        self._take_snapshot()

    def _redo(self, epoch: int, steps: int) -> None:
        """Repeat the ``steps`` steps since the last snapshot, and read every check at once."""
        assert self.snapshot is not None
        back, self.reads_at_once = self.snapshot, True
        back.put_back(self.net, self.optimizer)
        if back.scaling:
            self.precision.load_state_dict(back.scaling)
        self._put_sums(back.sums)
        self.done = back.done
        self.generator.set_state(self.order_state)
        self.batches.pass_over(self.done)
        for images, labels in islice(self.batches, steps):
            self._step(epoch, images, labels)
            self.done += 1
        self.done -= 1  # do not count the step that was expected to fail

    def _take_snapshot(self) -> None:
        """Copy the state that `_look` needs to redo the following steps."""
        if not self.reads_at_once:
            scaling = self.precision.state_dict()
            self.snapshot = Snapshot(self.net, self.optimizer, self._sums(), self.done, scaling)

    def _sums(self) -> dict[str, Tensor | None]:
        averaged = {} if self.averaged is None else saved.prefixed("averaged", self.averaged.tensors)
        return {"loss": self.loss_sum, "correct": self.correct, "strength": self.strength_sum, **averaged}

    def _put_sums(self, sums: dict[str, Tensor | None]) -> None:
        loss, correct = sums["loss"], sums["correct"]
        assert loss is not None
        assert correct is not None
        self.loss_sum, self.correct, self.strength_sum = loss, correct, sums["strength"]
        if self.averaged is not None:
            self.averaged.load(saved.without("averaged", {n: t for n, t in sums.items() if t is not None}))

    def _step(self, epoch: int, images: Tensor, labels: Tensor) -> None:
        """Run forward and backward passes for all micro-batches of this process, then one step of the optimiser."""
        parts, world = self.config.accumulate, self.fabric.world_size
        self.engine_optimizer.zero_grad(set_to_none=True)
        number = epoch * len(self.batches) + self.done
        self.step_module.defence = self._defence(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[number]
        for part in range(parts):
            rows = rows_of(self.fabric.global_rank, world, part, parts, len(labels))
            if not self.fold_is_checked:
                self._check_fold(images[rows])
            draws = self._draws(number, rows, len(labels))
            waits = part < parts - 1
            with self.fabric.no_backward_sync(self.module, enabled=waits and world > 1):
                try:
                    loss, logits = self._forward(epoch, images[rows], labels[rows], draws)
                    self.fabric.backward(loss / parts)
                finally:
                    self.step_module.undo()
            self.loss_sum += loss.detach() / parts
            self._add_strength()
            self.correct += (logits.argmax(1) == labels[rows]).sum()
        if self.config.clip is not None:
            self.precision.unscale_gradients(self.optimizer)  # this acts only on fp16
            nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        self.engine_optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.net, number)

    def _draws(self, number: int, rows: slice, total: int) -> Draws:
        device = self.fabric.device if self.config.draws == "device" else "cpu"
        return Draws(self.config.seed, number, rows, total, device=device)

    def _add_strength(self) -> None:
        strength = self.step_module.strength
        if strength is not None:
            found = strength.flat()
            self.strength_sum = found if self.strength_sum is None else self.strength_sum + found

    def _defence(self, number: int) -> Defence:
        """Return the defence of step ``number`` of the run, with the chosen eta after warm-up."""
        defence, eta = self.config.defence, self.eta
        assert eta is not None
        rising = defence.warmup * len(self.batches)
        if not rising and defence.strength is None:
            return defence
        return defence.with_eta(eta * min(1.0, (number + 1) / rising) if rising else eta)

    def _chosen_eta(self) -> float:
        """Return the eta that gives the requested first-order strength on the first batches of the training.

        The passes do not change weights, statistics, the order of the images or the random state. So the run is the
        same as a run of the defence with this eta.
        """
        defence, config = self.config.defence, self.config
        assert defence.strength is not None
        self.step_module.defence = defence.with_eta(1.0)
        order, share = self.generator.get_state(), 1.0 / (config.accumulate * self.fabric.world_size)
        sums: Tensor | None = None
        with torch.no_grad(), without_effects(list(self.net.modules()), self.fabric.device):
            for number, (images, labels) in zip(range(CALIBRATION_BATCHES), self.batches, strict=False):
                for part in range(config.accumulate):
                    rows = rows_of(
                        self.fabric.global_rank, self.fabric.world_size, part, config.accumulate, len(labels)
                    )
                    draws = self._draws(number, rows, len(labels))
                    with self._watching(0), self.fabric.autocast():
                        self.step_module(images[rows], labels[rows], draws, share)
                    found = self.step_module.strength
                    if found is not None:
                        sums = found.flat() if sums is None else sums + found.flat()
        self.generator.set_state(order)
        rise = EpochStrength.of(None if sums is None else self._over_processes(sums)).first_order
        if not rise:
            raise ValueError(
                f"strength: got {defence.strength:g}, but the costate of the first batches is {rise}; set eta instead"
            )
        return defence.strength / rise

    def _forward(self, epoch: int, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        share = 1.0 / (self.config.accumulate * self.fabric.world_size)
        with self._watching(epoch, images, labels):
            loss, logits = self.module(images, labels, draws, share)
        if not holds(loss.detach() <= self.config.stop_above):
            raise self._diverged(epoch, f"the loss is {float(loss.detach()):g}", images, labels)
        return loss, logits

    @contextlib.contextmanager
    def _watching(self, epoch: int, images: Tensor | None = None, labels: Tensor | None = None) -> Iterator[None]:
        """Convert errors of a network that has diverged into `TrainingDiverged`."""
        try:
            yield
        except SolveError as error:
            raise self._diverged(epoch, error.solution.status.message, images, labels) from error
        except ValueError as error:  # attacks reject logits that are not finite
            if images is not None and images.is_floating_point() and not bool(images.isfinite().all()):
                where = f"epoch {epoch + 1}, step {self.done + 1}"
                raise ValueError(
                    f"data: got inputs that are NaN or infinite in {where}, expected finite ones"
                ) from error
            try:
                finite = self._is_finite(images)
            except Exception:  # the network rejects these inputs, and the first error reports this
                finite = True
            if finite:
                raise
            raise self._diverged(epoch, "logits or a weight are not finite", images, labels) from error

    def _is_finite(self, images: Tensor | None) -> bool:
        """Return True if the weights are finite, and also the logits of ``images`` in evaluation mode."""
        values = list(self.net.parameters())
        if images is not None:
            with torch.no_grad(), untouched(self.net, mode="eval"):
                values.append(self.net(images))
        return all(bool(value.isfinite().all()) for value in values)

    def _diverged(
        self, epoch: int, what: str, images: Tensor | None = None, labels: Tensor | None = None
    ) -> TrainingDiverged:
        eta = self.step_module.defence.eta
        text = f"training: epoch {epoch + 1}, step {self.done + 1}: {what}; "
        if eta:
            when, relative = "", self._perturbation_now(images, labels)
            if not relative and self.result.epochs:
                when, relative = " of the epoch before", list(self.result.epochs[-1].relative)
            if relative:
                worst = max(range(len(relative)), key=lambda n: (not math.isfinite(relative[n]), relative[n]))
                text += f"the perturbation ||eta a_n|| / ||x_n||{when} is largest at layer {worst} "
                text += f"({relative[worst]:.3g}); "
        if images is not None and images.is_floating_point() and (largest := float(images.abs().max())) > LARGE_INPUT:
            text += f"the inputs reach {largest:.3g}: scale images to [0, 1]; "
        text += f"lower lr ({self.config.base_lr:g})"
        text += f" or eta ({eta:g} at batch size {self.config.batch_size})" if eta else ""
        if self.checkpoints is not None and self.checkpoints.paths():
            text += f"; the last good checkpoint is {self.checkpoints.paths()[-1]}"
        return TrainingDiverged(text)

    def _perturbation_now(self, images: Tensor | None, labels: Tensor | None) -> list[float]:
        """Return the perturbation of every layer on this batch; empty if it cannot be measured."""
        if images is None or labels is None or self.fabric.world_size > 1:  # batch statistics need all processes
            return []
        try:
            return list(self._perturbation(images, labels).relative)
        except (SolveError, ValueError):
            return []

    def _perturbation(self, images: Tensor, labels: Tensor) -> Perturbation:
        eta = self.step_module.defence.eta / (self.config.accumulate * self.fabric.world_size)
        with self.fabric.autocast():
            found: Perturbation = perturbation(self.net.field(images, labels, eta))
        return found

    def _measured(self) -> Perturbation:
        """Measure Eq. 16 and the size of the perturbation on the last batch, without changing the network."""
        assert self.step_module.seen is not None
        return self._perturbation(*self.step_module.seen)

    def _validated(self) -> dict[str, float] | None:
        if self.plan.validation is None:
            return None
        images, labels = self.plan.validation
        right = {"clean": 0, "robust": 0} if self.config.objective.adversarial else {"clean": 0}
        training = self.net.training
        eps = getattr(self.config.objective, "eps", 8 / 255)
        attack = {"eps": eps, "alpha": eps / 4, "steps": VALIDATION_STEPS}
        weights = self._state()
        if self.averaged is not None:
            self.net.load_state_dict(self.averaged.tensors)
        self.net.eval()
        try:
            for first in range(0, len(images), 250):
                x = self._as_inputs(images[first : first + 250])
                y = labels[first : first + 250].to(self.fabric.device)
                with self.fabric.autocast():
                    seen = {"clean": x}
                    if "robust" in right:
                        seen["robust"] = attacks.ifgsm(self.net, x, y, **attack)  # type: ignore[arg-type]
                    with torch.no_grad():
                        for name, batch in seen.items():
                            right[name] += int((self.net(batch).argmax(1) == y).sum())
        finally:
            self.net.train(training)
            if self.averaged is not None:
                self.net.load_state_dict(weights)
        return {name: count / len(images) for name, count in right.items()}

    def _as_inputs(self, images: Tensor) -> Tensor:
        """Return validation images as floats on the device."""
        return (to_float(images) if images.dtype == torch.uint8 else images).to(self.fabric.device)

    def _state(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights if an average replaces them for validation; otherwise nothing."""
        if self.averaged is None:
            return {}
        return {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def _keep_best(self, result: EpochResult) -> None:
        if result.validation is None:
            return
        name = "robust" if self.config.objective.adversarial else "clean"
        so_far = self.result.best_epoch
        if so_far is not None:
            before = self.result.epochs[so_far - 1].validation
            assert before is not None
            if result.validation[name] <= before[name]:
                return
        self.result.best_epoch = result.epoch
        kept = self.net.state_dict() if self.averaged is None else self.averaged.tensors
        self.result.best = {key: value.detach().clone() for key, value in kept.items()}

    def _over_processes(self, value: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return value
        total = self.fabric.all_reduce(value.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        if self.fabric.world_size > 1:
            self.fabric.barrier()
        own = {
            "torch": torch.get_rng_state(),
            "loss_sum": self.loss_sum,
            "correct": self.correct,
        }
        if self.strength_sum is not None:
            own["strength_sum"] = self.strength_sum
        if self.fabric.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        gathered = [own] if self.fabric.world_size == 1 else self._gathered(own)
        if self.fabric.is_global_zero:
            tensors = {
                **saved.prefixed("model", saved.model_tensors(self.net)),
                **saved.prefixed("optimizer", saved.optimizer_tensors(self.optimizer)),
                "order": self.order_state,
            }
            for rank, state in enumerate(gathered):
                tensors |= saved.prefixed(f"process{rank}", state)
            if self.averaged is not None:
                tensors |= saved.prefixed("averaged", self.averaged.tensors)
            if self.result.best is not None:
                tensors |= saved.prefixed("best", self.result.best)
            info = {
                "epochs": [asdict(result) for result in self.result.epochs],
                "best_epoch": self.result.best_epoch,
                "done": self.done,
                "eta": self.eta,
                "seconds": self.seconds,
                **({"scaling": self.precision.state_dict()} if self.precision.state_dict() else {}),
            }
            self.checkpoints.save(len(self.result.epochs) * len(self.batches) + self.done, tensors, info)

    def _gathered(self, own: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        whole: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(whole, own)
        return whole

    def _restore(self) -> None:
        found = None if self.checkpoints is None else self.checkpoints.load()
        if found is None:
            return
        tensors, info = found
        self.net.load_state_dict(saved.without("model", tensors))
        saved.load_optimizer(self.optimizer, saved.without("optimizer", tensors))
        own = saved.without(f"process{self.fabric.global_rank}", tensors)
        torch.set_rng_state(own["torch"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.fabric.device)
        self.loss_sum.copy_(own["loss_sum"])
        self.correct.copy_(own["correct"])
        # Old checkpoints lack the strength. The strength of the interrupted epoch then counts only its remaining steps.
        self.strength_sum = own["strength_sum"].to(self.fabric.device) if "strength_sum" in own else None
        self.eta = info.get("eta", self.eta)
        if "scaling" in info:
            self.precision.load_state_dict(info["scaling"])
        self.generator.set_state(tensors["order"])
        epochs = [EpochResult.from_dict(epoch, info["file"]) for epoch in info["epochs"]]
        if len(epochs) > self.config.epochs:
            raise ValueError(
                f"epochs: got {self.config.epochs}, but the checkpoint has {len(epochs)}; ask for at least as many"
            )
        steps = len(self.batches)
        if any(result.lr != self.rates[result.epoch * steps - 1] for result in epochs):
            raise ValueError(
                f"epochs: got {self.config.epochs}, with which the learning rates of the {len(epochs)} epochs so far "
                "would have been others; a schedule that ends with the run cannot be extended"
            )
        if self.averaged is not None:
            self.averaged.load(saved.without("averaged", tensors))
        best = saved.without("best", tensors)
        self.result = TrainResult(epochs, info["best_epoch"], best or None)
        self.done, self.seconds = info["done"], info["seconds"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
