"""A running evaluation: finished batches, their outcomes per attack, and the records of the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from odeadv.evaluation._attack import BatchOutcomes, Rules, batch_outcomes
from odeadv.evaluation._evaluation import AttackResult, Evaluation, by_pass, majority, result_of
from odeadv.evaluation._ifgsm import IfgsmRun, WorstSoFar, queues_of, run_of
from odeadv.evaluation._journal import Journal
from odeadv.evaluation._prepare import Prepared
from odeadv.evaluation.data import Examples, ImageFolder
from odeadv.support.digests import derived_seed
from odeadv.support.plain import pack, unpack

SIGNS = (
    "no gradient", "at bounds", "clipped", "saturated", "lowered", "probabilities", "bounded", "flat", "clipped logits",
)  # fmt: skip


class Session:
    """A running evaluation. Batches that are in the journal count as finished from the start.

    Args:
        prepared: the model.
        examples: the data.
        rules: the settings that are the same for every batch.
        batch_size: images in one forward pass.
        journal: receives finished batches; None writes no journal.
        progress: called as ``progress(done, total)`` after each batch.
        save: the folder for the attacked images; None saves no images.
    """

    def __init__(
        self,
        prepared: Prepared,
        examples: Examples,
        rules: Rules,
        batch_size: int,
        journal: Journal | None,
        progress: Callable[[int, int], object] | None,
        save: ImageFolder | None,
    ) -> None:
        self._prepared, self._examples, self._rules, self._batch_size = prepared, examples, rules, batch_size
        self._journal, self._progress, self._save = journal, progress, save
        n, attacks = len(examples.images), dict(zip(rules.protocol.names, rules.protocol.attacks, strict=True))
        self._starts = range(0, n, batch_size)
        self._queues = {} if rules.keep_images else queues_of(rules.protocol.attacks)
        self._clean = torch.zeros(rules.passes, n, dtype=torch.bool)
        self._last = {
            name: torch.zeros_like(self._clean)
            for name, spec in attacks.items()
            if rules.stochastic or spec.score == "last"
        }
        self._worst = {
            name: torch.zeros(n, dtype=torch.bool) for name, spec in attacks.items() if rules.measures_worst(spec)
        }
        self._signs = {sign: torch.zeros(n, dtype=torch.bool) for sign in SIGNS}
        # Per example: the number of the first misclassified iterate; -1 if the example is not finished.
        self._fooled_at = {run: torch.full((n,), -1) for run in self._queues}
        self._finished: set[int] = set()
        self._forward_passes = self._gradient_evaluations = 0
        self._seconds = 0.0  # wall-clock time of interrupted runs
        self._notes: list[str] = []
        for record in journal.records if journal is not None else []:
            self._recall(record)
        self._since = time.perf_counter()

    def run(self) -> None:
        """Run all batches and all queues that are not finished."""
        if self._done() and self._progress is not None:
            self._progress(self._done(), self._total())
        self._since = time.perf_counter()
        for number in range(len(self._starts)):
            if number not in self._finished:
                self._run_batch(number)
        for place, run in enumerate(self._queues):
            self._run_queue(place, run)

    def result(
        self, seconds: float, identity: Mapping[str, str], settings: Mapping[str, Any], notes: list[str]
    ) -> Evaluation:
        """Return the outcomes of all batches.

        Args:
            seconds: wall-clock time of this run.
            identity: digests of model and data.
            settings: settings of the evaluation.
            notes: sentences for the reader; the notes of the attacks are added after them.
        """
        for run, fooled_at in self._fooled_at.items():
            for name, spec in zip(self._rules.protocol.names, self._rules.protocol.attacks, strict=True):
                if spec.shared and spec.score == "worst" and run_of(spec) == run:
                    self._worst[name] = fooled_at > (spec.steps or 1)
        random = self._rules.stochastic
        return Evaluation(
            protocol=self._rules.protocol.name,
            clean_outcomes=majority(self._clean),
            attacks=self._results(),
            forward_passes=self._forward_passes,
            gradient_evaluations=self._gradient_evaluations,
            seconds=seconds + self._seconds,
            model=identity["model"],
            data=identity["data"],
            settings=settings,
            notes=(*notes, *(note for note in self._notes if note not in notes)),
            clean_pass_accuracies=by_pass(self._clean) if random else (),
        )

    @property
    def signs(self) -> Mapping[str, Tensor]:
        """(n,) bool per sign that an attack may have failed, see `BatchOutcomes`."""
        return self._signs

    def _results(self) -> tuple[AttackResult, ...]:
        pairs = zip(self._rules.protocol.names, self._rules.protocol.attacks, strict=True)
        return tuple(
            result_of(spec, self._last.get(name), self._worst.get(name), random=self._rules.stochastic)
            for name, spec in pairs
        )

    def _part(self, number: int) -> slice:
        first = self._starts[number]
        return slice(first, min(first + self._batch_size, len(self._examples.images)))

    def _reseed(self, place: str) -> None:
        """Seed the random numbers of a random model by ``place``, so that they do not depend on earlier work."""
        if self._rules.stochastic:
            torch.manual_seed(derived_seed(self._rules.seed, place))

    def _run_batch(self, number: int) -> None:
        self._reseed(f"batch {number}")
        part = self._part(number)
        try:
            outcomes = batch_outcomes(self._prepared, self._examples.load(part), self._rules, number)
        except ValueError as error:
            if "not finite" not in str(error) and "NaN" not in str(error):
                raise
            raise ValueError(f"{error} (in the batch of images {part.start} to {part.stop - 1})") from error
        if self._save is not None:
            self._save.write(number, part.start, outcomes.images)
        self._keep(part, outcomes)
        self._finished.add(number)
        record = {
            "batch": number,
            "clean": outcomes.clean,
            "last": outcomes.last,
            "worst": outcomes.worst,
            "signs": outcomes.signs,
        }
        self._write(outcomes.forward_passes, outcomes.gradient_evaluations, outcomes.notes, record)

    def _keep(self, part: slice, outcomes: BatchOutcomes) -> None:
        self._clean[:, part] = outcomes.clean.cpu()
        for table, found in ((self._last, outcomes.last), (self._worst, outcomes.worst), (self._signs, outcomes.signs)):
            for name, rows in found.items():
                table[name][..., part] = rows.cpu()

    def _run_queue(self, place: int, run: IfgsmRun) -> None:
        """Run the examples of one worst-so-far run; write a record each time a batch of them is finished."""
        self._reseed(f"queue {place}")
        fooled_at = self._fooled_at[run]
        fooled_at[~self._clean[0]] = 0
        waiting = (fooled_at < 0).nonzero().squeeze(1)
        queue = WorstSoFar(
            self._prepared,
            self._examples.load,
            waiting,
            eps=run[0],
            alpha=run[1],
            steps=self._queues[run],
            batch_size=self._batch_size,
            repeatable=self._rules.repeatable,
        )
        pending: list[tuple[Tensor, Tensor]] = []
        written = (0, 0, 0)
        left = len(waiting)
        for index, when in queue.run():
            fooled_at[index] = when
            left -= len(index)
            pending.append((index, when))
            if sum(len(some) for some, _ in pending) >= self._batch_size or not left:
                forward, gradient, zero = (
                    queue.forward_passes - written[0],
                    queue.gradient_evaluations - written[1],
                    queue.no_gradient[written[2] :],
                )
                written = (queue.forward_passes, queue.gradient_evaluations, len(queue.no_gradient))
                self._signs["no gradient"][zero] = True
                indices, times = (torch.cat(parts).tolist() for parts in zip(*pending, strict=True))
                record = {"queue": place, "examples": indices, "fooled_at": times, "no_gradient": zero}
                self._write(forward, gradient, [], record)
                pending = []

    def _write(self, forward: int, gradient: int, notes: list[str], record: Mapping[str, Any]) -> None:
        """Count the cost of finished work, append its record to the journal, and report progress."""
        self._count(forward, gradient, notes)
        if self._journal is not None:
            now = time.perf_counter()
            self._journal.append({**_packed(record), "spent": [forward, gradient, now - self._since], "notes": notes})
            self._since = now
        if self._progress is not None:
            self._progress(self._done(), self._total())

    def _count(self, forward: int, gradient: int, notes: list[str]) -> None:
        self._forward_passes += forward
        self._gradient_evaluations += gradient
        self._notes += [note for note in notes if note not in self._notes]

    def _recall(self, record: Mapping[str, Any]) -> None:
        """Take over finished work from a record of the journal."""
        if "batch" in record:
            lost = self._save is not None and not self._save.file(record["batch"]).exists()
            if lost or record["batch"] in self._finished:
                return  # the batch is already known, or must run again because its images are missing
            part = self._part(record["batch"])
            n, passes = part.stop - part.start, self._rules.passes
            self._keep(
                part,
                BatchOutcomes(
                    unpack(record["clean"], passes, n),
                    {name: unpack(text, n) for name, text in record["signs"].items()},
                    {name: unpack(text, passes, n) for name, text in record["last"].items()},
                    {name: unpack(text, n) for name, text in record["worst"].items()},
                ),
            )
            self._finished.add(record["batch"])
        else:
            run = list(self._queues)[record["queue"]]
            self._fooled_at[run][torch.tensor(record["examples"])] = torch.tensor(record["fooled_at"])
            self._signs["no gradient"][record["no_gradient"]] = True
        forward, gradient, seconds = record["spent"]
        self._seconds += seconds
        self._count(forward, gradient, record["notes"])

    def _total(self) -> int:
        return len(self._starts) * (1 + len(self._queues))

    def _done(self) -> int:
        """Return the number of finished batches; a queue counts its finished examples divided by the batch size."""
        done = len(self._finished)
        for fooled_at in self._fooled_at.values():
            finished = int((fooled_at >= 0).sum())
            done += len(self._starts) if finished == len(fooled_at) else finished // self._batch_size
        return done


def _packed(value: Any) -> Any:
    """Return plain data; every tensor of outcomes is packed into a string."""
    if isinstance(value, Mapping):
        return {key: _packed(item) for key, item in value.items()}
    return pack(value) if isinstance(value, Tensor) else value
