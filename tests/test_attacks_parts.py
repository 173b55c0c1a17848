"""Losses, norms, targets, starts, restarts, momentum and noise of the gradient attacks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import image_batch as batch
from helpers import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from odeadv.attacks import Gaussian, Tally, apgd, fgsm, ifgsm, pgd, square, transfer, worst_of
from odeadv.attacks._gradient import with_momentum
from odeadv.attacks._losses import LOSS_RULES, Truth
from odeadv.attacks.balls import L2Ball, linf_bounds, unit
from odeadv.attacks.objective import AttackLoss, attacking
from odeadv.evaluation import AttackSpec, Protocol, evaluate

EPS, ALPHA = 8 / 255, 2 / 255
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def net(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, classes: int = 5) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(dropout), nn.Flatten()]
        return nn.Sequential(*parts, nn.Linear(256, classes)).to(dtype).eval()


def linear(*rows: list[float]) -> nn.Linear:
    model = nn.Linear(len(rows[0]), len(rows), bias=False).double()
    model.weight.data = torch.tensor(rows, dtype=torch.float64)
    return model


def middle(n: int, pixels: int) -> Tensor:
    return torch.full((n, pixels), 0.5, dtype=torch.float64)


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": lambda *args, **more: fgsm(*args, **more),
    "ifgsm": lambda *args, **more: ifgsm(*args, alpha=more["eps"] / 3, steps=4, **more),
    "momentum": lambda *args, **more: ifgsm(*args, alpha=more["eps"] / 3, steps=4, momentum=1.0, **more),
    "worst": lambda *args, **more: ifgsm(*args, alpha=more["eps"] / 3, steps=4, keep="worst", **more),
    "pgd": lambda *args, **more: pgd(*args, alpha=more["eps"] / 3, steps=3, restarts=2, **draws(more)),
    "gaussian": lambda *args, **more: pgd(*args, alpha=more["eps"], steps=2, start="gaussian", **draws(more)),
    "apgd": lambda *args, **more: apgd(*args, steps=6, **draws(more)),
    "square": lambda *args, norm="linf", **more: square(*args, queries=6, **draws(more)),
}


def draws(more: dict[str, Any]) -> dict[str, Any]:
    return {"generator": seeded()} | more


every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


class TestLosses:
    LOGITS = torch.tensor([[3.0, 1.0, -1.0, 0.5], [0.0, 2.0, 1.5, -2.0]], dtype=torch.float64)
    LABELS = torch.tensor([0, 2])

    def value(self, name: str, target: Tensor | None = None, clean: Tensor | None = None) -> Tensor:
        return LOSS_RULES[name].ascended(self.LOGITS, Truth(self.LABELS, target, clean))

    def test_cross_entropy(self) -> None:
        expected = -self.LOGITS.log_softmax(1)[[0, 1], [0, 2]]
        torch.testing.assert_close(self.value("ce"), expected)
        torch.testing.assert_close(self.value("ce", torch.tensor([1, 3])), self.LOGITS.log_softmax(1)[[0, 1], [1, 3]])

    def test_margin(self) -> None:
        assert self.value("margin").tolist() == [1.0 - 3.0, 2.0 - 1.5]
        assert self.value("margin", torch.tensor([1, 3])).tolist() == [1.0 - 3.0, -2.0 - 2.0]

    def test_dlr(self) -> None:
        expected = torch.tensor([-(3.0 - 1.0) / (3.0 - 0.5), -(1.5 - 2.0) / (2.0 - 0.0)], dtype=torch.float64)
        torch.testing.assert_close(self.value("dlr"), expected)
        targeted = torch.tensor(
            [-(3.0 - 1.0) / (3.0 - (0.5 - 1.0) / 2), -(1.5 + 2.0) / (2.0 - (0.0 - 2.0) / 2)], dtype=torch.float64
        )
        torch.testing.assert_close(self.value("dlr", torch.tensor([1, 3])), targeted)

    def test_kl(self) -> None:
        clean = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
        p, q = clean.softmax(1), self.LOGITS.softmax(1)
        torch.testing.assert_close(self.value("kl", clean=clean), (p * (p / q).log()).sum(1))

    @pytest.mark.parametrize("name", ["dlr", "margin", "ce"])
    def test_no_scale_hides_the_gradient_of_dlr_and_margin(self, name: str) -> None:
        """A head that multiplies its logits by 1e4 rounds the softmax to 0 and 1: the cross-entropy's gradient is 0."""
        images = middle(1, 3).float()
        model = linear([1e4, 0, 0], [0, 1e4, 0], [0, 0, 1e3], [0, 0, -1e3]).float()
        model.bias = nn.Parameter(torch.tensor([1e4, 0.0, 0.0, 0.0]))
        moved = (fgsm(model, images, torch.tensor([0]), eps=0.1, loss=name) - images)[0]
        if name == "ce":
            assert torch.equal(moved, torch.zeros(3))
        else:
            torch.testing.assert_close(moved[:2], torch.tensor([-0.1, 0.1]))

    @pytest.mark.parametrize("name", sorted(LOSS_RULES))
    def test_gradients_by_finite_differences(self, name: str) -> None:
        clean = torch.randn(2, 4, generator=seeded(), dtype=torch.float64)
        truth = Truth(self.LABELS, None, clean)
        assert torch.autograd.gradcheck(
            lambda z: LOSS_RULES[name].ascended(z, truth), self.LOGITS.clone().requires_grad_()
        )

    def test_dlr_needs_classes(self) -> None:
        model, images = linear([1.0, 0.0], [0.0, 1.0]), middle(1, 2)
        with pytest.raises(ValueError, match=r"^loss: 'dlr' got 2 classes, expected at least 3; use 'margin'"):
            fgsm(model, images, torch.tensor([0]), eps=0.1, loss="dlr")

    def test_kl_evaluates_the_clean_images_once(self) -> None:
        tally = Tally()
        images, labels = batch()
        attacked = pgd(
            net(), images, labels, eps=EPS, alpha=ALPHA, steps=5, loss="kl", start="gaussian", generator=seeded(),
            tally=tally,
        )  # fmt: skip
        assert tally.queries.tolist() == [6] * 6
        assert tally.gradients.tolist() == [5] * 6
        assert not torch.equal(attacked, images)

    def test_kl_is_the_inner_attack_of_trades(self) -> None:
        model, (images, labels) = net(), batch()
        noise = torch.randn(images.shape, generator=seeded(4), dtype=images.dtype)
        x = (images + 0.001 * noise).clamp(0, 1)
        with torch.no_grad():
            p = model(images).softmax(1)
        for _ in range(4):
            x.requires_grad_()
            kl = functional.kl_div(model(x).log_softmax(1), p, reduction="sum")
            x = (x + ALPHA * torch.autograd.grad(kl, x)[0].sign()).detach()
            x = torch.minimum(torch.maximum(x, images - EPS), images + EPS).clamp(0, 1)
        actual = pgd(
            model, images, labels, eps=EPS, alpha=ALPHA, steps=4, loss="kl", start="gaussian", generator=seeded(4)
        )
        torch.testing.assert_close(actual, x, rtol=0, atol=1e-14)


