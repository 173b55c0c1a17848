from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from helpers import conv_net, seeded
from helpers import image_batch as batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from odeadv.attacks import apgd, apgd_t, fgsm, ifgsm, pgd, square, worst_of
from odeadv.attacks._gradient import iterates
from odeadv.attacks.balls import linf_bounds

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 7


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    net = conv_net(dtype)
    net[1].running_mean.normal_(generator=seeded())  # so that evaluation mode differs from training mode
    return net


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": lambda *args, **more: fgsm(*args, eps=EPS, **more),
    "ifgsm": lambda *args, **more: ifgsm(*args, eps=EPS, alpha=ALPHA, steps=STEPS, **more),
    "pgd": lambda *args, **more: pgd(*args, eps=EPS, alpha=ALPHA, steps=STEPS, generator=seeded(), **more),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


def textbook(net: nn.Module, images: Tensor, labels: Tensor, start: Tensor, eps: float, alpha: float, m: int) -> Tensor:
    """Return the images of the attack as in the papers: mean cross-entropy, `backward`, a clip after every step."""
    net = copy.deepcopy(net).eval()
    adversarial = start.clone()
    for _ in range(m):
        adversarial.requires_grad_(True)
        loss = nn.CrossEntropyLoss()(net(adversarial), labels)
        loss.backward()
        stepped = adversarial.detach() + alpha * torch.sign(adversarial.grad)
        adversarial = torch.max(torch.min(stepped, images + eps), images - eps).clip(0, 1)
    return adversarial


