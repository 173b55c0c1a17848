"""Runs that enter a cycle end early, with the outcomes of runs in full length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import EPS, held_out, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from odeadv import attacks
from odeadv.evaluation import AttackSpec, Evaluation, Protocol, evaluate
from odeadv.evaluation._ifgsm import KEPT_FOR, KEPT_SHARE, Cycles

ALPHA = EPS / 4
LENGTHS = (5, 20, 21, 100, 333, 334)


def walk(entry: int, period: int, length: int) -> list[int]:
    """Step numbers that are all different up to ``entry``, then go round."""
    return [k if k < entry else entry + (k - entry) % period for k in range(length)]


class TestCycles:
    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=5))
    def test_finds_periods_and_nothing_else(self, walks: list[tuple[int, int]]) -> None:
        length = 400
        paths = torch.tensor([walk(entry, period, length) for entry, period in walks], dtype=torch.float64)
        cycles = Cycles(paths[:, :1, None], torch.zeros(len(walks), dtype=torch.int64))
        found: dict[int, int] = {}
        for k in range(1, length):
            cycles, ago = cycles.after(paths[:, k, None, None], torch.full((len(walks),), k))
            for i in ago.nonzero().flatten().tolist():
                entry, period = walks[i]
                assert k - int(ago[i]) >= entry
                assert int(ago[i]) % period == 0
                if i not in found:  # the first return to the kept iterate is one period later
                    assert int(ago[i]) == period
                found.setdefault(i, k)
        for i, (entry, period) in enumerate(walks):
            if period <= KEPT_FOR:
                assert found[i] <= entry + max(KEPT_FOR, KEPT_SHARE * length) + period

    def test_needs_every_pixel_to_return(self) -> None:
        step = torch.zeros(2, dtype=torch.int64)
        x = torch.rand(2, 3, 4, 4)
        other = x.clone()
        other[1, 2, 3, 3] = torch.nextafter(other[1, 2, 3, 3], torch.tensor(2.0))
        assert Cycles(x, step).after(other, step + 7)[1].tolist() == [7, 0]


def by_hand(model: nn.Module, images: Tensor, labels: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Last-iterate and worst-so-far outcomes at each of ``lengths``, one step of one run after the other."""
    x, last, worst = images, [], []
    with torch.no_grad():
        so_far = model(images).argmax(dim=1) == labels
    for step in range(1, max(lengths) + 1):
        leaf = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
        x = x + ALPHA * torch.autograd.grad(loss, leaf)[0].sign()
        x = torch.minimum(torch.maximum(x, images - EPS), images + EPS).clamp(0, 1)
        with torch.no_grad():
            correct = model(x).argmax(dim=1) == labels
        so_far = so_far & correct
        if step in lengths:
            last.append(correct)
            worst.append(so_far)
    return torch.stack(last), torch.stack(worst)


def evaluated(model: nn.Module, images: Tensor, labels: Tensor, score: str = "last", **options: Any) -> Evaluation:
    specs = tuple(AttackSpec("ifgsm", EPS, ALPHA, k, score) for k in LENGTHS)  # type: ignore[arg-type]
    return evaluate(model, (images, labels), Protocol("long", specs), **options)


class Parabola(nn.Module):
    """Loss is highest at a place that steps jump over: correct on one side of it, wrong on the other."""

    def forward(self, x: Tensor) -> Tensor:
        away = (x.flatten(1) - 0.503).square().sum(dim=1)
        return torch.stack([torch.zeros_like(away), 1e-4 - 10 * away], dim=1)