class TestLinearModels:
    """On a linear model of two classes the gradient is a multiple of the difference of the rows."""

    MODEL = linear([1.0, -2.0, 0.0, 2.0], [2.0, 0.0, 0.0, 4.0])  # the differences 1, 2, 0, 2 have norm 3

    @pytest.mark.parametrize("loss", ["ce", "margin"])
    def test_l2_step(self, loss: str) -> None:
        images, labels = middle(2, 4), torch.tensor([0, 1])
        direction = torch.tensor([1.0, 2.0, 0.0, 2.0], dtype=torch.float64) / 3
        expected = images + 0.3 * torch.stack([direction, -direction])
        actual = fgsm(self.MODEL, images, labels, eps=0.3, norm="l2", loss=loss)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        steps = ifgsm(self.MODEL, images, labels, eps=0.3, alpha=0.1, steps=2, norm="l2", loss=loss)
        torch.testing.assert_close(steps - images, (expected - images) * 2 / 3, rtol=0, atol=1e-12)
        far = ifgsm(self.MODEL, images, labels, eps=0.3, alpha=0.25, steps=7, norm="l2", loss=loss)
        torch.testing.assert_close(far, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("loss", ["ce", "margin"])
    def test_targeted_is_descending_towards_the_target(self, norm: str, loss: str) -> None:
        images, labels = middle(2, 4), torch.tensor([0, 1])
        given = {"eps": 0.2, "norm": norm, "loss": loss}
        untargeted = fgsm(self.MODEL, images, labels, **given)
        targeted = fgsm(self.MODEL, images, labels, target=1 - labels, **given)
        torch.testing.assert_close(targeted, untargeted)  # with two classes, an image that leaves one reaches the other

    def test_targeted_reaches_the_target_and_not_the_nearest_class(self) -> None:
        model = linear([1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0])
        images, labels, target = middle(1, 3), torch.tensor([0]), torch.tensor([2])
        for loss in ("ce", "margin", lambda z, y: functional.cross_entropy(z, y, reduction="none")):
            attacked = ifgsm(model, images, labels, eps=0.2, alpha=0.05, steps=4, target=target, loss=loss)
            assert model(attacked).argmax(1) == target
        attacked = apgd(model, images, labels, eps=0.2, steps=5, target=target, generator=seeded())
        assert model(attacked).argmax(1) == target

    @pytest.mark.parametrize("name", ["most-likely", "least-likely"])
    @pytest.mark.parametrize("attack", ["fgsm", "ifgsm", "pgd", "apgd", "square"])
    def test_named_targets_are_those_of_the_clean_logits(self, name: str, attack: str) -> None:
        model, (images, labels) = net(), batch()
        with torch.no_grad():
            ranked = model(images).argsort(1, descending=name == "most-likely")
        wanted = torch.where(ranked[:, 0] == labels, ranked[:, 1], ranked[:, 0])
        tally, other = Tally(), Tally()
        expected = ATTACKS[attack](model, images, labels, eps=EPS, target=wanted, tally=other)
        actual = ATTACKS[attack](model, images, labels, eps=EPS, target=name, tally=tally)
        assert torch.equal(actual, expected)
        assert torch.equal(tally.queries, other.queries + 1)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_optimum_is_found(self, norm: str) -> None:
        images, labels = middle(2, 4), torch.tensor([1, 1])  # never fooled within 0.1
        shared: dict[str, Any] = {"eps": 0.1, "norm": norm}
        expected = fgsm(self.MODEL, images, labels, **shared)
        for attacked in (
            ifgsm(self.MODEL, images, labels, alpha=0.04, steps=4, keep="worst", **shared),
            ifgsm(self.MODEL, images, labels, alpha=0.03, steps=5, momentum=1.0, **shared),
            pgd(self.MODEL, images, labels, alpha=0.05, steps=60, restarts=2, generator=seeded(), **shared),
            apgd(self.MODEL, images, labels, steps=60, generator=seeded(), **shared),
        ):
            moved = torch.tensor([True, True, norm == "l2", True])  # the weight of the third pixel is 0
            torch.testing.assert_close(attacked[:, moved], expected[:, moved], rtol=0, atol=2e-3)

    def test_l2_without_a_gradient_stays(self) -> None:
        images = middle(1, 4)
        flat = linear([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
        for momentum in (0.0, 1.0):
            actual = ifgsm(
                flat, images, torch.tensor([0]), eps=1, alpha=1, steps=2, norm="l2", loss="margin", momentum=momentum
            )
            assert torch.equal(actual, images)

    def test_tiny_gradients_have_a_direction(self) -> None:
        gradient = torch.tensor([[3e-30, -4e-30], [0.0, 0.0], [3e30, 4e30]])
        torch.testing.assert_close(unit(gradient), torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.6, 0.8]]))


