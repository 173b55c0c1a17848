"""Evaluations that are interrupted, compared, folded, compiled, queued; and attacks beyond FGSM and IFGSM."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Small, digits, held_out, trained
from torch import Tensor, nn

import odeadv
from odeadv.attacks import apgd, ifgsm, pgd, square
from odeadv.evaluation import AttackSpec, Evaluation, ProgressLine, Protocol, evaluate, mcnemar
from odeadv.support import plain
from odeadv.support.digests import derived_seed
from odeadv.support.folding import Folded
from odeadv.support.plain import pack, unpack
from odeadv.support.statistics import exact_p_value

EPS, ALPHA, N = 0.1, 0.025, 60
LAST = Protocol(
    "last",
    (
        AttackSpec("fgsm", EPS),
        AttackSpec("ifgsm", EPS, ALPHA, 5),
        AttackSpec("ifgsm", 1.5 * EPS, ALPHA, 8),
        AttackSpec("ifgsm", EPS, ALPHA, 8),
    ),
)
WORST = Protocol(
    "worst", tuple(AttackSpec(spec.name, spec.eps, spec.alpha, spec.steps, "worst") for spec in LAST.attacks)
)
MIXED = Protocol("mixed", LAST.attacks[:2] + WORST.attacks[2:] + (AttackSpec("pgd", EPS, ALPHA, 3),))


def same(a: Evaluation, b: Evaluation) -> bool:
    """All but the wall time."""
    return {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}


def outcomes(result: Evaluation) -> Tensor:
    rows = [row for attack in result.attacks for row in (attack.outcomes, attack.worst_so_far_outcomes)]
    return torch.stack([result.clean_outcomes, *(row for row in rows if row is not None)])


def worst(result: Evaluation) -> Tensor:
    return torch.stack([result.clean_outcomes, *(attack.worst_so_far_outcomes for attack in result.attacks)])


class Stop(Exception):
    """The exception that a progress callback raises to stop an evaluation."""


def stopping_after(batches: int) -> Callable[[int, int], None]:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == batches:
            raise Stop

    return progress


class TestWorstSoFar:
    @pytest.mark.parametrize("batch_size", [7, 32, 100])
    def test_queue_gives_what_complete_runs_give(self, batch_size: int) -> None:
        complete = evaluate(trained(), held_out(N), LAST, batch_size=batch_size)
        queued = evaluate(trained(), held_out(N), WORST, batch_size=batch_size)
        assert torch.equal(worst(queued), worst(complete))
        assert 0 < queued.attacks[2].worst_so_far_correct < queued.attacks[1].worst_so_far_correct < N
        assert all(attack.outcomes is None for attack in queued.attacks)

    def test_cost_is_that_of_the_steps_until_fooled(self) -> None:
        """Forward passes: the clean one of each image, then one for each iterate until it is fooled."""
        # In float64 an outcome does not depend on the rounding of its batch.
        net = copy.deepcopy(trained()).double()
        images, labels = held_out(N)
        images = images.double()
        spec = WORST.attacks[3]
        alive = net(images).argmax(1) == labels
        expected = N
        for step in range(9):  # x_0 to x_8
            expected += int(alive.sum())
            x = ifgsm(net, images, labels, eps=EPS, alpha=ALPHA, steps=step) if step else images
            alive &= net(x).argmax(1) == labels
        result = evaluate(net, (images, labels), Protocol("p", (spec,)), batch_size=16)
        assert result.forward_passes == expected

    def test_batches_stay_full(self) -> None:
        sizes = []

        class Watched(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                sizes.append(len(x))
                return trained()(x)

        evaluate(Watched(), held_out(N), Protocol("p", WORST.attacks[3:]), batch_size=16)
        queue = sizes[9 + 4 : -1]  # after the probes and the clean batches
        assert queue == sorted(queue, reverse=True)
        assert queue[: len(queue) // 2] == [16] * (len(queue) // 2)

    def test_last_iterate_figures_are_not_there(self) -> None:
        result = evaluate(trained(), held_out(20), WORST)
        with pytest.raises(ValueError, match=r"^robust_correct: ifgsm-5 at 25\.5/255 was scored worst-so-far only"):
            _ = result.attacks[1].robust_accuracy
        data = result.to_dict()
        assert data["average"] is None
        assert data["attacks"][1]["robust_accuracy"] is None
        assert "average" not in repr(result)


class TestResume:
    @pytest.mark.parametrize("protocol", [LAST, WORST, MIXED], ids=lambda p: p.name)
    @pytest.mark.parametrize("after", [1, 3, 5])
    def test_goes_on_where_it_stopped(self, tmp_path: Path, protocol: Protocol, after: int) -> None:
        path, whole = tmp_path / "run" / "journal.jsonl", evaluate(trained(), held_out(N), protocol, batch_size=16)
        seen: list[tuple[int, int]] = []
        try:
            evaluate(trained(), held_out(N), protocol, batch_size=16, resume=path, progress=stopping_after(after))
        except Stop:
            written = len(path.read_bytes().splitlines()) - 1
            assert written == after
        resumed = evaluate(
            trained(), held_out(N), protocol, batch_size=16, resume=path, progress=lambda *done: seen.append(done)
        )
        assert torch.equal(outcomes(resumed), outcomes(whole))
        if protocol is LAST:  # a queue that was cut has to evaluate again the examples that were under way
            assert same(resumed, whole)
        assert seen[-1][0] == seen[-1][1]
        assert seen == sorted(seen)
        again = evaluate(trained(), held_out(N), protocol, batch_size=16, resume=path)
        assert same(again, resumed)

    def test_every_cut_of_the_file_gives_the_same_result(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        whole = evaluate(trained(), held_out(20), LAST, batch_size=8, resume=path)
        raw = path.read_bytes()
        for length in [1, 12, *range(0, len(raw), 211), len(raw) - 1]:
            path.write_bytes(raw[:length])
            assert same(evaluate(trained(), held_out(20), LAST, batch_size=8, resume=path), whole)
            assert len(path.read_bytes().splitlines()) == len(raw.splitlines())

    def test_a_full_disk_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, whole = tmp_path / "journal", evaluate(trained(), held_out(30), LAST, batch_size=8)
        lines, write = [], os.write

        def full(handle: int, line: bytes) -> int:
            """Write only the beginning of the fourth line, as a full disk does."""
            lines.append(line)
            return write(handle, line[:50] if len(lines) == 4 else line)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="could not be written whole; is the disk full"):
            evaluate(trained(), held_out(30), LAST, batch_size=8, resume=path)
        assert same(evaluate(trained(), held_out(30), LAST, batch_size=8, resume=path), whole)
        assert len(lines) == 4 + 2  # two of the four batches had been written

    def test_finished_batches_are_not_run_again(self, tmp_path: Path) -> None:
        evaluate(trained(), held_out(20), LAST, batch_size=8, resume=tmp_path / "j")
        calls = []
        handle = trained().register_forward_hook(lambda *_: calls.append(1))
        try:
            evaluate(trained(), held_out(20), LAST, batch_size=8, resume=tmp_path / "j")
        finally:
            handle.remove()
        assert len(calls) == 10  # the probes

    def test_what_is_another_evaluation_is_refused_by_name(self, tmp_path: Path) -> None:
        path, data = tmp_path / "journal", held_out(20)
        evaluate(trained(), data, LAST, batch_size=8, resume=path)
        before = path.read_bytes()
        for change, what in [
            ({"model": Small().eval()}, "another model"),
            ({"data": (data[0], (data[1] + 1) % 10)}, "other data"),
            ({"data": (data[0] * 0.5, data[1])}, "other data"),
            ({"protocol": WORST}, "another protocol"),
            ({"protocol": Protocol("last", LAST.attacks[:2])}, "another attacks"),
            ({"batch_size": 9}, "another settings"),
            ({"seed": 1}, "another settings"),
        ]:
            given = {"model": trained(), "data": data, "protocol": LAST, "batch_size": 8, **change}
            with pytest.raises(ValueError, match=rf"^resume: .* is the journal of {what} \(its "):
                evaluate(given.pop("model"), given.pop("data"), given.pop("protocol"), resume=path, **given)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("which", ["passes", "noise", "steps", "refine", "attribute", "hidden"])
    def test_another_function_of_the_same_weights_is_refused(self, tmp_path: Path, which: str) -> None:
        generator = torch.Generator().manual_seed(0)
        net = odeadv.models.preact_resnet(8, 4, 10, noise=0.1, generator=generator)
        loud = odeadv.models.preact_resnet(8, 4, 10, noise=0.5)
        loud.load_state_dict(net.state_dict())
        averaged, refine = odeadv.models.averaged, odeadv.models.refine

        class Scaled(nn.Module):
            def __init__(self, by: object) -> None:
                super().__init__()
                self.by, self.calls = by, 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return net.eval()(x) * (self.by if isinstance(self.by, float) else self.by.by)

        class Factor:
            def __init__(self, by: float) -> None:
                self.by = by

        def ode(steps: int) -> nn.Module:
            torch.manual_seed(0)
            return odeadv.models.ode_net(steps=steps, generator=torch.Generator().manual_seed(0))

        first, second = {
            "passes": lambda: (averaged(net, 1), averaged(net, 3)),
            "noise": lambda: (averaged(net, 1), averaged(loud, 1)),
            "steps": lambda: (ode(1), ode(2)),
            "refine": lambda: (refine(net, 1), refine(net, 2)),
            "attribute": lambda: (Scaled(1.0), Scaled(1.001)),
            "hidden": lambda: (Scaled(Factor(1.0)), Scaled(Factor(1.1))),  # which only the logits show
        }[which]()
        data = torch.rand(3, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2])
        protocol, path = Protocol("p", (AttackSpec("fgsm", EPS),)), tmp_path / "journal"
        result = evaluate(first, data, protocol, resume=path)
        assert same(evaluate(first, data, protocol, resume=path), result)
        with pytest.raises(ValueError, match=r"^resume: .* is the journal of another model"):
            evaluate(second, data, protocol, resume=path)
        if which != "hidden":
            assert evaluate(second, data, protocol).model != result.model

    def test_damage_before_the_last_line_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        evaluate(trained(), held_out(20), LAST, batch_size=8, resume=path)
        lines = path.read_bytes().splitlines(keepends=True)
        lines[1] = lines[1].replace(b'"batch": 0', b'"batch": 1')
        path.write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=r"resume: line 2 of .* is damaged"):
            evaluate(trained(), held_out(20), LAST, batch_size=8, resume=path)

    def test_another_file_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("important")
        with pytest.raises(ValueError, match=r"resume: .*notes\.txt is not a journal"):
            evaluate(trained(), held_out(20), LAST, resume=path)
        assert path.read_text() == "important"


class TestSharedWork:
    def test_radii_go_together_while_no_ball_is_left(self) -> None:
        """With alpha = eps / 4 the first three iterates are those of any larger radius."""
        images, labels = held_out(N)
        apart = sum(
            evaluate(trained(), (images, labels), Protocol("p", (spec,))).gradient_evaluations
            for spec in LAST.attacks[2:]
        )
        together = evaluate(trained(), (images, labels), Protocol("p", LAST.attacks[2:]))
        assert together.gradient_evaluations == apart - N * (1 + 3)
        assert together.forward_passes == N * (1 + 8 + 8 - 3)


class TestFolding:
    def networks(self) -> list[tuple[nn.Module, Tensor]]:
        resnet = odeadv.models.PreActResNet(8, 4, generator=torch.Generator().manual_seed(0))
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        resnet.train()(images)  # running statistics that change an image
        return [(resnet.eval(), images), (trained(), held_out(8)[0])]

    def test_is_the_same_function(self) -> None:
        for net, images in self.networks():
            import copy

            exact = copy.deepcopy(net).double()
            folded = Folded(exact).eval()
            assert folded.count == sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())
            assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
            assert torch.allclose(folded(images.double()), exact(images.double()), rtol=1e-12, atol=1e-12)

    def test_outcomes_are_those_of_the_model(self) -> None:
        before = {name: value.clone() for name, value in trained().state_dict().items()}
        plain, folded = (evaluate(trained(), held_out(N), LAST, fold=fold) for fold in (False, True))
        assert folded.settings["fold"]
        assert folded.notes == ()
        for a, b in zip(plain.attacks, folded.attacks, strict=True):
            assert int((a.outcomes != b.outcomes).sum()) <= 1  # a tie that rounding decides
        assert all(torch.equal(value, before[name]) for name, value in trained().state_dict().items())

    def test_a_model_that_cannot_be_traced_is_evaluated_as_it_is(self) -> None:
        class Branching(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return trained()(x) if x.sum() > 0 else x

        with pytest.warns(RuntimeWarning, match="not folded: fold: the model's forward cannot be traced"):
            result = evaluate(Branching(), held_out(20), LAST, fold=True)
        assert result.notes[0].startswith("not folded")
        assert torch.equal(outcomes(result), outcomes(evaluate(trained(), held_out(20), LAST)))

    def test_compile_that_fails_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def compiler(model: nn.Module, **_: object) -> nn.Module:
            raise RuntimeError("no C++ compiler\nand more")

        monkeypatch.setattr(torch, "compile", compiler)
        with pytest.warns(RuntimeWarning, match=r"torch.compile failed \(RuntimeError: no C\+\+ compiler\)$"):
            result = evaluate(trained(), held_out(20), LAST, compile=True)
        assert len(result.notes) == 1
        assert torch.equal(outcomes(result), outcomes(evaluate(trained(), held_out(20), LAST)))

    @pytest.mark.slow
    def test_compiled_outcomes_are_those_of_the_model(self) -> None:
        images, labels, _, _ = digits()
        means = torch.stack([images[labels == k].flatten(1).mean(0) for k in range(10)])
        head = nn.Linear(means.shape[1], 10)  # the nearest mean; convolutions take long to compile
        with torch.no_grad():
            head.weight.copy_(means)
            head.bias.copy_(-0.5 * (means**2).sum(1))
        net, data = nn.Sequential(nn.Flatten(), head).eval(), held_out(N)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            result = evaluate(net, data, LAST, compile=True, batch_size=25)
        expected = evaluate(net, data, LAST, batch_size=25)
        assert int((outcomes(result) != outcomes(expected)).sum()) <= 1
        assert 0 < int(outcomes(expected).sum(1).min()) < 50


class TestOtherAttacks:
    SPECS = (
        AttackSpec("pgd", EPS, ALPHA, 4, options={"restarts": 2, "loss": "margin"}),
        AttackSpec("apgd", EPS, steps=6),
        AttackSpec("square", EPS, options={"queries": 20}),
        AttackSpec("ifgsm", EPS, ALPHA, 4, options={"norm": "l2"}),
    )

    def test_are_columns_like_any(self) -> None:
        images, labels = held_out(N)
        result = evaluate(trained(), (images, labels), Protocol("p", self.SPECS), seed=3)
        again = evaluate(trained(), (images, labels), Protocol("p", self.SPECS), seed=3)
        assert same(result, again)
        assert result.attacks[0].options == {"restarts": 2, "loss": "margin"}
        assert all(attack.robust_correct < result.clean_correct for attack in result.attacks[:2])
        expected = ifgsm(trained(), images, labels, eps=EPS, alpha=ALPHA, steps=4, norm="l2")
        assert torch.equal(result.attacks[3].outcomes, trained()(expected).argmax(1) == labels)

    def test_draws_come_from_seed_batch_and_spec(self) -> None:
        """The first attack of the first batch, by hand."""
        import hashlib

        images, labels = held_out(16)
        place = f"3 0 {json.dumps(self.SPECS[0].to_dict(), sort_keys=True)} 0"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")
        x = pgd(
            trained(),
            images,
            labels,
            eps=EPS,
            alpha=ALPHA,
            steps=4,
            restarts=2,
            loss="margin",
            generator=torch.Generator().manual_seed(seed),
        )
        result = evaluate(trained(), held_out(N), Protocol("p", self.SPECS), seed=3, batch_size=16)
        assert torch.equal(result.attacks[0].outcomes[:16], trained()(x).argmax(1) == labels)

    def test_draws_do_not_depend_on_the_place(self) -> None:
        """PGD alone, after another attack, and twice: the second of two equal ones draws anew."""
        spec, other = AttackSpec("pgd", 0.7 * EPS, 2 * ALPHA, 1), AttackSpec("apgd", EPS, steps=2)
        drawn: list[Tensor] = []

        class Watched(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                drawn.append(x.detach().clone())
                return trained()(x)

        def starts(*specs: AttackSpec) -> Tensor:
            drawn.clear()
            evaluate(Watched(), held_out(16), Protocol("p", specs), seed=3)
            return torch.cat([x.flatten(1) for x in drawn if len(x) == 16])

        def has(rows: Tensor, row: Tensor) -> bool:
            return bool((rows == row).all(dim=1).any())

        alone, after, twice = starts(spec), starts(other, spec), starts(spec, spec)
        start = alone[32]  # the first image after the probe of a whole batch and the clean one: PGD's random start
        assert has(after, start)
        assert has(twice, start)
        assert int((twice == start).all(dim=1).sum()) == 1

    def test_functions_are_written_by_name(self) -> None:
        def own(logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        written = AttackSpec("pgd", EPS, ALPHA, 2, options={"loss": own}).to_dict()["options"]["loss"]
        assert written.endswith(".test_functions_are_written_by_name.<locals>.own")
        assert "0x" not in written

    def test_are_counted(self) -> None:
        counts = {"pgd": [0, 0]}

        class Watched(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                counts["pgd"][0] += len(x)
                if x.requires_grad:
                    x.register_hook(lambda g: counts["pgd"].__setitem__(1, counts["pgd"][1] + len(g)))
                return trained()(x)

        result = evaluate(Watched(), held_out(N), Protocol("p", self.SPECS), batch_size=32)
        assert result.forward_passes + result.checks["probe_forward_passes"] == counts["pgd"][0]
        assert result.gradient_evaluations + result.checks["probe_gradients"] == counts["pgd"][1]

    def test_worst_so_far_skips_what_is_wrong_already(self) -> None:
        images, labels = held_out(N)
        labels = torch.where(torch.arange(N) % 2 == 0, labels, (labels + 1) % 10)
        result = evaluate(trained(), (images, labels), Protocol("p", (AttackSpec("apgd", EPS, None, 3, "worst"),)))
        assert result.gradient_evaluations <= 4 * result.clean_correct
        assert not (result.attacks[0].worst_so_far_outcomes & ~result.clean_outcomes).any()

    @pytest.mark.parametrize("function", [apgd, square])
    def test_every_attack_with_a_radius_is_known(self, function: Callable[..., Tensor]) -> None:
        assert AttackSpec(function.__name__, EPS).arguments() == {"eps": EPS}


def by_hand(model, images, labels, *, eps, alpha=0.025, steps=4, generator=None):
    """PGD in a few lines of plain PyTorch, by backward(), that also writes to what it is given."""
    start = torch.rand(images.shape, generator=generator, dtype=images.dtype)
    x = (images + eps * (2 * start - 1)).clamp(0, 1)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        nn.functional.cross_entropy(model(x), labels).backward()
        x = (images + (x + alpha * x.grad.sign() - images).clamp(-eps, eps)).clamp(0, 1)
    images.zero_()
    return x


def blurred(model, images, labels, eps):
    """An attack without gradients, with random numbers of torch, that needs contiguous images."""
    images.view(len(images), -1)
    return (images + eps * torch.randn_like(images).clamp(-1, 1)).clamp(0, 1)


def in_l2(model, images, labels, *, eps, norm="l2"):
    """A step of length ``eps`` in L2."""
    ones = torch.ones_like(images)
    return (images + eps * ones / ones[0].norm()).clamp(0, 1)


class TestOwnAttacks:
    def test_is_a_column_like_any(self) -> None:
        """Same outcomes as by hand; weights get no gradients, and the global random state does not change."""
        net, (images, labels) = copy.deepcopy(trained()), held_out(N)
        net.zero_grad()
        before = images.clone()
        spec = AttackSpec(by_hand, EPS, ALPHA, 3)
        state = torch.get_rng_state()
        result = evaluate(net, (images, labels), Protocol("p", (spec, AttackSpec(blurred, EPS))), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(images, before)
        assert all(weight.grad is None for weight in net.parameters())
        assert [attack.name for attack in result.attacks] == [f"{__name__}:by_hand", f"{__name__}:blurred"]
        assert result.attacks[0].worst_so_far_outcomes is None  # only the returned images are known
        assert result.attacks[0].label == "by_hand-3 at 25.5/255"
        assert AttackSpec(spec.to_dict()["name"], EPS).name is by_hand
        seed = derived_seed(3, f"0 {json.dumps(spec.to_dict(), sort_keys=True)} 0")
        generator = torch.Generator().manual_seed(seed)
        expected = by_hand(net, images.clone(), labels, eps=EPS, alpha=ALPHA, steps=3, generator=generator)
        assert torch.equal(result.attacks[0].outcomes, net(expected).argmax(1) == labels)
        again = evaluate(net, (images, labels), Protocol("p", (spec, AttackSpec(blurred, EPS))), seed=3)
        assert same(result, again)
        assert (
            Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))).attacks[0].label == "by_hand-3 at 25.5/255"
        )

    def test_enters_the_worst_case(self) -> None:
        result = evaluate(trained(), held_out(N), [AttackSpec(by_hand, EPS, score="worst"), AttackSpec("fgsm", EPS)])
        worst_outcomes = result.attacks[0].worst_so_far_outcomes & result.attacks[1].worst_so_far_outcomes
        assert result.worst_case == worst_outcomes.double().mean()

    def test_gradients_of_the_user_survive_what_an_attack_does(self) -> None:
        def zeroing(model, images, labels, *, eps):
            for none in (True, False):
                model.train().zero_grad(set_to_none=none)
            model.eval()
            x = images.requires_grad_()
            nn.functional.cross_entropy(model(x), labels).backward()
            model.train()
            return (images + eps * x.grad.sign()).clamp(0, 1)

        net = copy.deepcopy(trained()).requires_grad_()
        for weight in net.parameters():
            weight.grad = torch.ones_like(weight)
        result = evaluate(net, held_out(N), [AttackSpec(zeroing, EPS), AttackSpec("fgsm", EPS)])
        assert torch.equal(*(attack.outcomes for attack in result.attacks))
        assert all(weight.requires_grad and (weight.grad == 1).all() for weight in net.parameters())

    def test_names_norms_and_arguments(self) -> None:
        def pgd(model, images, labels, *, eps, **more):
            assert more == {"colour": 3}
            return images

        own = AttackSpec(pgd, EPS, options={"colour": 3})
        assert evaluate(trained(), held_out(N), own).attacks[0].name != "pgd"  # `compare` tells them apart by name
        assert AttackSpec(in_l2, 0.5).label == "in_l2 at 0.5 in L2"
        evaluate(trained(), held_out(N), AttackSpec(in_l2, 2.0))
        assert AttackSpec(functools.partial(by_hand, steps=2), EPS).label == "by_hand at 25.5/255"

    def test_a_journal_needs_a_name_that_another_process_finds(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"the function of <lambda> at 25\.5/255"):
            evaluate(trained(), held_out(N), AttackSpec(lambda m, x, y, *, eps: x, EPS), resume=tmp_path / "j.jsonl")
        assert AttackSpec(functools.partial(by_hand, steps=2), EPS).local_functions()  # its name lacks what it holds
        journal = tmp_path / "again.jsonl"
        found = [evaluate(trained(), held_out(N), AttackSpec(by_hand, EPS), resume=journal) for _ in range(2)]
        assert same(*found)

    def test_from_a_file_and_with_radii_per_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my_attack.py").write_text("def still(model, images, labels, *, eps):\n    return images\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "p.yaml").write_text("name: mine\nattacks:\n  - {name: 'my_attack:still', eps: 8/255}\n")
        protocol = plain.read(Protocol, tmp_path / "p.yaml")
        assert protocol.attacks[0].label == "still at 8/255"
        with pytest.raises(TypeError, match="name: got 3, expected a string"):
            plain.from_dict(Protocol, {"name": "p", "attacks": [{"name": 3, "eps": 0.1}]})
        assert copy.deepcopy(protocol.attacks[0]) == protocol.attacks[0]
        assert dataclasses.replace(protocol.attacks[0], eps=0.5).eps == 0.5
        result = evaluate(trained(), held_out(N), protocol)
        assert torch.equal(result.attacks[0].outcomes, result.clean_outcomes)

        def per_image(model, images, labels, *, eps):
            return (images + eps.view(-1, 1, 1, 1)).clamp(0, 1).to(images.dtype)

        evaluate(trained(), held_out(N), AttackSpec(per_image, torch.linspace(0, 0.1, N)))
        evaluate(trained(), held_out(N), AttackSpec(in_l2, 2.0, options={"norm": "l2"}))

    @pytest.mark.parametrize(
        ("attack", "options", "error", "message"),
        [
            (lambda m, x, y, *, eps: x + 2 * eps, {}, ValueError, "leave the ball of radius 25.5/255 or .* by 0.1"),
            (lambda m, x, y, *, eps: x * torch.nan, {}, ValueError, "leave the ball"),
            (lambda m, x, y, *, eps: x[:1], {}, TypeError, r"returned torch.float32 of shape \(1, .*expected images"),
            (lambda m, x, y, *, eps: None, {}, TypeError, "returned NoneType, expected images"),
            (in_l2, {"norm": "l1"}, ValueError, "norm: got 'l1'"),
            (lambda m, x, y: x, {}, ValueError, r"expected an attack \(model, images, labels, \*, eps"),
            (blurred, {"restarts": 2}, ValueError, "options: got 'restarts', expected some of none"),
            (lambda m, x, y, *, eps, mode: x, {}, ValueError, "mode: missing, expected a value for the attack"),
            (lambda m, x, y, *, eps, norm="l2": in_l2(m, x, y, eps=2 * eps), {}, ValueError, "radius 0.1 in L2"),
            (torch.add, {}, ValueError, "name: got <built-in .*, expected a Python function"),
            ("nowhere:attack", {}, ValueError, "name: 'nowhere:attack' cannot be imported"),
            (3, {}, TypeError, "name: got 3, expected one of 'apgd'"),
        ],
    )  # fmt: skip
    def test_refusals(self, attack, options, error, message) -> None:
        with pytest.raises(error, match=message):
            evaluate(trained(), held_out(N), AttackSpec(attack, EPS, options=options))


class TestAutoAttack:
    def test_is_its_parts_in_a_row(self) -> None:
        """AutoAttack of pyautoattack with fewer steps, against its parts run one by one on the images that are left."""
        package = pytest.importorskip("pyautoattack")
        images, labels = held_out(16)
        spec = AttackSpec("autoattack", EPS, options={"version": "custom", "attacks": ("apgd-ce", "apgd-dlr")})
        state = torch.get_rng_state()
        result = evaluate(trained(), (images, labels), Protocol("aa", (spec,)), batch_size=16)
        assert torch.equal(torch.get_rng_state(), state)
        assert result.attacks[0].outcomes is None
        assert 0 < result.attacks[0].worst_so_far_correct < result.clean_correct
        alive = trained()(images).argmax(1) == labels
        with torch.random.fork_rng(devices=[]):
            for part in spec.options["attacks"]:
                attack = package.AutoAttack(trained(), eps=EPS, version="custom", attacks=[part], seed=0)
                found, _ = attack.run_standard_evaluation(images[alive], labels[alive])
                alive[alive.clone()] = trained()(found).argmax(1) == labels[alive]
        # Seeds differ, so an example on the edge may.
        assert int((alive != result.attacks[0].worst_so_far_outcomes).sum()) <= 1
        strong = evaluate(trained(), (images, labels), Protocol("p", (AttackSpec("ifgsm", EPS, ALPHA, 10, "worst"),)))
        assert result.attacks[0].worst_so_far_correct <= strong.attacks[0].worst_so_far_correct

    def test_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
        with pytest.raises(ImportError, match=r"pyautoattack: is not installed.*'odeadv\[autoattack\]'"):
            evaluate(trained(), held_out(4), "autoattack")


class TestMcNemar:
    def evaluation(self, right: list[int], n: int = 40, data: str = "d") -> Evaluation:
        last = torch.zeros(n, dtype=torch.bool)
        last[right] = True
        attack = odeadv.evaluation.AttackResult("ifgsm", 8 / 255, 2 / 255, 20, last, last & (torch.arange(n) > 3))
        return Evaluation("p", torch.ones(n, dtype=torch.bool), (attack,), 0, 0, 0.0, data=data)

    def test_counts(self) -> None:
        a, b = self.evaluation(list(range(12))), self.evaluation(list(range(9, 15)))
        found = mcnemar(a, b)
        assert (found.n, found.both, found.only_a, found.only_b, found.neither) == (40, 3, 9, 3, 25)
        assert found.p_value == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12)  # closed form
        assert found.difference == 6 / 40
        assert mcnemar(a, b, attack="ifgsm-20 at 8/255") == found
        assert mcnemar(a, b, score="worst").only_a == 5
        assert mcnemar(a, b, attack="clean").p_value == 1

    @pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (0, 7), (31, 12), (400, 470), (3000, 2500)])
    def test_is_the_exact_binomial_test(self, b: int, c: int) -> None:
        stats = pytest.importorskip("scipy.stats")
        expected = stats.binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
        assert exact_p_value(b, c) == pytest.approx(expected, rel=1e-9)
        assert exact_p_value(b, c) == exact_p_value(c, b) <= 1

    def test_refusals(self) -> None:
        a = self.evaluation([1])
        for other, options, message in [
            (self.evaluation([1], data="e"), {}, r"b: has other data \(e\), expected those of a \(d\)"),
            (self.evaluation([1], n=41), {}, "b: has 41 examples, expected the 40 of a"),
            (a, {"attack": 1}, "attack: got 1, expected 0 to 0"),
            (a, {"attack": "pgd"}, "attack: got 'pgd', expected a place, 'clean', 'worst case', or one of ifgsm-20"),
            (a, {"score": "best"}, "score: got 'best', expected 'last' or 'worst'"),
        ]:
            with pytest.raises(ValueError, match=f"^{message}"):
                mcnemar(a, other, **options)

    @pytest.mark.parametrize("change", [{"alpha": 1 / 255}, {"options": {"restarts": 5}}])
    def test_attacks_of_one_label_that_differ_are_refused(self, change: dict[str, object]) -> None:
        a = self.evaluation([1])
        b = dataclasses.replace(a, attacks=(dataclasses.replace(a.attacks[0], **change),))
        assert a.attacks[0].label == b.attacks[0].label
        with pytest.raises(ValueError, match=r"^attack: 0 is .* in a and .* in b, expected the same attack"):
            mcnemar(a, b)

    def test_data_that_are_not_known_are_warned_of(self) -> None:
        with pytest.warns(RuntimeWarning, match=r"^mcnemar: an evaluation lacks a digest of its data"):
            mcnemar(self.evaluation([1], data=""), self.evaluation([1]))

    def test_worst_so_far_that_was_not_measured_is_refused(self) -> None:
        result = evaluate(trained(), held_out(20), Protocol("p", MIXED.attacks[-1:]))
        with pytest.raises(ValueError, match=r"^score: got 'worst', expected 'last'"):
            mcnemar(result, result, score="worst")

    def test_of_two_evaluations(self) -> None:
        a, b = (evaluate(net, held_out(N), LAST) for net in (trained(), Small().eval()))
        found = mcnemar(a, Evaluation.from_dict(b.to_dict()), attack=1)
        assert found.only_a - found.only_b == a.attacks[1].robust_correct - b.attacks[1].robust_correct


class TestJson:
    @pytest.mark.parametrize("protocol", [LAST, WORST, MIXED], ids=lambda p: p.name)
    def test_round_trip(self, protocol: Protocol) -> None:
        result = evaluate(trained(), held_out(N), protocol)
        data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        back = Evaluation.from_dict(data)
        assert back.to_dict() == data
        assert torch.equal(outcomes(back), outcomes(result))
        assert len(data["clean_outcomes"]) == 4 * math.ceil(math.ceil(N / 8) / 3)

    def test_refusals(self) -> None:
        data = evaluate(trained(), held_out(20), LAST).to_dict()
        changes: list[tuple[dict[str, object], str]] = [
            ({"schema": "odeadv.evaluation/1"}, "schema: got 'odeadv.evaluation/1', expected 'odeadv.evaluation/3' or"),
            ({"clean_outcomes": "AAAA"}, "clean_correct: got .*, expected 0 as in the outcomes"),
            ({"clean_outcomes": "AA"}, "outcomes: .*, expected base64 of packed bits"),
            ({"n": "20"}, "n: got '20', expected int"),
            ({"seconds": None}, "seconds: got None, expected int or float"),
            ({"settings": 3}, "settings: got 3, expected dict"),
            ({"attacks": [3]}, "attacks: got int, expected a mapping for each"),
            ({"attacks": [{**data["attacks"][0], "eps": "x"}]}, "eps: got 'x', expected int or float"),
            ({"clean_accuracy": 0.123}, "clean_accuracy: got 0.123, expected .* as in the outcomes"),
            ({"average": 0.123}, "average: got 0.123, expected .* as in the outcomes"),
            ({"n": 30}, "outcomes: got 3 bytes, expected 4 for 30 outcomes"),
        ]
        for change, message in changes:
            with pytest.raises(ValueError, match=f"^{message}"):
                Evaluation.from_dict({**data, **change})
        del data["notes"]
        with pytest.raises(ValueError, match=r"^evaluation: no 'notes', expected all"):
            Evaluation.from_dict(data)

    @pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (0,)])
    def test_bits(self, shape: tuple[int, ...]) -> None:
        value = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        assert torch.equal(unpack(pack(value), *shape), value)
        assert len(pack(value)) == 4 * math.ceil(math.ceil(value.numel() / 8) / 3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgressLine:
    def test_a_file_gets_one_line_per_interval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter([0.0, 30.0, 61.0, 70.0, 130.0])
        monkeypatch.setattr("odeadv.support.progress.time.monotonic", lambda: next(now))
        stream = io.StringIO()
        line = ProgressLine("clean", stream=stream)
        for done in (50, 51, 111, 112, 180):
            line(done, 233)
        lines = stream.getvalue().splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("clean")
        assert "111/233" in lines[0]
        assert "01:01<02:02" in lines[0]  # 61 batches in 61 s, 122 left: work of an earlier run is not counted

    def test_a_terminal_gets_a_bar(self) -> None:
        stream = Terminal()
        line = ProgressLine(stream=stream)
        for done in (0, 1, 3):
            line(done, 3)
        shown = stream.getvalue()
        assert "\r" in shown
        assert "3/3" in shown