class TestAgainstTheTextbook:
    def test_fgsm(self) -> None:
        net, (images, labels) = small_net(), batch()
        expected = textbook(net, images, labels, images, EPS, EPS, 1)
        torch.testing.assert_close(fgsm(net, images, labels, eps=EPS), expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("steps", [1, 2, 20])
    def test_ifgsm(self, steps: int) -> None:
        net, (images, labels) = small_net(), batch()
        expected = textbook(net, images, labels, images, EPS, ALPHA, steps)
        actual = ifgsm(net, images, labels, eps=EPS, alpha=ALPHA, steps=steps)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)

    def test_pgd(self) -> None:
        net, (images, labels) = small_net(), batch()
        noise = torch.rand(images.shape, generator=seeded(3), dtype=images.dtype)
        start = (images + EPS * (2 * noise - 1)).clip(0, 1)
        expected = textbook(net, images, labels, start, EPS, ALPHA, 10)
        actual = pgd(net, images, labels, eps=EPS, alpha=ALPHA, steps=10, generator=seeded(3))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
        assert not torch.allclose(actual, ifgsm(net, images, labels, eps=EPS, alpha=ALPHA, steps=10), atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fgsm_is_one_step_of_ifgsm(self, dtype: torch.dtype) -> None:
        net, (images, labels) = small_net(dtype), batch(dtype)
        one = ifgsm(net, images, labels, eps=EPS, alpha=EPS, steps=1)
        assert torch.equal(fgsm(net, images, labels, eps=EPS), one)

    def test_linear_model_moves_by_eps_along_the_sign_of_the_weight_difference(self) -> None:
        linear = nn.Linear(4, 2).double()
        linear.weight.data = torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.5, 1.0, 0.0, 3.5]], dtype=torch.float64)
        images = torch.full((2, 4), 0.5, dtype=torch.float64)
        away = torch.tensor([-1.0, 1.0, 0.0, 1.0], dtype=torch.float64)  # sign(w_1 - w_0), 0 if the weights agree
        expected = images + 0.1 * torch.stack([away, -away])
        actual = fgsm(linear, images, torch.tensor([0, 1]), eps=0.1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)

    def test_confident_examples_of_a_large_batch_still_move(self) -> None:
        """The gradient of a mean over the batch would underflow: exp(-100) / n is below the smallest float32."""
        n, half = 4096, 50.0
        linear = nn.Linear(2, 2, bias=False)
        linear.weight.data = torch.tensor([[half, 0.0], [-half, 0.0]])
        images = torch.tensor([[1.0, 0.5]]).repeat(n, 1)
        adversarial = fgsm(linear, images, torch.zeros(n, dtype=torch.int64), eps=0.25)
        assert torch.equal(adversarial[:, 0], torch.full((n,), 0.75))

    def test_an_example_is_attacked_alike_in_any_batch(self) -> None:
        net, (images, labels) = small_net(), batch()
        together = ifgsm(net, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS)
        alone = [
            ifgsm(net, image[None], label[None], eps=EPS, alpha=ALPHA, steps=STEPS)
            for image, label in zip(images, labels, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-14)


class TestLoss:
    def test_callable(self) -> None:
        net, (images, labels) = small_net(), batch()
        spelt_out = fgsm(
            net, images, labels, eps=EPS, loss=lambda z, y: functional.cross_entropy(z, y, reduction="none")
        )
        assert torch.equal(spelt_out, fgsm(net, images, labels, eps=EPS))
        opposite = fgsm(
            net, images, labels, eps=EPS, loss=lambda z, y: -functional.cross_entropy(z, y, reduction="none")
        )
        inner = (images > EPS) & (images < 1 - EPS)
        torch.testing.assert_close((opposite - images)[inner], (images - spelt_out)[inner], rtol=0, atol=1e-15)

    @every_attack
    def test_attacks_raise_it(self, attack: Callable[..., Tensor]) -> None:
        net, (images, labels) = small_net().eval(), batch()
        with torch.no_grad():
            before = functional.cross_entropy(net(images), labels, reduction="none")
            after = functional.cross_entropy(net(attack(net, images, labels)), labels, reduction="none")
        assert (after > before).all()


class TestBallAndBox:
    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_bounds_are_exact_and_tight(self, data: st.DataObject, dtype: torch.dtype) -> None:
        width = 32 if dtype == torch.float32 else 64
        number = st.one_of(st.floats(0, 1, width=width), st.integers(0, 255).map(lambda k: k / 255))
        images = torch.tensor([data.draw(st.lists(number, min_size=1, max_size=8))], dtype=dtype)
        eps = data.draw(st.one_of(st.floats(0, 1e308), st.floats(0, 0.1), st.integers(0, 32).map(lambda k: k / 255)))
        lower, upper = linf_bounds(images, eps)
        radius = torch.tensor(min(eps, 1.0), dtype=dtype)  # the largest number <= eps in this dtype
        radius = radius if radius.item() <= eps else torch.nextafter(radius, torch.zeros((), dtype=dtype))
        assert lower.dtype == upper.dtype == dtype
        below, above = (torch.nextafter(b, torch.full_like(b, i)) for b, i in ((lower, -math.inf), (upper, math.inf)))
        for x, low, high, under, over in zip(
            *(t[0].tolist() for t in (images, lower, upper, below, above)), strict=True
        ):
            assert 0 <= low <= x <= high <= 1
            assert Fraction(x) - Fraction(low) <= Fraction(eps)
            assert Fraction(high) - Fraction(x) <= Fraction(eps)
            assert low == 0 or Fraction(x) - Fraction(under) > Fraction(radius.item())
            assert high == 1 or Fraction(over) - Fraction(x) > Fraction(radius.item())

    @settings(max_examples=60, deadline=None)
    @given(
        eps=st.one_of(st.floats(0, 2), st.integers(0, 32).map(lambda k: k / 255)),
        alpha=st.floats(0, 1),
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        name=st.sampled_from(sorted(ATTACKS)),
    )
    def test_attacks_stay_inside_to_the_last_bit(
        self, eps: float, alpha: float, seed: int, dtype: torch.dtype, name: str
    ) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3, dtype=dtype))
        images = torch.rand(4, 3, 4, 4, generator=seeded(seed), dtype=dtype)
        images[0] = (255 * images[0]).round() / 255
        images[1] = eps * images[1] if eps <= 1 else images[1]
        labels = torch.tensor([0, 1, 2, 0])
        attack = {
            "fgsm": lambda: fgsm(net, images, labels, eps=eps),
            "ifgsm": lambda: ifgsm(net, images, labels, eps=eps, alpha=alpha, steps=3),
            "pgd": lambda: pgd(net, images, labels, eps=eps, alpha=alpha, steps=3, generator=seeded(seed)),
        }[name]
        if eps > 1:
            with pytest.raises(ValueError, match=r"eps: got .*, expected at most 1"):
                attack()
            return
        adversarial = attack()
        assert (adversarial - images).abs().max().item() <= eps
        assert (adversarial.double() - images.double()).abs().max().item() <= eps
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1

    def test_reaches_the_boundary(self) -> None:
        net, (images, labels) = small_net(torch.float32), batch(torch.float32)
        moved = (ifgsm(net, images, labels, eps=EPS, alpha=EPS, steps=3) - images).abs()
        assert moved.max().item() == pytest.approx(EPS, rel=1e-6)

    def test_pgd_starts_all_over_the_ball(self) -> None:
        net, images = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), torch.full((8, 3, 32, 32), 0.5)
        start = pgd(net, images, torch.zeros(8, dtype=torch.int64), eps=0.1, alpha=0, steps=1, generator=seeded())
        offset = (start - images).flatten() / 0.1
        assert offset.min() < -0.999
        assert offset.max() > 0.999
        assert offset.mean().abs() < 0.02  # three standard errors are 0.011
        assert offset.var() == pytest.approx(1 / 3, abs=0.01)