class TestTargetsInProtocols:
    def test_a_named_target(self) -> None:
        model = net()
        images = torch.rand(12, 3, 8, 8, generator=seeded(2), dtype=torch.float64)
        with torch.no_grad():
            labels = model(images).argmax(1)
        spec = AttackSpec("ifgsm", 0.1, 0.02, 6, options={"target": "least-likely"})
        result = evaluate(model, (images, labels), Protocol("p", (spec,)))
        attacked = ifgsm(model, images, labels, eps=0.1, alpha=0.02, steps=6, target="least-likely")
        assert torch.equal(result.attacks[0].outcomes, model(attacked).argmax(1) == labels)
        assert "least-likely" in str(result.to_dict())
        untargeted = ifgsm(model, images, labels, eps=0.1, alpha=0.02, steps=6)
        assert not torch.equal(attacked, untargeted)

    @pytest.mark.parametrize(
        ("target", "error", "message"),
        [
            ("nearest", ValueError, "target: got 'nearest', expected 'most-likely' or 'least-likely'"),
            (torch.zeros(3), TypeError, "target: got 0.0, expected an integer"),
        ],
    )
    def test_refusals(self, target: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            AttackSpec("pgd", 0.1, options={"target": target})
        with pytest.raises(ValueError, match=r"^options: got 'target', expected some of"):
            AttackSpec("apgd_t", 0.1, options={"target": "most-likely"})


class TestMomentum:
    def test_recursion_in_numpy(self) -> None:
        rng = np.random.default_rng(0)
        gradients = rng.standard_normal((5, 2, 3, 4))
        gradients[2, 1] = 0.0
        given = iter(torch.from_numpy(gradients))
        accumulated = with_momentum(lambda x: next(given), 0.7)
        memory = np.zeros((2, 3, 4))
        for gradient in gradients:
            norm = np.abs(gradient).sum(axis=(1, 2), keepdims=True)
            memory = 0.7 * memory + np.divide(gradient, norm, out=np.zeros_like(gradient), where=norm > 0)
            np.testing.assert_allclose(accumulated(torch.zeros(1)).numpy(), memory, rtol=1e-13)

    def test_is_used(self) -> None:
        model, (images, labels) = net(), batch()
        shared = {"eps": EPS, "alpha": ALPHA, "steps": 8}
        plain = ifgsm(model, images, labels, **shared)
        assert not torch.equal(ifgsm(model, images, labels, momentum=1.0, **shared), plain)
        torch.testing.assert_close(ifgsm(model, images, labels, momentum=1e-12, **shared), plain)


class TestL2Ball:
    @settings(max_examples=200, deadline=None)
    @given(data=st.data(), dtype=st.sampled_from(DTYPES))
    def test_projection_is_inside_to_the_last_bit(self, data: st.DataObject, dtype: torch.dtype) -> None:
        pixels = data.draw(st.integers(1, 12))
        number = st.one_of(st.floats(0, 1), st.integers(0, 255).map(lambda k: k / 255))
        clean = torch.tensor([data.draw(st.lists(number, min_size=pixels, max_size=pixels))]).to(dtype)
        moved = st.one_of(st.floats(-3, 3), st.floats(0, 1), st.floats(-1e-3, 1e-3))
        x = clean + torch.tensor([data.draw(st.lists(moved, min_size=pixels, max_size=pixels))]).to(dtype)
        eps = data.draw(st.one_of(st.floats(0, 2), st.floats(0, 1e-3), st.floats(0, 1e-300), st.floats(0, 1e308)))
        projected = L2Ball(clean, eps).project(x)
        assert projected.dtype == dtype
        pairs = list(zip(projected[0].tolist(), clean[0].tolist(), strict=True))
        assert all(0 <= p <= 1 for p, _ in pairs)
        assert sum((Fraction(p) - Fraction(c)) ** 2 for p, c in pairs) <= Fraction(eps) ** 2
        assert torch.equal(L2Ball(clean, eps).project(projected), projected)

    def test_what_is_inside_is_left_and_what_is_outside_goes_to_the_surface(self) -> None:
        clean = torch.full((2, 3, 4, 4), 0.5)
        x = clean + 0.3 * unit(torch.randn(clean.shape, generator=seeded()))
        projected = L2Ball(clean, 0.31).project(x)
        assert torch.equal(projected, x)
        lengths = (L2Ball(clean, 0.2).project(x) - clean).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((2,), 0.2), rtol=1e-5, atol=0)

    def test_uniform_start_fills_the_ball(self) -> None:
        model, images = linear([1.0, 0.0], [0.0, 1.0]), middle(4000, 2)
        start = pgd(
            model, images, torch.zeros(4000, dtype=torch.int64), eps=0.4, alpha=0, steps=1, norm="l2",
            generator=seeded(),
        )  # fmt: skip
        offset = (start - images) / 0.4
        share = offset.square().sum(1)  # the share of the disc's area, which is uniform on [0, 1]
        assert share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=0.015)  # three standard errors
        assert share.var() == pytest.approx(1 / 12, rel=0.1)
        assert offset.mean(0).abs().max() < 0.025


