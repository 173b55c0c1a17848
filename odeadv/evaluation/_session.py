"""One evaluation under way: which batches are done, what they gave, and what the journal is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from odeadv.attacks.checks import own_dtype
from odeadv.attacks.objective import constant
from odeadv.data import as_model_input
from odeadv.evaluation._attack import Batch, batch_outcomes
from odeadv.evaluation._evaluation import Evaluation, pack, result_of, unpack
from odeadv.evaluation._ifgsm import SHORT, Queue, worst_groups
from odeadv.evaluation._journal import Journal
from odeadv.evaluation._prepare import Prepared
from odeadv.evaluation.protocols import Protocol
from odeadv.support.digests import derived_seed

BF16_CHECK = 256  # at most so many examples have their bf16 gradients compared with full ones


class Session:
    """One evaluation under way."""

    prepared: Prepared

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        protocol: Protocol,
        batch_size: int,
        device: torch.device,
        channels_last: bool,
        progress: Callable[[int, int], object] | None,
        seed: int,
        stochastic: bool,
    ) -> None:
        self.images, self.labels, self.protocol, self.batch_size = images, labels, protocol, batch_size
        self.device, self.channels_last, self.progress, self.seed = device, channels_last, progress, seed
        self.stochastic = stochastic
        self.repeatable = not stochastic
        self.dtype = own_dtype(model, torch.get_default_dtype())
        n, rows = len(images), 1 + 2 * len(protocol.attacks)
        self.outcomes = torch.zeros(rows, n, dtype=torch.bool)
        self.starts = range(0, n, batch_size)
        self.groups = worst_groups(protocol.attacks)
        self.fooled_at = {group: torch.full((n,), -1) for group in self.groups}
        self.finished: set[int] = set()
        self.forward_passes = self.gradient_evaluations = 0
        self.notes: list[str] = []
        self.earlier = 0.0
        self._since = time.perf_counter()

    def try_gradients(self, n: int) -> int:
        """Find out whether the first ``n`` images have the same gradients twice, if a long run would make use of it.

        Returns:
            How many images were differentiated for it.
        """
        if not self.repeatable or all((spec.steps or 1) <= SHORT for spec in self.protocol.attacks if spec.shared):
            return 0
        images, labels = self.load(slice(0, n))
        scorer = self.prepared.scorer(labels)
        if not torch.equal(scorer.gradient(images), scorer.gradient(images)):
            self.repeatable = False
            self.notes.append(
                "gradients of the same images differ from one pass to the next: a random backward pass, or sums in no "
                "fixed order; if they are random, average over passes before believing the robust accuracies"
            )
        return scorer.gradient_evaluations

    def load(self, part: slice | Tensor) -> Batch:
        """Images and labels as the model takes them."""
        chosen = part if isinstance(part, slice) else part.to(self.images.device)
        x = as_model_input(
            constant(self.images[chosen]), device=self.device, dtype=self.dtype, channels_last=self.channels_last
        )
        label = part if isinstance(part, slice) else part.to(self.labels.device)
        return Batch(x, constant(self.labels[label]).to(self.device))

    def everything(self, journal: Journal | None) -> None:
        """All batches and all queues that ``journal`` does not have yet."""
        for record in journal.records if journal else []:
            self._recall(record)
        if self._done() and self.progress is not None:
            self.progress(self._done(), self._total())
        self._since = time.perf_counter()
        for number, first in enumerate(self.starts):
            if number not in self.finished:
                self._batch(number, slice(first, first + self.batch_size), journal)
        for place, group in enumerate(self.groups):
            self._queue(place, group, journal)

    def reseed(self, place: str) -> None:
        """Let a model that draws from the global random state draw the same whatever was done before."""
        if self.stochastic:
            torch.manual_seed(derived_seed(self.seed, place))

    def _batch(self, number: int, part: slice, journal: Journal | None) -> None:
        self.reseed(f"batch {number}")
        found = batch_outcomes(
            self.prepared,
            self.load(part),
            self.protocol.attacks,
            highest_label=int(self.labels.max()),
            seed=self.seed,
            number=number,
            repeatable=self.repeatable,
        )
        self.outcomes[:, part] = found.rows.cpu()
        self.finished.add(number)
        self._spent(found.forward_passes, found.gradient_evaluations, found.notes)
        if journal is not None:
            self._record(
                journal,
                found.forward_passes,
                found.gradient_evaluations,
                found.notes,
                {
                    "batch": number,
                    "outcomes": pack(found.rows),
                },
            )
        self._report()

    def _queue(self, place: int, group: tuple[float, float], journal: Journal | None) -> None:
        """Examples of one worst-so-far run, written down whenever a batch of them has left."""
        self.reseed(f"queue {place}")
        fooled_at = self.fooled_at[group]
        fooled_at[~self.outcomes[0]] = 0
        waiting = (fooled_at < 0).nonzero().squeeze(1)
        steps = max(self.protocol.attacks[i].steps or 1 for i in self.groups[group])
        queue = Queue(
            self.prepared,
            self.load,
            waiting,
            eps=group[0],
            alpha=group[1],
            steps=steps,
            batch_size=self.batch_size,
            repeatable=self.repeatable,
        )
        pending: list[tuple[Tensor, Tensor]] = []
        counted = (0, 0)
        left = len(waiting)
        for index, when in queue.run():
            fooled_at[index] = when
            left -= len(index)
            pending.append((index, when))
            if sum(len(some) for some, _ in pending) >= self.batch_size or not left:
                spent = (queue.forward_passes - counted[0], queue.gradient_evaluations - counted[1])
                counted = (queue.forward_passes, queue.gradient_evaluations)
                self._spent(*spent, [])
                if journal is not None:
                    indices, times = (torch.cat(parts).tolist() for parts in zip(*pending, strict=True))
                    self._record(journal, *spent, [], {"queue": place, "examples": indices, "fooled_at": times})
                pending = []
                self._report()

    def _record(
        self, journal: Journal, forward: int, gradient: int, notes: list[str], record: Mapping[str, Any]
    ) -> None:
        now = time.perf_counter()
        journal.append({**record, "spent": [forward, gradient, now - self._since], "notes": notes})
        self._since = now

    def _recall(self, record: Mapping[str, Any]) -> None:
        if "batch" in record:
            part = slice(record["batch"] * self.batch_size, (record["batch"] + 1) * self.batch_size)
            rows, n = self.outcomes[:, part].shape
            self.outcomes[:, part] = unpack(record["outcomes"], rows, n)
            self.finished.add(record["batch"])
        else:
            group = list(self.groups)[record["queue"]]
            self.fooled_at[group][torch.tensor(record["examples"])] = torch.tensor(record["fooled_at"])
        forward, gradient, seconds = record["spent"]
        self.earlier += seconds
        self._spent(forward, gradient, record["notes"])

    def _spent(self, forward: int, gradient: int, notes: list[str]) -> None:
        self.forward_passes += forward
        self.gradient_evaluations += gradient
        self.notes += [note for note in notes if note not in self.notes]

    def _total(self) -> int:
        return len(self.starts) * (1 + len(self.groups))

    def _done(self) -> int:
        """Batches that are done; of a queue, as many as its finished examples would fill."""
        done = len(self.finished)
        for fooled_at in self.fooled_at.values():
            finished = int((fooled_at >= 0).sum())
            done += len(self.starts) if finished == len(fooled_at) else finished // self.batch_size
        return done

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self._done(), self._total())

    def bf16_check(self, model: nn.Module) -> dict[str, Any]:
        """Outcomes of the first examples again, with full gradients: a sixteenth of them, 32 to 256."""
        n = min(len(self.images), BF16_CHECK, max(32, len(self.images) // 16))
        places = [place for place, spec in enumerate(self.protocol.attacks) if spec.shared]
        specs = [self.protocol.attacks[place] for place in places]
        full, highest = Prepared(model, model, None, 0, False, ()), int(self.labels.max())
        rows = []
        for first in range(0, n, self.batch_size):
            batch = self.load(slice(first, min(first + self.batch_size, n)))
            found = batch_outcomes(
                full,
                batch,
                specs,
                highest_label=highest,
                seed=self.seed,
                number=0,
                repeatable=self.repeatable,
                queued=True,
            )
            rows.append(found.rows.cpu())
        exact, mine = torch.cat(rows, dim=1), self._outcomes()[:, :n]
        attacks: list[dict[str, Any]] = []
        for i, (place, spec) in enumerate(zip(places, specs, strict=True)):
            worst = spec.score == "worst"
            by_full, by_bf16 = exact[1 + 2 * i + worst], mine[1 + 2 * place + worst]
            attacks.append(
                {
                    "attack": spec.label,
                    "full_accuracy": float(by_full.float().mean()),
                    "bf16_accuracy": float(by_bf16.float().mean()),
                    "outcomes_that_differ": int((by_full != by_bf16).sum()),
                }
            )
        return {"n": n, "attacks": attacks}

    def _outcomes(self) -> Tensor:
        """All outcomes, those of the queues filled in."""
        outcomes = self.outcomes.clone()
        for group, members in self.groups.items():
            for i in members:
                steps = self.protocol.attacks[i].steps or 1
                outcomes[2 + 2 * i] = self.fooled_at[group] > steps
        return outcomes

    def result(
        self, seconds: float, identity: Mapping[str, str], settings: Mapping[str, Any], checks: Mapping[str, Any]
    ) -> Evaluation:
        """What was found."""
        clean, *attacked = self._outcomes()
        return Evaluation(
            protocol=self.protocol.name,
            clean_outcomes=clean,
            attacks=tuple(
                result_of(spec, None if spec.score == "worst" else last, worst if spec.measures_worst else None)
                for spec, last, worst in zip(self.protocol.attacks, attacked[::2], attacked[1::2], strict=True)
            ),
            forward_passes=self.forward_passes,
            gradient_evaluations=self.gradient_evaluations,
            seconds=seconds + self.earlier,
            model=identity["model"],
            data=identity["data"],
            settings=settings,
            checks=checks,
            notes=tuple(self.notes),
        )
