from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import conv_net
from torch import Tensor, nn

from odeadv.attacks import fgsm, ifgsm
from odeadv.evaluation import PROTOCOLS, AttackResult, AttackSpec, Evaluation, Protocol, evaluate
from odeadv.evaluation.protocols import resolve_protocol
from odeadv.support.statistics import wilson_interval


class Counting(nn.Module):
    """A conv net that counts the images it sees, and those whose gradient comes back."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = conv_net(dtype)
        self.forwards = self.backwards = 0
        self.shapes: list[torch.Size] = []
        self.channels_last: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.shapes.append(x.shape)
        self.channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
        if x.requires_grad:
            x.register_hook(self.came_back)
        return self.net(x)

    def came_back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def labelled(model: Counting, n: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return images with the model's own labels, except every eighth, which is wrong from the beginning."""
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    with torch.no_grad():
        labels = model.eval().net(images).argmax(1)
    labels[::8] = (labels[::8] + 1) % 5
    return images, labels


def oscillating() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model that IFGSM with alpha = 0.05 breaks at its first iterate, and that is right again at the second.

    Class 1 wins on the band 0.52 < x < 0.58 only, but its logit grows with x everywhere: from 0.5 the attack walks
    to 0.55, inside, and on to 0.6, outside. The second image never gets there.
    """

    class Band(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1).sum(1)
            inside = ((x > 0.52) & (x < 0.58)).to(x.dtype)
            return torch.stack([torch.zeros_like(x), x - 0.9 + inside], dim=1)

    images = torch.tensor([[[[0.5]]], [[[0.1]]]], dtype=torch.float64)
    return Band(), (images, torch.tensor([0, 0]))


def test_protocols_are_those_of_the_paper() -> None:
    def rows(name: str) -> list[tuple[str, float, float, int]]:
        return [
            (spec.name, round(255 * spec.eps, 9), round(255 * spec.alpha, 9), spec.steps)
            for spec in PROTOCOLS[name].attacks
        ]

    assert list(PROTOCOLS) == ["table1", "table2", "eps4", "table6", "eps4-steps", "autoattack"]
    assert rows("table1") == [
        ("fgsm", 0.5, 0.5, 1),
        ("fgsm", 1, 1, 1),
        ("ifgsm", 0.5, 0.5, 20),
        ("ifgsm", 1, 0.5, 20),
    ]
    assert rows("table2") == [("fgsm", 8, 8, 1), ("fgsm", 12, 12, 1), ("ifgsm", 8, 2, 20), ("ifgsm", 12, 2, 20)]
    assert rows("table6") == [("ifgsm", 8, 2, 20), ("ifgsm", 8, 2, 100), ("ifgsm", 8, 2, 1000)]
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())


SHORT = Protocol(
    "short",
    (
        AttackSpec("ifgsm", 8 / 255, 2 / 255, 7),
        AttackSpec("fgsm", 4 / 255, 4 / 255, 1),
        AttackSpec("ifgsm", 8 / 255, 2 / 255, 3),
        AttackSpec("ifgsm", 2 / 255, 2 / 255, 2),
    ),
)


class TestOutcomes:
    @pytest.mark.parametrize("protocol", [PROTOCOLS["table1"], PROTOCOLS["table2"], SHORT], ids=lambda p: p.name)
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_are_those_of_separate_attacks(self, protocol: Protocol, channels_last: bool) -> None:
        model = Counting()
        images, labels = labelled(model)
        result = evaluate(model, (images, labels), protocol, batch_size=16, channels_last=channels_last)

        def right(x: Tensor) -> Tensor:
            with torch.no_grad():
                return model.net.eval()(x).argmax(1) == labels

        clean = right(images)
        assert torch.equal(result.clean_outcomes, clean)
        assert 0 < result.clean_correct < len(images)
        for spec, attack in zip(protocol.attacks, result.attacks, strict=True):
            assert (attack.name, attack.eps, attack.alpha, attack.steps) == (
                spec.name,
                spec.eps,
                spec.alpha,
                spec.steps,
            )
            if spec.name == "fgsm":
                every = [fgsm(model, images, labels, eps=spec.eps)]
            else:
                every = [
                    ifgsm(model, images, labels, eps=spec.eps, alpha=spec.alpha, steps=steps)
                    for steps in range(1, spec.steps + 1)
                ]
            scores = torch.stack([clean, *map(right, every)])
            assert torch.equal(attack.outcomes, scores[-1])
            assert torch.equal(attack.worst_so_far_outcomes, scores.all(0))
        assert len({attack.robust_correct for attack in result.attacks}) > 1  # the attacks do differ here

    def test_last_iterate_and_worst_so_far_are_different_things(self) -> None:
        model, data = oscillating()
        protocol = Protocol("steps", tuple(AttackSpec("ifgsm", 0.1, 0.05, steps) for steps in (1, 2)))
        once, twice = evaluate(model, data, protocol).attacks
        assert once.outcomes.tolist() == [False, True]
        assert twice.outcomes.tolist() == [True, True]
        assert twice.worst_so_far_outcomes.tolist() == [False, True]
        assert (twice.robust_accuracy, twice.worst_so_far_accuracy) == (1.0, 0.5)

    def test_worst_so_far_of_an_attack_with_options_looks_at_every_iterate(self) -> None:
        """`eot=1` is plain IFGSM, but shares no work: its worst-so-far score covers all iterates, or is missing."""
        model, data = oscillating()
        same = {"eot": 1}
        worst, last, kept = evaluate(
            model,
            data,
            Protocol(
                "p",
                (
                    AttackSpec("ifgsm", 0.1, 0.05, 2, "worst", same),
                    AttackSpec("ifgsm", 0.1, 0.05, 2, "last", same),
                    AttackSpec("ifgsm", 0.1, 0.05, 2, "last", {"keep": "worst"}),
                ),
            ),
        ).attacks
        assert worst.outcomes is None
        assert worst.worst_so_far_outcomes.tolist() == kept.worst_so_far_outcomes.tolist() == [False, True]
        assert last.outcomes.tolist() == [True, True]
        assert last.worst_so_far_outcomes is None
        with pytest.raises(ValueError, match=r"^worst_so_far_correct: ifgsm-2 .* give score='worst'"):
            _ = last.worst_so_far_accuracy
        with pytest.raises(ValueError, match=r"^options: got keep='last', expected 'worst'"):
            AttackSpec("pgd", 0.1, 0.05, 2, "worst", {"keep": "last"})

    def test_clean_mistakes_count_in_worst_so_far(self) -> None:
        """A last iterate can be right where the clean image is wrong; the attack walks it out of the band."""
        model, (images, labels) = oscillating()
        images[0] = 0.55
        attack = evaluate(model, (images, labels), Protocol("p", (AttackSpec("fgsm", 0.1, 0.1, 1),))).attacks[0]
        assert attack.outcomes.tolist() == [True, True]
        assert attack.worst_so_far_outcomes.tolist() == [False, True]

    @pytest.mark.parametrize("batch_size", [1, 7, 24, 1000])
    def test_do_not_depend_on_batch_size(self, batch_size: int) -> None:
        model = Counting()
        data = labelled(model)
        expected = evaluate(model, data, SHORT, batch_size=16)
        result = evaluate(model, data, SHORT, batch_size=batch_size)
        assert torch.equal(result.clean_outcomes, expected.clean_outcomes)
        for a, b in zip(result.attacks, expected.attacks, strict=True):
            assert torch.equal(a.outcomes, b.outcomes)
            assert torch.equal(a.worst_so_far_outcomes, b.worst_so_far_outcomes)
        assert (result.forward_passes, result.gradient_evaluations) == (
            expected.forward_passes,
            expected.gradient_evaluations,
        )
        assert max(shape[0] for shape in model.shapes) == max(16, min(batch_size, 24))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_uint8_images_are_channels_last_255ths(self, dtype: torch.dtype) -> None:
        model = Counting(dtype)
        images, labels = labelled(model, dtype=dtype)
        stored = (255 * images).round().to(torch.uint8)
        expected = evaluate(model, (stored.to(dtype) / 255, labels), SHORT)
        result = evaluate(model, (stored.permute(0, 2, 3, 1).contiguous(), labels), SHORT)
        assert torch.equal(result.clean_outcomes, expected.clean_outcomes)
        for a, b in zip(result.attacks, expected.attacks, strict=True):
            assert torch.equal(a.outcomes, b.outcomes)
        assert {shape[1:] for shape in model.shapes} == {torch.Size([3, 8, 8])}
        assert {shape[0] for shape in model.shapes} == {1, 2, 7, 24}  # the probes and the batch

    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize("stored", [torch.float64, torch.uint8])
    def test_memory_format(self, channels_last: bool, stored: torch.dtype) -> None:
        model = Counting()
        images, labels = labelled(model)
        if stored == torch.uint8:
            images = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1)
        evaluate(model, (images, labels), SHORT, channels_last=channels_last)
        assert set(model.channels_last) == {channels_last}

    def test_images_need_not_be_4d(self) -> None:
        model = nn.Linear(4, 3)
        result = evaluate(model, (torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)), SHORT)
        assert result.n == 5


class TestCost:
    @pytest.mark.parametrize(
        ("protocol", "forwards", "gradients"),
        [
            # table1: FGSM at 0.5/255 is the first iterate of IFGSM there, as alpha = eps.
            (PROTOCOLS["table1"], 1 + 1 + 2 * 20, 1 + 2 * 19),
            # table2: below 8/255 the iterates x_1 to x_3 of both radii are the same.
            (PROTOCOLS["table2"], 1 + 2 + 2 * 20 - 3, 1 + 2 * 19 - 3),
            (Protocol("steps", tuple(AttackSpec("ifgsm", 8 / 255, 2 / 255, k) for k in (12, 20, 5))), 21, 20),
            (SHORT, 1 + 7 + 1 + 2, 1 + 6 + 1),
        ],
        ids=lambda p: getattr(p, "name", None),
    )
    def test_shares_work(self, protocol: Protocol, forwards: int, gradients: int) -> None:
        model, n = Counting(torch.float32), 3
        images, labels = labelled(model, n, torch.float32)
        result = evaluate(model, (images, labels), protocol, batch_size=3)
        assert (result.forward_passes, result.gradient_evaluations) == (forwards * n, gradients * n)
        assert model.forwards == forwards * n + result.checks["probe_forward_passes"]
        assert model.backwards == gradients * n + result.checks["probe_gradients"]
        assert result.checks["probe_gradients"] == 2 * 2  # of two images, twice
        assert result.seconds > 0

    def test_progress(self) -> None:
        model, seen = Counting(), []
        evaluate(model, labelled(model), SHORT, batch_size=8, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]


class TestModelIsLeftAlone:
    @pytest.mark.parametrize("fails", [False, True])
    def test_state(self, fails: bool) -> None:
        model = Counting()
        data = labelled(model)
        model.train()
        model.net[4].eval()
        model.net[0].weight.requires_grad_(False)
        model.net[7].weight.grad = torch.ones_like(model.net[7].weight)
        state = {key: (value, value.clone(), value._version) for key, value in model.state_dict(keep_vars=True).items()}
        modes = {name: part.training for name, part in model.named_modules()}
        kept = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        random_state = torch.get_rng_state()
        if fails:

            def progress(done: int, total: int) -> None:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                evaluate(model, data, SHORT, progress=progress)
        else:
            evaluate(model, data, SHORT)
        assert {name: part.training for name, part in model.named_modules()} == modes
        for key, tensor in model.state_dict(keep_vars=True).items():
            before, value, version = state[key]
            assert tensor is before
            assert tensor._version == version
            assert torch.equal(tensor, value)
        for name, p in model.named_parameters():
            assert p.requires_grad == kept[name][0]
            assert p.grad is kept[name][1]
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_dropout_and_batch_norm_are_in_eval_mode(self) -> None:
        model = Counting()
        data = labelled(model)
        expected = evaluate(model.eval(), data, SHORT)
        result = evaluate(model.train(), data, SHORT)
        assert torch.equal(result.clean_outcomes, expected.clean_outcomes)
        assert torch.equal(result.attacks[0].outcomes, expected.attacks[0].outcomes)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_works_where_gradients_are_off(self, context: Callable[[], Any]) -> None:
        model = Counting()
        images, labels = labelled(model)
        expected = evaluate(model, (images, labels), SHORT)
        with context():
            result = evaluate(model, (images.clone(), labels.clone()), SHORT)
        assert torch.equal(result.attacks[0].outcomes, expected.attacks[0].outcomes)


def handmade() -> Evaluation:
    clean = torch.tensor([True, True, True, False])
    last, worst = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    return Evaluation(
        protocol="table2",
        clean_outcomes=clean,
        attacks=(
            AttackResult("fgsm", 12 / 255, 12 / 255, 1, clean, clean),
            AttackResult("ifgsm", 0.5 / 255, 2 / 255, 20, last, worst),
        ),
        forward_passes=88,
        gradient_evaluations=80,
        seconds=1.25,
    )


class TestEvaluation:
    def test_figures(self) -> None:
        result = handmade()
        assert (result.n, result.clean_correct, result.clean_accuracy) == (4, 3, 0.75)
        attack = result.attacks[1]
        assert (attack.robust_correct, attack.robust_accuracy) == (2, 0.5)
        assert (attack.worst_so_far_correct, attack.worst_so_far_accuracy) == (1, 0.25)
        assert result.average == (0.75 + 0.5) / 2

    def test_to_dict(self) -> None:
        data = json.loads(json.dumps(handmade().to_dict(), allow_nan=False))
        assert set(data) == {
            "schema",
            "protocol",
            "n",
            "clean_correct",
            "clean_accuracy",
            "clean_interval",
            "clean_outcomes",
            "attacks",
            "average",
            "worst_case_correct",
            "worst_case_accuracy",
            "worst_case_interval",
            "forward_passes",
            "gradient_evaluations",
            "seconds",
            "model",
            "data",
            "settings",
            "checks",
            "notes",
        }
        assert data["schema"] == "odeadv.evaluation/3"
        assert (data["worst_case_correct"], data["worst_case_interval"]) == (1, list(wilson_interval(1, 4)))
        assert (data["n"], data["clean_correct"], data["average"], data["forward_passes"]) == (4, 3, 0.625, 88)
        assert data["attacks"][1] == {
            "name": "ifgsm",
            "radius": "0.5/255",
            "eps": 0.5 / 255,
            "eps_255": 0.5,
            "alpha": 2 / 255,
            "alpha_255": 2.0,
            "steps": 20,
            "options": {},
            "robust_correct": 2,
            "robust_accuracy": 0.5,
            "robust_interval": list(wilson_interval(2, 4)),
            "worst_so_far_correct": 1,
            "worst_so_far_accuracy": 0.25,
            "worst_so_far_interval": list(wilson_interval(1, 4)),
            "outcomes": "wA==",  # 1100 0000
            "worst_so_far_outcomes": "gA==",  # 1000 0000
        }
        assert data["attacks"][0]["eps_255"] == 12

    def test_prints_as_a_table(self) -> None:
        result = handmade()
        assert str(result) == repr(result)
        assert str(result).splitlines() == [
            "table2: n = 4, 22 forward passes and 20 gradients per image, 1.2 s",
            "attack          radius   step size  steps  robust %  worst so far %",
            "clean                                         75.00",
            "fgsm            12/255      12/255      1     75.00           75.00",
            "ifgsm          0.5/255       2/255     20     50.00           25.00",
            "average of the attacks                        62.50",
            "right under every attack (worst case)         25.00  [4.56, 69.94]",
        ]

    @pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (8123, 10000), (1, 1)])
    def test_wilson_interval_inverts_the_score_test(self, correct: int, n: int) -> None:
        low, high = wilson_interval(correct, n)
        assert 0 <= low <= correct / n <= high <= 1
        for bound, trivial in ((low, correct == 0), (high, correct == n)):
            if trivial:
                assert bound == pytest.approx(correct / n, abs=1e-12)
            else:
                z = (correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert abs(z) == pytest.approx(1.959963984540054, rel=1e-9)


IMAGES, LABELS = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"protocol": "tabel2"},
        ValueError,
        "protocol: got 'tabel2', .* table1, table2, eps4, table6, eps4-steps, autoattack; did you mean 'table2'?",
    ),
    ({"protocol": "aa"}, ValueError, "protocol: got 'aa', expected one of .* eps4, table6, eps4-steps, autoattack$"),
    (
        {"protocol": 2},
        TypeError,
        "protocol: got 2, expected a Protocol, an AttackSpec, a list of them, or one of",
    ),
    ({"batch_size": 0}, ValueError, "batch_size: got 0, expected an integer, at least 1"),
    ({"batch_size": 1.5}, TypeError, r"batch_size: got 1\.5, expected an integer, at least 1"),
    ({"model": len}, TypeError, r"model: got builtin_function_or_method, expected a torch\.nn\.Module"),
    ({"data": IMAGES}, TypeError, r"data: got Tensor, expected a pair \(images, labels\), a Dataset"),
    ({"data": (IMAGES,)}, TypeError, r"data: got tuple, expected a pair \(images, labels\)"),
    ({"data": (IMAGES.tolist(), LABELS)}, TypeError, r"images: got list, expected a torch\.Tensor"),
    ({"data": (IMAGES.int(), LABELS)}, TypeError, r"images: got dtype torch\.int32, expected a floating dtype"),
    (
        {"data": (2 * IMAGES, LABELS)},
        ValueError,
        r"images: got values in \[.*\], expected \[0, 1\]; normalisation belongs",
    ),
    ({"data": (math.nan * IMAGES, LABELS)}, ValueError, "images: contain NaN"),
    (
        {"data": (IMAGES.to(torch.uint8), LABELS)},
        ValueError,
        r"images: got uint8 of shape \(2, 3, 8, 8\), expected \(n, h, w, channels\) with 1 or 3 channels",
    ),
    (
        {"data": (IMAGES.to(torch.uint8)[:0, :, :, :3], LABELS)},
        ValueError,
        r"images: got uint8 of shape \(0, 3, 8, 3\)",
    ),
    ({"data": (IMAGES, LABELS[:1])}, ValueError, r"labels: got shape \(1,\), expected \(2,\)"),
    ({"data": (IMAGES, LABELS.int())}, TypeError, r"labels: got dtype torch\.int32, expected torch\.int64"),
    ({"data": (IMAGES, LABELS - 1)}, ValueError, "labels: got -1, expected class indices >= 0"),
    ({"data": (IMAGES, LABELS + 4)}, ValueError, "labels: got 5, expected class indices < 5"),
    ({"device": "meta"}, ValueError, r"device: got meta, expected that of the model, cpu \(the model is not moved\)"),
    ({"progress": True}, TypeError, r"progress: got True, expected None or a function \(done, total\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": Counting(torch.float32), "data": (IMAGES, LABELS), "protocol": SHORT} | change
    with pytest.raises(error, match=f"^{message}") as caught:
        evaluate(given.pop("model"), given.pop("data"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttackSpec("pdg", 0.1, 0.1, 1), ValueError, "name: got 'pdg', expected one of .*; did you mean 'pgd'"),
        (lambda: AttackSpec("ifgsm", 8, 2, 3), ValueError, r"eps: got 8, expected at most 1 .* units of 1/255\?"),
        (lambda: AttackSpec("autoattack", 0.1, 0.1), ValueError, r"alpha, steps: got 0\.1, None, expected None, be"),
        (
            lambda: AttackSpec("autoattack", 0.1, options={"n": 1}),
            ValueError,
            "options: got 'n', expected some of norm",
        ),
        (lambda: AttackSpec("pgd", 0.1, 0.1, 1, options={"restrats": 2}), ValueError, "options: got 'restrats', expec"),
        (lambda: AttackSpec("pgd", 0.1, 0.1, 1, options={"mode": "train"}), ValueError, "options: got 'mode', expec"),
        (
            lambda: AttackSpec("pgd", 0.1, 0.1, 1, "best"),
            ValueError,
            "score: got 'best', expected one of 'last', 'wor",
        ),
        (lambda: AttackSpec("ifgsm", 0.1, None, 1), TypeError, "alpha: got None, expected a number, at least 0"),
        (lambda: AttackSpec("ifgsm", 0.1, 0.1, 1, "last", 3), TypeError, "options: got 3, expected a mapping"),
        (lambda: AttackSpec("ifgsm", -0.1, 0.1, 1), ValueError, r"eps: got -0\.1, expected a finite number, at least"),
        (lambda: AttackSpec("ifgsm", 0.1, "x", 1), TypeError, "alpha: got 'x', expected a number, at least 0"),
        (lambda: AttackSpec("ifgsm", 0.1, 0.1, 0), ValueError, "steps: got 0, expected an integer, at least 1"),
        (lambda: AttackSpec("fgsm", 0.1, 0.2, 1), ValueError, r"alpha, steps: got 0\.2, 1, expected 0\.1 \(eps\), 1"),
        (lambda: AttackSpec("fgsm", 0.1, 0.1, 2), ValueError, r"alpha, steps: got 0\.1, 2, expected 0\.1 \(eps\), 1"),
        (lambda: Protocol("p", ()), ValueError, "attacks: got none, expected at least one AttackSpec"),
        (lambda: Protocol("p", [SHORT.attacks[0]]), TypeError, "attacks: got .* expected a tuple of AttackSpec"),
        (lambda: Protocol("p", ("fgsm",)), TypeError, "attacks: got .* expected a tuple of AttackSpec"),
    ],
)
def test_protocol_refusals(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_device_of_the_model_is_accepted_however_it_is_written() -> None:
    model = Counting(torch.float32)
    for device in ("cpu", torch.device("cpu"), None):
        assert evaluate(model, (IMAGES, LABELS), SHORT, device=device).n == 2


@pytest.mark.parametrize("name", ["table3", "table4", "table5", "table7"])
def test_tables_that_are_evaluated_as_table_2(name: str) -> None:
    assert resolve_protocol(name) is PROTOCOLS["table2"]