class TestBallAndBox:
    @settings(max_examples=200, deadline=None)
    @given(data=st.data(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def test_linf_bounds_in_half_precision(self, data: st.DataObject, dtype: torch.dtype) -> None:
        number = st.one_of(st.floats(0, 1), st.integers(0, 255).map(lambda k: k / 255))
        images = torch.tensor([data.draw(st.lists(number, min_size=1, max_size=8))]).to(dtype)
        eps = data.draw(st.one_of(st.floats(0, 2), st.floats(0, 0.1), st.integers(0, 32).map(lambda k: k / 255)))
        lower, upper = linf_bounds(images, eps)
        for x, low, high in zip(*(t[0].tolist() for t in (images, lower, upper)), strict=True):
            assert 0 <= low <= x <= high <= 1
            assert Fraction(x) - Fraction(low) <= Fraction(eps)
            assert Fraction(high) - Fraction(x) <= Fraction(eps)

    @settings(max_examples=80, deadline=None)
    @given(
        eps=st.one_of(st.floats(0, 2), st.integers(0, 32).map(lambda k: k / 255), st.just(1e300)),
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from(DTYPES),
        norm=st.sampled_from(["linf", "l2"]),
        name=st.sampled_from(sorted(ATTACKS)),
    )
    def test_attacks_stay_inside_to_the_last_bit(
        self, eps: float, seed: int, dtype: torch.dtype, norm: str, name: str
    ) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, dtype=dtype))
        images = torch.rand(4, 3, 2, 2, generator=seeded(seed)).to(dtype)
        images[0] = (255 * images[0]).round() / 255
        images[1], images[2, 0] = 0.0, 1.0
        more = {} if name in ("fgsm", "ifgsm", "momentum", "worst") else {"generator": seeded(seed)}
        attack = partial(ATTACKS[name], model, images, torch.tensor([0, 1, 2, 0]), eps=eps, norm=norm, **more)
        if eps > 1 and (norm == "linf" or name == "square"):
            with pytest.raises(ValueError, match=r"eps: got .*, expected at most 1"):
                attack()
            return
        attacked = attack()
        assert attacked.dtype == dtype
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        for x, clean in zip(attacked.double().flatten(1), images.double().flatten(1), strict=True):
            moved = [Fraction(a) - Fraction(b) for a, b in zip(x.tolist(), clean.tolist(), strict=True)]
            if norm == "linf" or name == "square":
                assert max(abs(m) for m in moved) <= Fraction(eps)
            else:
                assert sum(m * m for m in moved) <= Fraction(eps) ** 2