class TestOutcomes:
    def test_are_those_of_whole_runs(self) -> None:
        """In float64 the signs do not depend on rounding."""
        model, (images, labels) = trained(), held_out(100)
        model, images = nn.Sequential(model).double(), images.double()
        try:
            last, worst = by_hand(model, images, labels, LENGTHS)
            result, queue = (evaluated(model, images, labels, score) for score in ("last", "worst"))
        finally:
            model.float()
        assert torch.equal(torch.stack([attack.outcomes for attack in result.attacks]), last)
        assert torch.equal(torch.stack([attack.worst_so_far_outcomes for attack in result.attacks]), worst)
        assert torch.equal(torch.stack([attack.worst_so_far_outcomes for attack in queue.attacks]), worst)
        assert 0 < int(worst.sum()) < worst.numel()
        assert result.gradient_evaluations < 0.5 * max(LENGTHS) * len(images)
        assert queue.gradient_evaluations < result.gradient_evaluations

    def test_of_a_cycle_alternate_with_its_steps(self) -> None:
        images = torch.tensor([0.5 - 0.2 * EPS, 0.5 + 0.1 * EPS, 0.56], dtype=torch.float64).reshape(3, 1, 1, 1)
        labels = torch.zeros(3, dtype=torch.int64)
        last, worst = by_hand(Parabola(), images, labels, LENGTHS)
        result = evaluated(Parabola(), images, labels)
        found = torch.stack([attack.outcomes for attack in result.attacks])
        assert torch.equal(found, last)
        assert torch.equal(torch.stack([attack.worst_so_far_outcomes for attack in result.attacks]), worst)
        alternating = last[-1] != last[-2]
        assert alternating.any()
        assert not alternating.all()
        assert result.gradient_evaluations < 60 * len(images)

    def test_agree_with_the_attack_itself(self) -> None:
        images, labels = held_out(50)
        result = evaluated(trained(), images, labels)
        attacked = attacks.ifgsm(trained(), images, labels, eps=EPS, alpha=ALPHA, steps=LENGTHS[-1])
        correct = trained()(attacked).argmax(dim=1) == labels
        assert int((result.attacks[-1].outcomes != correct).sum()) <= 1  # a tie that rounding decides

    def test_of_random_models_are_not_foreseen(self) -> None:
        class Noisy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Parabola()(x + 1e-4 * torch.randn_like(x)) - torch.tensor([0.0, 1.0])  # never fooled

        images, labels = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
        result = evaluated(Noisy(), images, labels, stochastic=True)
        assert result.gradient_evaluations >= 2 * (max(LENGTHS) - 1)

    def test_radii_that_part_late_have_cycles_of_their_own(self) -> None:
        """The second of two pixels rises only while the first, which goes round in two steps, is at a place."""
        unit = 1 / 1024
        place = 0.5 + 31 * unit

        class Gated(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                p, q = x.flatten(1).unbind(1)
                gate = ((p.detach() - place).abs() < unit / 4).to(p)
                slope = gate * q - 1e3 * (p - place - 0.4 * unit) ** 2
                value = torch.where(q.detach() > 0.5 + 20.5 * unit, 1.0, -1.0)  # fooled after 21 rises
                return torch.stack([0 * q, slope + (value - slope).detach()], dim=1)

        images, labels = torch.full((1, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        specs = tuple(AttackSpec("ifgsm", radius * unit, unit, 200) for radius in (31, 48))
        together = evaluate(Gated(), (images, labels), Protocol("both", specs)).attacks
        for spec, attack in zip(specs, together, strict=True):
            alone = evaluate(Gated(), (images, labels), Protocol("one", (spec,))).attacks[0]
            assert attack.outcomes.tolist() == alone.outcomes.tolist()
            assert attack.worst_so_far_outcomes.tolist() == alone.worst_so_far_outcomes.tolist()
        assert together[1].outcomes.tolist() == [False]

    @pytest.mark.parametrize("score", ["last", "worst"])
    def test_of_gradients_that_are_drawn_are_not_foreseen(self, score: str) -> None:
        """The same logits on every pass: only the gradients tell."""

        class Shaky(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: object, gradient: Tensor) -> Tensor:
                return torch.where(torch.rand_like(gradient) < 0.02, -gradient, gradient)

        class Drawn(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                slope = Shaky.apply(x.flatten(1)).mean(dim=1)
                return torch.stack([torch.zeros_like(slope), slope - slope.detach() - 1.0], dim=1)  # never fooled

        images, labels = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
        result = evaluated(Drawn(), images, labels, score)
        assert result.gradient_evaluations >= 4 * (max(LENGTHS) - 1)
        assert any("gradients of the same images differ" in note for note in result.notes)