class TestResult:
    @every_attack
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_is_like_the_images(
        self, attack: Callable[..., Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        net, (images, labels) = small_net(dtype), batch(dtype)
        images = images.contiguous(memory_format=memory_format).requires_grad_()
        before = images.detach().clone()
        adversarial = attack(net, images, labels)
        assert (adversarial.shape, adversarial.dtype, adversarial.device) == (images.shape, dtype, images.device)
        assert adversarial.stride() == images.stride()
        assert not adversarial.requires_grad
        assert adversarial.grad_fn is None
        assert images.requires_grad
        assert images.grad is None
        assert torch.equal(images, before)

    def test_eps_zero_returns_an_equal_copy(self) -> None:
        net, (images, labels) = small_net(), batch()
        adversarial = fgsm(net, images, labels, eps=0)
        assert torch.equal(adversarial, images)
        assert adversarial.data_ptr() != images.data_ptr()

    @every_attack
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_works_where_gradients_are_off(self, attack: Callable[..., Tensor], context: Callable[[], Any]) -> None:
        net, (images, labels) = small_net(), batch()
        expected = attack(net, images, labels)
        with context():
            actual = attack(net, images.clone(), labels.clone())
        assert torch.equal(actual, expected)
        assert not actual.is_inference()

    def test_pgd_obeys_its_generator_only(self) -> None:
        net, (images, labels) = small_net(), batch()

        def attack(seed: int) -> Tensor:
            return pgd(net, images, labels, eps=EPS, alpha=ALPHA, steps=2, generator=seeded(seed))

        first = attack(0)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert torch.equal(attack(0), first)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(attack(1), first)
        continued = seeded(0)
        runs = [pgd(net, images, labels, eps=EPS, alpha=ALPHA, steps=2, generator=continued) for _ in range(2)]
        assert torch.equal(runs[0], first)
        assert not torch.equal(runs[1], first)

    def test_pgd_start_does_not_depend_on_the_memory_format(self) -> None:
        net, (images, labels) = small_net(), batch()
        shared = {"eps": EPS, "alpha": 0, "steps": 1}
        rows = pgd(net, images, labels, generator=seeded(), **shared)
        columns = pgd(net, images.to(memory_format=torch.channels_last), labels, generator=seeded(), **shared)
        assert torch.equal(rows, columns)


class TestDefaults:
    """``pgd(net, x, y, eps=8/255)`` is enough: alpha = eps / 4, 10 steps, a fixed generator."""

    def test_pgd(self) -> None:
        net, (images, labels) = small_net(), batch()
        expected = pgd(net, images, labels, eps=EPS, alpha=EPS / 4, steps=10, generator=seeded(0))
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert torch.equal(pgd(net, images, labels, eps=EPS), expected)
        assert torch.equal(pgd(net, images, labels, eps=EPS), expected)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_others(self) -> None:
        net, (images, labels) = small_net(), batch()
        expected = ifgsm(net, images, labels, eps=EPS, alpha=EPS / 4, steps=10)
        assert torch.equal(ifgsm(net, images, labels, eps=EPS), expected)
        for attack in (partial(apgd, steps=3), partial(apgd_t, steps=3), partial(square, queries=5)):
            expected = attack(net, images, labels, eps=EPS, generator=seeded(0))
            assert torch.equal(attack(net, images, labels, eps=EPS), expected)

    def test_restarts_still_differ(self) -> None:
        net, (images, labels) = small_net(), batch()
        starts: list[Tensor] = []

        def start(x: Tensor, generator: torch.Generator) -> Tensor:
            starts.append(x + torch.rand(x.shape, generator=generator, dtype=x.dtype))
            return starts[-1]

        pgd(net, images, labels, eps=1e-9, start=start, restarts=2)
        assert not torch.equal(*starts)


class TestRadiusPerExample:
    """A tensor of radii gives the result of one call per image."""

    RADII = torch.tensor([0.0, 1 / 255, 8 / 255, 0.1, 0.5, 1.0])
    ATTACKS: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "fgsm": fgsm,
        "ifgsm": ifgsm,
        "worst": partial(ifgsm, keep="worst"),
        "pgd": partial(pgd, steps=3, restarts=2),
        "apgd": partial(apgd, steps=12),
        "apgd_t": partial(apgd_t, steps=6, targets=2),
        "square": partial(square, queries=8),
    }

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
    def test_as_one_call_each(self, attack: Callable[..., Tensor], norm: str) -> None:
        net, (images, labels) = small_net(), batch()
        together = attack(net, images, labels, eps=self.RADII, norm=norm)
        for k, eps in enumerate(self.RADII.double().tolist()):
            every = attack(net, images, labels, eps=eps, norm=norm)  # with all images: the draws are the same
            torch.testing.assert_close(together[k], every[k], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_no_radius_is_left(self, norm: str, dtype: torch.dtype) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(dtype)
        images, labels = batch(torch.float32)
        images = images.to(dtype)
        attacked = pgd(net, images, labels, eps=self.RADII, norm=norm)
        offsets = (attacked.double() - images.double()).flatten(1)
        reached = offsets.abs().amax(1) if norm == "linf" else offsets.norm(dim=1)
        assert attacked.dtype == dtype
        assert (reached <= self.RADII.double()).all()
        assert (reached[2:] > 0).all()

    def test_equal_radii_are_a_number(self) -> None:
        net, (images, labels) = small_net(torch.float32), batch(torch.float32)
        eps = torch.full((6,), 0.03)
        for attack in (fgsm, ifgsm, pgd):
            expected = attack(net, images, labels, eps=float(eps[0]))
            assert torch.equal(attack(net, images, labels, eps=eps), expected)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("boom")


class Traced(TorchDispatchMode):
    """Record the gradients (input, weight, bias) that the backward pass of each convolution computes."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


class TestModelIsLeftAlone:
    @every_attack
    @pytest.mark.parametrize("mode", ["eval", "train", "unchanged"])
    @pytest.mark.parametrize("fails", [False, True])
    def test_state(self, attack: Callable[..., Tensor], mode: str, fails: bool) -> None:
        net, (images, labels) = small_net(), batch()
        if fails:
            net.append(Fails())
        net.train()
        net[4].eval()
        net[0].weight.requires_grad_(False)
        net[4].weight.grad = torch.ones_like(net[4].weight)
        gradient = net[4].weight.grad
        state = {key: (value, value.clone(), value._version) for key, value in net.state_dict(keep_vars=True).items()}
        modes = {name: part.training for name, part in net.named_modules()}
        requires = {name: p.requires_grad for name, p in net.named_parameters()}
        grads = {name: p.grad for name, p in net.named_parameters()}
        if fails:
            with pytest.raises(RuntimeError, match="boom"):
                attack(net, images, labels, mode=mode)
        else:
            attack(net, images, labels, mode=mode)
        assert {name: part.training for name, part in net.named_modules()} == modes
        assert {name: p.requires_grad for name, p in net.named_parameters()} == requires
        after = net.state_dict(keep_vars=True)
        assert after.keys() == state.keys()
        for key, (tensor, value, version) in state.items():
            assert after[key] is tensor
            assert tensor._version == version
            assert torch.equal(tensor, value)
        assert all(p.grad is grads[name] for name, p in net.named_parameters())
        assert torch.equal(gradient, torch.ones_like(gradient))

    @every_attack
    def test_eval_is_the_default_and_turns_dropout_off(self, attack: Callable[..., Tensor]) -> None:
        net, (images, labels) = small_net(), batch()
        expected = attack(net.eval(), images, labels)
        net.train()
        state = torch.get_rng_state()
        assert torch.equal(attack(net, images, labels), expected)
        assert torch.equal(torch.get_rng_state(), state)

    @every_attack
    def test_other_modes(self, attack: Callable[..., Tensor]) -> None:
        net, (images, labels) = small_net(), batch()
        net[3].p = 0.0  # only batch norm still distinguishes the modes
        evaluated = attack(net.eval(), images, labels)
        assert torch.equal(attack(net, images, labels, mode="unchanged"), evaluated)
        trained = attack(net, images, labels, mode="train")
        assert not torch.equal(trained, evaluated)
        assert torch.equal(attack(net.train(), images, labels, mode="unchanged"), trained)

    @every_attack
    def test_weight_gradients_are_never_computed(self, attack: Callable[..., Tensor]) -> None:
        net, (images, labels) = small_net(), batch()
        with Traced() as trace:
            attack(net, images, labels)
        assert len(trace.masks) >= 2
        assert all(mask == [True, False, False] for mask in trace.masks)


class TestIterates:
    def test_is_lazy_and_takes_a_first_gradient(self) -> None:
        asked: list[Tensor] = []

        def gradient(x: Tensor) -> Tensor:
            asked.append(x)
            return torch.ones_like(x)

        start = torch.full((1, 2), 0.5)
        path = iterates(
            gradient, start, alpha=0.25, bounds=linf_bounds(start, 0.375), first_gradient=-torch.ones_like(start)
        )
        assert torch.equal(next(path), torch.full((1, 2), 0.25))
        assert not asked
        assert torch.equal(next(path), torch.full((1, 2), 0.5))
        assert len(asked) == 1
        assert torch.equal(next(path), torch.full((1, 2), 0.75))
        assert torch.equal(next(path), torch.full((1, 2), 0.875))  # projected
        assert len(asked) == 3


def constant_logits(value: Any) -> nn.Module:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return value

    return Constant()


class Root(nn.Module):
    """Finite logits whose gradient at 0 is 0 * infinity."""

    def forward(self, x: Tensor) -> Tensor:
        return (0 * x.sqrt()).flatten(1)[:, :2]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": -0.1}, ValueError, r"eps: got -0\.1, expected a finite number, at least 0"),
    ({"eps": math.nan}, ValueError, "eps: got nan, expected a finite number, at least 0"),
    ({"eps": math.inf}, ValueError, "eps: got inf, expected a finite number, at least 0"),
    ({"eps": "8/255"}, TypeError, "eps: got '8/255', expected a number, at least 0"),
    ({"eps": True}, TypeError, "eps: got True, expected a number, at least 0"),
    ({"alpha": -1}, ValueError, "alpha: got -1, expected a finite number, at least 0"),
    ({"alpha": math.inf}, ValueError, "alpha: got inf, expected a finite number, at least 0"),
    ({"alpha": "2/255"}, TypeError, "alpha: got '2/255', expected a number, at least 0"),
    ({"eps": torch.rand(3)}, ValueError, r"eps: got a tensor of shape \(3,\), expected a number or shape \(2,\)"),
    ({"eps": torch.rand(2, 1)}, ValueError, r"eps: got a tensor of shape \(2, 1\), expected a number or shape"),
    ({"eps": torch.tensor([8, 8])}, TypeError, r"eps: got dtype torch\.int64, expected a number, or a floating"),
    ({"eps": torch.tensor([0.1, 8.0])}, ValueError, "eps: got 8, expected a finite number, at least 0, at most 1"),
    ({"alpha": torch.tensor([0.1, -0.1])}, ValueError, r"alpha: got -0\.1, expected a finite number, at least 0"),
    ({"steps": 0}, ValueError, "steps: got 0, expected an integer, at least 1"),
    ({"steps": 2.0}, TypeError, r"steps: got 2\.0, expected an integer, at least 1"),
    ({"steps": True}, TypeError, "steps: got True, expected an integer, at least 1"),
    ({"loss": "hinge"}, ValueError, "loss: got 'hinge', expected 'ce', 'margin', 'dlr', 'kl' or a function"),
    ({"loss": 3}, TypeError, "loss: got 3, expected 'ce', 'margin', 'dlr', 'kl' or a function"),
    ({"mode": "test"}, ValueError, "mode: got 'test', expected one of 'eval', 'train', 'unchanged'"),
    ({"mode": torch.rand(9)}, TypeError, r"mode: got a tensor of shape \(9,\), expected one of 'eval'"),
    ({"generator": 0}, TypeError, r"generator: got 0, expected e\.g\. torch\.Generator\(\)\.manual_seed\(0\)"),
    ({"model": torch.relu}, TypeError, r"model: got builtin_function_or_method, expected a torch\.nn\.Module"),
    ({"images": [[0.5]]}, TypeError, r"images: got list, expected a torch\.Tensor"),
    (
        {"images": torch.ones(2, 3, 8, 8, dtype=torch.uint8)},
        TypeError,
        r"images: got dtype torch\.uint8, expected a flo",
    ),
    ({"images": torch.rand(2)}, ValueError, r"images: got shape \(2,\), expected \(n, channels"),
    ({"images": torch.rand(0, 3, 8, 8)}, ValueError, r"images: got shape \(0, 3, 8, 8\), expected .* not empty"),
    ({"images": torch.full((2, 3), math.nan)}, ValueError, r"images: contain NaN, expected values in \[0, 1\]"),
    (
        {"images": torch.tensor([[-0.5, 2.0]])},
        ValueError,
        r"images: got values in \[-0\.5, 2\], expected \[0, 1\]; normalisation belongs inside the model",
    ),
    ({"images": torch.tensor([[0.0, 1.5]])}, ValueError, r"images: got values in \[0, 1\.5\]"),
    ({"labels": [0, 1]}, TypeError, r"labels: got list, expected an int64 tensor"),
    ({"labels": torch.zeros(2)}, TypeError, r"labels: got dtype torch\.float32, expected torch\.int64"),
    ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"labels: got shape \(2, 1\), expected \(2,\)"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: got shape \(3,\), expected \(2,\)"),
    ({"labels": torch.tensor([0, -1])}, ValueError, "labels: got -1, expected class indices >= 0"),
    ({"labels": torch.tensor([0, 5])}, ValueError, r"labels: got 5, expected class indices < 5"),
    ({"model": constant_logits("logits")}, TypeError, "model: returned str, expected a tensor of logits"),
    (
        {"model": constant_logits(torch.zeros(2))},
        ValueError,
        r"model: returned logits of shape \(2,\), expected \(2, c",
    ),
    (
        {"model": constant_logits(torch.zeros(2)), "labels": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"model: returned logits of shape \(2,\), expected \(2, classes\); .* torch\.stack\(\[-z, z\], 1\)",
    ),
    (
        {"model": constant_logits(torch.zeros(2, 1)), "labels": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"model: returned logits of shape \(2, 1\), expected at least 2 classes; .* torch\.cat\(\[-z, z\], 1\)",
    ),
    (
        {"model": constant_logits(torch.zeros(2, 10, 8, 8))},
        ValueError,
        r"model: returned logits of shape \(2, 10, 8, 8\), expected \(2, classes\); .*one answer per position",
    ),
    ({"model": constant_logits(torch.zeros(3, 5))}, ValueError, r"model: returned logits of shape \(3, 5\), expected"),
    (
        {"model": constant_logits(torch.full((2, 5), math.inf))},
        ValueError,
        "model: returned logits that are not finite",
    ),
    ({"model": constant_logits(torch.zeros(2, 5))}, ValueError, r"model: its loss does not depend on the images \(det"),
    (
        {"model": constant_logits(torch.zeros(2, 5, requires_grad=True))},
        ValueError,
        r"model: its loss does not depend on the images \(det",
    ),
    ({"model": Root(), "images": torch.zeros(2, 3, 8, 8)}, ValueError, "model: the gradient .* contains NaN"),
    ({"loss": lambda z, y: 1.0}, TypeError, r"loss: returned float, expected a tensor of shape \(2,\)"),
    ({"loss": functional.cross_entropy}, ValueError, r"loss: returned shape \(\), expected \(2,\), one per image"),
]


class TestNotFinite:
    """The message names the images and the attack, and never prints a tensor."""

    class Broken(nn.Module):
        """Logits of images whose first pixel is above 0.9 are NaN."""

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1)[:, :5]
            return torch.where(z[:, :1] > 0.9, torch.nan, z)

    def batch(self, n: int, bad: list[int]) -> tuple[Tensor, Tensor]:
        images = 0.2 + 0.1 * torch.rand(n, 3, 4, 4, generator=seeded())
        images[bad, 0, 0, 0] = 1.0
        return images, torch.arange(n) % 5

    @pytest.mark.parametrize(
        ("name", "attack"),
        [
            ("fgsm", fgsm),
            ("ifgsm", partial(ifgsm, keep="worst")),
            ("pgd", partial(pgd, restarts=3)),
            ("apgd", partial(apgd, steps=20, restarts=2)),
            ("apgd_t", partial(apgd_t, steps=8)),
            ("square", partial(square, queries=9)),
        ],
    )
    def test_names_images_and_attack(self, name: str, attack: Callable[..., Tensor]) -> None:
        images, labels = self.batch(12, [3, 7])
        message = rf"^model: returned logits that are not finite for images 3, 7 \(2 of 12\) during {name}, so"
        with pytest.raises(ValueError, match=message):
            attack(self.Broken(), images, labels, eps=EPS)

    def test_many_images_are_counted(self) -> None:
        images, labels = self.batch(40, list(range(10, 30)))
        with pytest.raises(ValueError, match=r"for images 10, 11, 12, 13, 14, \.\.\. \(20 of 40\) during fgsm"):
            fgsm(self.Broken(), images, labels, eps=EPS)

    def test_gradients(self) -> None:
        images, labels = self.batch(4, [])
        images[2] = 0.0  # the gradient of Root is 0 * infinity there
        with pytest.raises(ValueError, match=r"contains NaN or infinity for image 2 \(1 of 4\) during ifgsm"):
            ifgsm(Root(), images, labels % 2, eps=EPS)

    def test_candidates(self) -> None:
        images, labels = self.batch(4, [1])
        with pytest.raises(ValueError, match=r"for image 1 \(1 of 4\) during worst_of"):
            worst_of(self.Broken(), [images], labels)


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    images, labels = batch(torch.float32, n=2)
    given: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": 2, "generator": seeded()}
    given |= {"model": small_net(torch.float32), "images": images, "labels": labels} | change
    with pytest.raises(error, match=f"^{message}") as caught:
        pgd(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [fgsm, ifgsm])
def test_refusals_come_before_any_work(attack: Callable[..., Tensor]) -> None:
    images, labels = batch(n=2)
    more = {} if attack is fgsm else {"alpha": ALPHA, "steps": 1}
    for name, value in {"eps": -1, "images": images + 1, "labels": labels - 1, "loss": "hinge", "mode": "test"}.items():
        given = {"model": Fails(), "images": images, "labels": labels, "eps": EPS} | more | {name: value}
        with pytest.raises(ValueError, match=f"^{name}: "):
            attack(**given)


class InPlace(nn.Module):
    """Normalise the images in place, as published code does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.sub_(0.5).div_(0.5))
        return logits


@pytest.mark.parametrize("attack", [fgsm, ifgsm, pgd, apgd, square])
def test_a_model_that_writes_to_its_images_is_refused_before_it_does(attack: Callable[..., Tensor]) -> None:
    images, labels = batch()
    before = images.clone()
    more = {ifgsm: {"alpha": ALPHA, "steps": 2}, pgd: {"alpha": ALPHA, "steps": 2, "generator": seeded()}}
    more |= {apgd: {"steps": 2, "generator": seeded()}, square: {"queries": 5, "generator": seeded()}}
    with pytest.raises(ValueError, match=r"^model: writes to its images; expected a new tensor"):
        attack(InPlace(), images, labels, eps=EPS, **more.get(attack, {}))
    assert torch.equal(images, before)


def test_labels_on_another_device_are_refused() -> None:
    images, labels = batch(n=2)
    with pytest.raises(ValueError, match=r"labels: got device meta, expected cpu"):
        fgsm(small_net(), images, labels.to("meta"), eps=EPS)