class TestResult:
    @every_attack
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_is_like_the_images_and_leaves_everything_alone(
        self, attack: Callable[..., Tensor], norm: str, memory_format: torch.memory_format
    ) -> None:
        model, (images, labels) = net(torch.float32).train(), batch(torch.float32)
        images = images.contiguous(memory_format=memory_format)
        model[0].eval()
        kept = {key: (value, value._version) for key, value in model.state_dict(keep_vars=True).items()}
        modes, random, before = [part.training for part in model.modules()], torch.get_rng_state(), images.clone()
        attacked = attack(model, images, labels, eps=EPS, norm=norm)
        assert (attacked.shape, attacked.dtype, attacked.stride()) == (images.shape, images.dtype, images.stride())
        assert not attacked.requires_grad
        assert attacked.data_ptr() != images.data_ptr()
        assert torch.equal(images, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert [part.training for part in model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        after = model.state_dict(keep_vars=True)
        assert all(after[key] is value and value._version == version for key, (value, version) in kept.items())

    @every_attack
    def test_reproducible_from_the_generator_and_from_nothing_else(self, attack: Callable[..., Tensor]) -> None:
        model, (images, labels) = net(torch.float32, dropout=0.5).train(), batch(torch.float32)

        def run(seed: int, context: Any = torch.enable_grad) -> Tensor:
            torch.manual_seed(int(torch.randint(1000, (), generator=NOISE)))
            with context():
                return attack(model, images.clone(), labels, eps=EPS, generator=seeded(seed), mode="unchanged")

        first = run(0)
        assert torch.equal(run(0), first)
        assert torch.equal(run(0, torch.inference_mode), first)
        assert not torch.equal(run(1), first)

    def test_the_start_of_a_run_is_drawn_before_the_noise(self) -> None:
        model, (images, labels) = net(), batch()
        start = (images + EPS * (2 * torch.rand(images.shape, generator=seeded(7), dtype=images.dtype) - 1)).clamp(0, 1)
        shared = {"eps": EPS, "alpha": ALPHA, "steps": 3}
        given_start = pgd(model, images, labels, start=start, generator=None, **shared)
        torch.testing.assert_close(pgd(model, images, labels, generator=seeded(7), **shared), given_start)

    def test_an_example_is_attacked_alike_whatever_becomes_of_the_others(self) -> None:
        model, (images, labels) = net(), batch()
        for restarts in (1, 4):
            alone = apgd(model, images[:1], labels[:1], eps=0.01, steps=8, restarts=restarts, generator=seeded())
            both = apgd(model, images, labels, eps=0.01, steps=8, restarts=restarts, generator=seeded())
            if restarts == 1:  # a second draw depends on the size of the batch
                torch.testing.assert_close(both[:1], alone)


NOISE = seeded(123)


class TestStarts:
    def test_gaussian(self) -> None:
        images = torch.full((4, 3, 32, 32), 0.5)
        labels = torch.zeros(4, dtype=torch.int64)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
        for start, std in (("gaussian", 0.001), (Gaussian(0.005), 0.005)):
            moved = pgd(model, images, labels, eps=0.1, alpha=0, steps=1, start=start, generator=seeded()) - images
            assert moved.std().item() == pytest.approx(std, rel=0.03)
            assert moved.abs().max() > 3 * std
        inside = pgd(model, images, labels, eps=0.001, alpha=0, steps=1, start=Gaussian(1.0), generator=seeded())
        assert (inside - images).abs().max() <= 0.001

    def test_function_and_tensor_are_projected(self) -> None:
        model, (images, labels) = net(), batch()
        shared = {"eps": EPS, "alpha": 0, "steps": 1}
        corner = (images + EPS).clamp(max=1)
        from_tensor = ifgsm(model, images, labels, start=images + 1, **shared)
        torch.testing.assert_close(from_tensor, corner)
        from_function = pgd(model, images, labels, start=lambda x, g: x + 1, generator=seeded(), **shared)
        assert torch.equal(from_function, from_tensor)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"start": "random"}, ValueError, "start: got 'random', expected 'clean', 'uniform'"),
            ({"start": 3}, TypeError, "start: got 3, expected 'clean', 'uniform'"),
            ({"start": torch.zeros(2)}, ValueError, r"start: got torch.float32 of shape \(2,\) on cpu, expected"),
            ({"start": lambda x, g: None}, ValueError, "start: returned NoneType, expected a tensor"),
            ({"start": "clean", "restarts": 3}, ValueError, "restarts: got 3 from the same start, expected 1"),
            ({"restarts": 0}, ValueError, "restarts: got 0, expected an integer, at least 1"),
            ({"norm": "l1"}, ValueError, "norm: got 'l1', expected one of 'linf', 'l2'"),
            ({"norm": 2}, TypeError, "norm: got 2, expected one of 'linf', 'l2'"),
            ({"eot": 0}, ValueError, "eot: got 0, expected an integer, at least 1"),
            ({"keep": "best"}, ValueError, "keep: got 'best', expected one of 'last', 'worst'"),
            ({"momentum": -1}, ValueError, "momentum: got -1, expected a finite number, at least 0"),
            ({"target": torch.zeros(6)}, TypeError, "target: got dtype torch.float32, expected torch.int64"),
            ({"target": torch.arange(6) % 5}, ValueError, "target: got the label itself for 6 of 6 images"),
            ({"target": "likely"}, ValueError, "target: got 'likely', expected one of 'most-likely', 'least-likely'"),
            ({"target": "most-likely", "loss": "kl"}, ValueError, "loss: got 'kl' with a target"),
            ({"target": torch.full((6,), 7)}, ValueError, "target: got 7, expected class indices < 5"),
            ({"target": (torch.arange(6) + 1) % 5, "loss": "kl"}, ValueError, "loss: got 'kl' with a target"),
            ({"tally": 1}, TypeError, r"tally: got 1, expected an odeadv\.attacks\.Tally"),
            ({"generator": torch.default_generator}, ValueError, "generator: got torch's global one"),
        ],
    )
    def test_refusals(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        images, labels = batch()
        given: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": 2, "generator": seeded()}
        with pytest.raises(error, match=f"^{message}"):
            pgd(net(), images, labels, **given | change)

    def test_gaussian_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"^std: got -1, expected a finite number, at least 0"):
            Gaussian(-1)


class TestRestarts:
    """The choice among the last iterates of several runs, written out one run at a time."""

    @pytest.mark.parametrize("eps", [0.02, 0.06])
    def test_first_fooled_or_else_highest_loss(self, eps: float) -> None:
        model = net()
        images = torch.rand(24, 3, 8, 8, generator=seeded(3), dtype=torch.float64)
        labels = model(images).argmax(1)
        starts = list(torch.rand(5, *images.shape, generator=seeded(8), dtype=torch.float64) * 2 * eps - eps)
        shared = {"eps": eps, "alpha": eps / 4, "steps": 2}
        chosen, chosen_loss = images.clone(), torch.full((24,), -math.inf, dtype=torch.float64)
        done = torch.zeros(24, dtype=torch.bool)
        rounds = []
        for start in starts:
            last = ifgsm(model, images, labels, start=lambda x, _, moved=start: x + moved, **shared)
            logits = model(last).detach()
            loss, fooled = functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) != labels
            better = ~done & (fooled | (loss > chosen_loss))
            chosen[better], chosen_loss[better] = last[better], loss[better]
            rounds.append((~done).sum().item())
            done |= fooled
        remaining = iter(starts)
        tally = Tally()
        actual = pgd(
            model, images, labels, restarts=5, start=lambda x, g: x + next(remaining), generator=seeded(),
            tally=tally, **shared,
        )  # fmt: skip
        torch.testing.assert_close(actual, chosen, rtol=0, atol=1e-14)
        assert tally.gradients.sum() == 2 * sum(rounds)
        assert tally.queries.sum() == 3 * sum(rounds)
        if eps == 0.06:
            assert done.sum() > 0

    def test_more_restarts_are_never_worse(self) -> None:
        model, images = net(), torch.rand(40, 3, 8, 8, generator=seeded(3), dtype=torch.float64)
        labels = model(images).argmax(1)
        right = [
            (model(pgd(model, images, labels, eps=0.03, alpha=0.01, steps=2, restarts=r, generator=seeded())).argmax(1))
            == labels
            for r in (1, 2, 6)
        ]
        assert all((later <= earlier).all() for earlier, later in itertools.pairwise(right))

    def test_in_training_mode_no_example_is_left_out(self) -> None:
        images, labels = batch()
        tally = Tally()
        pgd(
            net(), images, labels, eps=0.5, alpha=0.5, steps=1, restarts=3, generator=seeded(), mode="train",
            tally=tally,
        )  # fmt: skip
        assert len(set(tally.queries.tolist())) == 1

    def test_worst_keeps_the_first_iterate_that_fools(self) -> None:
        model = linear([1.0], [-1.0])
        model.bias = nn.Parameter(torch.tensor([0.0, 0.9], dtype=torch.float64))  # class 1 below 0.45
        images, labels = torch.tensor([[0.6], [0.95]], dtype=torch.float64), torch.tensor([0, 0])
        tally = Tally()
        actual = ifgsm(model, images, labels, eps=0.3, alpha=0.1, steps=9, keep="worst", tally=tally)
        expected = torch.tensor([[0.4], [0.65]], dtype=torch.float64)
        torch.testing.assert_close(actual, expected)
        one = ifgsm(model, images[:1], labels[:1], eps=0.3, alpha=0.1, steps=9, keep="worst", tally=tally)
        torch.testing.assert_close(one, expected[:1])
        assert tally.queries.item() == 3  # the images, then 0.5, then 0.4, where the run ends
        misclassified = ifgsm(model, images[:1] - 0.4, labels[:1], eps=0.3, alpha=0.1, steps=2, keep="worst")
        assert torch.equal(misclassified, images[:1] - 0.4)


class Noisy(nn.Module):
    """Add noise of the global generator to the images, and record the images and the noise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(torch.randn(x.shape, dtype=x.dtype))
        return self.inner(x + 0.3 * self.drawn[-1])


class TestNoise:
    def test_eot_is_the_mean_of_the_gradients_one_by_one(self) -> None:
        model, (images, labels) = Noisy(net()), batch()
        steps: list[Tensor] = []
        fgsm(model, images, labels, eps=EPS, eot=4, generator=seeded(5))
        assert len(model.drawn) == 4
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(model.drawn, 2))
        for noise in list(model.drawn):
            x = images.clone().requires_grad_()
            loss = functional.cross_entropy(model.inner(x + 0.3 * noise), labels, reduction="sum")
            steps.append(torch.autograd.grad(loss, x)[0])
        mean = torch.stack(steps).mean(0)
        with attacking(model, "eval"), torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**63 - 1, (), generator=seeded(5)))
            torch.manual_seed(seed)
            found = AttackLoss(model, labels, eot=4).differentiate(images)
        assert found.gradient is not None
        torch.testing.assert_close(found.gradient, mean, rtol=1e-12, atol=1e-15)
        assert torch.equal(model.drawn[4], model.drawn[0])
        expected = (images + EPS * mean.sign()).clamp(0, 1)
        torch.testing.assert_close(fgsm(model, images, labels, eps=EPS, eot=4, generator=seeded(5)), expected)

    def test_random_state_goes_on_as_if_nothing_had_happened(self) -> None:
        model, (images, labels) = Noisy(net()), batch()
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        fgsm(model, images, labels, eps=EPS)
        fgsm(model, images, labels, eps=EPS, eot=3, generator=seeded())
        assert torch.equal(torch.rand(4), expected)

    def test_eot_counts_its_passes(self) -> None:
        images, labels = batch()
        tally = Tally()
        ifgsm(net(), images, labels, eps=EPS, alpha=ALPHA, steps=2, eot=3, generator=seeded(), tally=tally)
        assert tally.gradients.tolist() == [6] * 6


class TestPrecision:
    @pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
    def test_autocast(self, loss: str) -> None:
        """Under bfloat16 autocast the logits are bfloat16, the loss float32, the gradient in the images' dtype."""
        model, (images, labels) = net(torch.float32), batch(torch.float32)
        seen: list[torch.dtype] = []
        logits: list[torch.dtype] = []
        model.register_forward_hook(lambda module, given, result: logits.append(result.dtype))
        shared = {"eps": EPS, "alpha": ALPHA, "steps": 3, "generator": seeded()}

        def spying(z: Tensor, y: Tensor) -> Tensor:
            seen.append(z.dtype)
            return functional.cross_entropy(z, y, reduction="none")

        with torch.autocast("cpu", torch.bfloat16):
            attacked = pgd(model, images, labels, loss=loss, **shared)
            pgd(model, images, labels, loss=spying, **shared)
            with attacking(model, "eval"):
                gradient = AttackLoss(model, labels).gradient(images)
        assert set(logits) == {torch.bfloat16}
        assert set(seen) == {torch.float32}
        assert attacked.dtype == gradient.dtype == torch.float32
        assert (attacked - images).abs().max() <= EPS
        if loss != "kl":  # most pixels move as in float32
            full = pgd(model, images, labels, loss=loss, **shared | {"generator": seeded()})
            assert (attacked == full).float().mean() > 0.8

    def test_weights_still_have_gradients_after_an_attack_within_one_autocast(self) -> None:
        """Autocast caches cast weights. Training must not use the weights that the attack's passes cached."""
        model, (images, labels) = net(torch.float32), batch(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            attacked = pgd(model, images, labels, eps=EPS, alpha=ALPHA, steps=2, loss="kl", generator=seeded())
            functional.cross_entropy(model(attacked), labels).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model[0].weight, model[-1].weight))

    def test_nan_is_refused_at_the_end_and_where_it_occurred(self) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.calls = net(), 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.inner(x) * (math.nan if self.calls == 2 else 1.0)

        images, labels = batch()
        for name, attack in ATTACKS.items():
            if name == "fgsm":
                continue
            with pytest.raises(ValueError, match=r"^model: returned logits that are not finite"):
                attack(Late(), images, labels, eps=EPS)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_infinite_gradients_are_refused(self, norm: str) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.sqrt()

        images = torch.tensor([[0.0, 0.5]])
        with pytest.raises(ValueError, match=r"^model: the gradient .* contains NaN or infinity"):
            fgsm(Root(), images, torch.tensor([1]), eps=EPS, norm=norm)


class TestTransfer:
    def test_is_the_worst_of_the_surrogates(self) -> None:
        images = torch.rand(16, 3, 8, 8, generator=seeded(3), dtype=torch.float64)
        victim = net()
        labels = victim(images).argmax(1)
        surrogates = []
        for seed in (1, 2):
            surrogate = net()
            torch.nn.init.normal_(surrogate[-1].weight, std=0.06, generator=seeded(seed))
            surrogates.append(surrogate)

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert model is not victim
            return fgsm(model, x, y, eps=0.1)

        attacked = transfer(victim, images, labels, surrogates=surrogates, attack=attack)
        each = [fgsm(surrogate, images, labels, eps=0.1) for surrogate in surrogates]
        losses = torch.stack(
            [functional.cross_entropy(victim(x), labels, reduction="none") for x in [*each, attacked]]
        ).detach()
        fooled = torch.stack([victim(x).argmax(1) != labels for x in [*each, attacked]])
        assert torch.equal(fooled[2], fooled[0] | fooled[1])
        never = ~fooled[2]
        torch.testing.assert_close(losses[2][never], losses[:2].amax(0)[never])
        assert torch.equal(attacked[fooled[0]], each[0][fooled[0]])

    def test_victim_need_not_be_differentiable(self) -> None:
        class Counted(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.from_numpy(np.stack([x.numpy().sum((1, 2, 3)), np.full(len(x), 90.0)], 1))

        images, labels = batch()
        attacked = worst_of(Counted(), [images, 1 - images], labels % 2)
        assert attacked.shape == images.shape

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"candidates": []}, "candidates: got none"),
            ({"candidates": [torch.rand(6, 3), torch.rand(6, 4)]}, r"candidates: got shapes \(6, 3\) and \(6, 4\)"),
            ({"loss": "kl"}, "loss: got 'kl', expected 'ce', 'margin'"),
        ],
    )
    def test_refusals(self, change: dict[str, Any], message: str) -> None:
        images, labels = batch()
        given: dict[str, Any] = {"model": net(), "candidates": [images], "labels": labels}
        with pytest.raises(ValueError, match=f"^{message}"):
            worst_of(**given | change)
        with pytest.raises(ValueError, match=r"^surrogates: got none"):
            transfer(net(), images, labels, surrogates=[], attack=lambda m, x, y: x)
