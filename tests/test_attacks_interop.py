"""Comparison with torchattacks, foolbox and AutoAttack, example by example, on a network of handwritten digits."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional

from odeadv import models
from odeadv.attacks import apgd, apgd_t, fgsm, ifgsm, pgd, square
from odeadv.evaluation import AttackSpec, evaluate

EPS, ALPHA, STEPS = 0.1, 0.02, 20
TIES = 2e-3  # the largest share of examples that may differ: rounding makes a gradient 0 in one library only


class Normalised(nn.Module):
    """A model that normalises inside, as all attacks here expect."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - 0.3) / 0.4)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, and 400 images in [0, 1] with labels that it was not trained on."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=seeded())
    images, labels = images[order], labels[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        model = Normalised(net)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(4):
            for start in range(400, len(images), 100):
                x, y = images[start : start + 100], labels[start : start + 100]
                if epoch:  # so that some images withstand the attacks
                    x = fgsm(model, x, y, eps=EPS)
                optimiser.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimiser.step()
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        assert (model(images[:400]).argmax(1) == labels[:400]).float().mean() > 0.9
    return model, images[:400], labels[:400]


def torchattack(name: str, model: nn.Module, **given: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return one of their attacks, with their own normalisation off, which is the default."""
    attack = getattr(pytest.importorskip("torchattacks"), name)(model, **given)
    assert attack.normalization_used is None
    return attack


def foolbox_attack(name: str, model: nn.Module, **given: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    foolbox = pytest.importorskip("foolbox")
    attack = getattr(foolbox.attacks, name)(**given)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return lambda images, labels, eps: attack(wrapped, images, labels, epsilons=eps)[0]


def disagreeing(model: nn.Module, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the shares of examples with another outcome, and with a pixel that differs by more than rounding."""
    with torch.no_grad():
        outcomes = model(ours).argmax(1) != model(theirs).argmax(1)
    return outcomes.float().mean().item(), differing(ours, theirs).float().mean().item()


def differing(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return (n,) bool: True for examples with a pixel that differs by more than rounding."""
    return (ours - theirs).flatten(1).abs().amax(1) > 1e-5


def gradient_lengths(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the L2 norm of the gradient of each example's loss."""
    x = images.clone().requires_grad_()
    loss = functional.cross_entropy(model(x), labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1).norm(dim=1)


def in_double(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """Return all in float64, for L2 steps. Rounding in float32 separates two runs of 20 steps at kinks of the net."""
    return copy.deepcopy(model).double(), images.double(), labels


def some_survive(model: nn.Module, attacked: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        assert 0.05 < (model(attacked).argmax(1) == labels).float().mean() < 0.95


class TestTorchattacks:
    def test_fgsm(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = trained
        theirs = torchattack("FGSM", model, eps=EPS)(images, labels)
        ours = fgsm(model, images, labels, eps=EPS)
        assert max(disagreeing(model, ours, theirs)) <= TIES

    @pytest.mark.parametrize(("name", "momentum"), [("BIM", 0.0), ("MIFGSM", 1.0)])
    def test_last_iterate(self, trained: tuple[nn.Module, Tensor, Tensor], name: str, momentum: float) -> None:
        model, images, labels = trained
        theirs = torchattack(name, model, eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels)
        ours = ifgsm(model, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS, momentum=momentum)
        some_survive(model, ours, labels)
        outcomes, pixels = disagreeing(model, ours, theirs)
        assert outcomes <= TIES
        assert pixels <= 0.05  # an early tie may change the path, but hardly ever the outcome

    def test_is_a_column_of_an_evaluation(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = trained

        def theirs(model, images, labels, *, eps, alpha, steps):
            return torchattack("BIM", model, eps=eps, alpha=alpha, steps=steps)(images, labels)

        specs = [AttackSpec(attack, EPS, ALPHA, STEPS) for attack in (theirs, "ifgsm")]
        theirs_column, ours = evaluate(model, (images, labels), specs).attacks
        assert (theirs_column.outcomes != ours.outcomes).float().mean() <= TIES

    def test_pgd_from_the_same_start(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = trained
        torch.manual_seed(11)
        start = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
        torch.manual_seed(11)
        theirs = torchattack("PGD", model, eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels)
        ours = pgd(model, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS, start=start, generator=None)
        some_survive(model, ours, labels)
        outcomes, pixels = disagreeing(model, ours, theirs)
        assert outcomes <= TIES
        assert pixels <= 0.05

    def test_pgd_l2_from_the_images(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = in_double(*trained)
        given = {"eps": 0.8, "alpha": 0.2, "steps": STEPS}
        theirs = torchattack("PGDL2", model, random_start=False, **given)(images, labels)
        ours = ifgsm(model, images, labels, norm="l2", **given)
        some_survive(model, ours, labels)
        # torchattacks divides by ||gradient of the batch mean|| + 1e-10, so its confident examples move less.
        assert (gradient_lengths(model, images, labels)[differing(ours, theirs)] / len(images) < 1e-5).all()
        assert differing(ours, theirs).float().mean() < 0.05

    @pytest.mark.parametrize("loss", ["ce", "dlr"])
    @pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.8)])
    def test_apgd_agrees_in_robust_accuracy(
        self, trained: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float, loss: str
    ) -> None:
        """Random starts and step-size rules differ, so a few outcomes may differ, about as many on either side."""
        model, images, labels = trained
        name = {"linf": "Linf", "l2": "L2"}[norm]
        theirs = torchattack("APGD", model, norm=name, eps=eps, steps=25, loss=loss, seed=0)(images, labels)
        ours = apgd(model, images, labels, norm=norm, eps=eps, steps=25, loss=loss, generator=seeded())
        some_survive(model, ours, labels)
        with torch.no_grad():
            held = [(model(x).argmax(1) == labels) & (model(images).argmax(1) == labels) for x in (ours, theirs)]
        only_ours, only_theirs = (held[0] & ~held[1]).sum().item(), (held[1] & ~held[0]).sum().item()
        # Out of 400 images. Between two seeds of one library up to 4 differ in L-infinity, and up to 33 in L2.
        assert only_ours + only_theirs <= (8 if norm == "linf" else 36)
        assert abs(only_ours - only_theirs) <= (4 if norm == "linf" else 14)

    def test_square_agrees_in_robust_accuracy(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = trained
        images, labels = images[:200], labels[:200]
        theirs = torchattack("Square", model, eps=EPS, n_queries=200, n_restarts=1)(images, labels)
        ours = square(model, images, labels, eps=EPS, queries=201, generator=seeded())
        with torch.no_grad():
            held = [(model(x).argmax(1) == labels).float().mean().item() for x in (ours, theirs)]
        assert held[0] == pytest.approx(held[1], abs=0.05)
        assert held[0] < 0.95

    def test_square_in_l2_agrees_in_robust_accuracy(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        pytest.importorskip("pyautoattack")
        from pyautoattack.square import SquareAttack

        model, images, labels = trained
        images, labels = images[:200], labels[:200]
        enlarged = functional.interpolate(images, scale_factor=2)  # a window has at least 3 pixels a side
        small = nn.Sequential(nn.AvgPool2d(2), model).eval()
        shared: dict[str, Any] = {"norm": "L2", "eps": 2.0, "n_queries": 120, "p_init": 0.1, "seed": 0}
        with torch.random.fork_rng(devices=[]):
            theirs = SquareAttack(small, **shared, device="cpu").perturb(enlarged, labels)
        ours = square(small, enlarged, labels, eps=2.0, norm="l2", queries=120, generator=seeded())
        with torch.no_grad():
            held = [(small(x).argmax(1) == labels).float().mean().item() for x in (ours, theirs, enlarged)]
        assert held[0] == pytest.approx(held[1], abs=0.05)
        assert held[0] < held[2] - 0.1

    def test_their_attack_on_our_models(self) -> None:
        net = models.preact_resnet(depth=8, width=4).eval()
        images, labels = torch.rand(4, 3, 16, 16, generator=seeded()), torch.arange(4)
        theirs = torchattack("BIM", net, eps=8 / 255, alpha=2 / 255, steps=3)(images, labels)
        ours = ifgsm(net, images, labels, eps=8 / 255, alpha=2 / 255, steps=3)
        assert (theirs - ours).abs().max() < 1e-5


class TestAutoAttack:
    """The authors' code, as pyautoattack packages it, from the same starts."""

    RADII: ClassVar[dict[str, float]] = {"linf": EPS, "l2": 0.8}
    EXAMPLES = 40  # all 400 agree as well, but take minutes
    STARTS = 9  # one per target

    def given(
        self, trained: tuple[nn.Module, Tensor, Tensor], norm: str
    ) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
        """Return model, images, labels and offsets of starts.

        They are float64, because rounding in float32 alone separates two runs of 100 steps.
        """
        model, images, labels = in_double(*trained)
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).nonzero()[: self.EXAMPLES, 0]
        images, labels = images[right], labels[right]
        noise = [torch.randn(images.shape, generator=seeded(k), dtype=images.dtype) for k in range(self.STARTS)]
        scale = (lambda x: x.abs().amax(1)) if norm == "linf" else (lambda x: x.norm(dim=1))
        return model, images, labels, [self.RADII[norm] * x / scale(x.flatten(1)).view(-1, 1, 1, 1) for x in noise]

    def theirs(self, kind: str, model: nn.Module, norm: str, **more: Any) -> Any:
        base = pytest.importorskip("pyautoattack.autopgd_base")
        return getattr(base, kind)(
            model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=self.RADII[norm], device="cpu", **more
        )

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize(("loss", "steps"), [("ce", 100), ("dlr", 100), ("ce", 30), ("dlr", 7)])
    def test_apgd_pixel_by_pixel(
        self, trained: tuple[nn.Module, Tensor, Tensor], norm: str, loss: str, steps: int
    ) -> None:
        model, images, labels, noise = self.given(trained, norm)
        attack = self.theirs("APGDAttack", model, norm, n_iter=steps, loss=loss)
        attack.init_hyperparam(images)
        theirs, held, _, _ = attack.attack_single_run(images, labels, x_init=images + noise[0])
        shared: dict[str, Any] = {
            "eps": self.RADII[norm], "norm": norm, "steps": steps, "loss": loss, "start": images + noise[0]
        }  # fmt: skip
        ours = apgd(model, images, labels, variant="autoattack", **shared)
        some_survive(model, ours, labels)
        with torch.no_grad():
            assert torch.equal(model(ours).argmax(1) == labels, held)
        # If nothing fools the model, both return the point of highest loss, and any other review leads elsewhere.
        assert not differing(ours, theirs)[held].any()
        if steps < 100:  # with 100 steps the two variants review at nearly the same steps
            as_printed = apgd(model, images, labels, variant="paper", **shared)
            assert differing(as_printed, theirs)[held].float().mean() > 0.5

    @pytest.mark.parametrize(("norm", "steps"), [("linf", 20), ("l2", 20)])
    def test_apgd_t_example_by_example(
        self, trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, norm: str, steps: int
    ) -> None:
        model, images, labels, noise = self.given(trained, norm)
        attack = self.theirs("APGDAttack_targeted", model, norm, n_iter=steps, n_target_classes=9)
        single, theirs_from, ours_from = attack.attack_single_run, iter(noise), iter(noise)

        def from_our_start(x: Tensor, y: Tensor) -> Any:
            """Choose the rows of the start: fooled examples have left."""
            chosen = [int((images == one).flatten(1).all(1).nonzero()[0]) for one in x]
            return single(x, y, x_init=x + next(theirs_from)[chosen])

        monkeypatch.setattr(attack, "attack_single_run", from_our_start)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)  # it would round the images to float32
            theirs = attack.perturb(images, labels)
        ours = apgd_t(
            model, images, labels, eps=self.RADII[norm], norm=norm, steps=steps,
            start=lambda x, generator: x + next(ours_from),
        )  # fmt: skip
        some_survive(model, ours, labels)
        with torch.no_grad():
            assert torch.equal(model(ours).argmax(1) == labels, model(theirs).argmax(1) == labels)


class TestFoolbox:
    def test_last_iterate(self, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = trained
        attack = foolbox_attack("LinfBasicIterativeAttack", model, abs_stepsize=ALPHA, steps=STEPS)
        theirs = attack(images, labels, EPS)
        ours = ifgsm(model, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS)
        outcomes, pixels = disagreeing(model, ours, theirs)
        assert outcomes <= TIES
        assert pixels <= 0.05

    @pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "LinfPGD", EPS), ("l2", "L2PGD", 0.8)])
    def test_pgd_from_the_same_start(
        self, trained: tuple[nn.Module, Tensor, Tensor], norm: str, name: str, eps: float
    ) -> None:
        model, images, labels = in_double(*trained) if norm == "l2" else trained
        foolbox = pytest.importorskip("foolbox")
        eagerpy = pytest.importorskip("eagerpy")
        start = (images + eps / 10 * torch.randn(images.shape, generator=seeded()).to(images)).clamp(0, 1)
        if norm == "linf":
            start = start.clamp(images - eps, images + eps)
        else:
            assert (start - images).flatten(1).norm(dim=1).max() < eps  # only our start would be projected at once
        attack = getattr(foolbox.attacks, name)(abs_stepsize=eps / 5, steps=STEPS)
        attack.get_random_start = lambda x0, epsilon: eagerpy.astensor(start)
        theirs = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=eps)[0]
        given: dict[str, Any] = {"eps": eps, "alpha": eps / 5, "steps": STEPS, "norm": norm}
        ours = pgd(model, images, labels, start=start, generator=None, **given)
        some_survive(model, ours, labels)
        outcomes, pixels = disagreeing(model, ours, theirs)
        assert outcomes <= (TIES if norm == "linf" else 0)
        assert pixels <= (0.05 if norm == "linf" else 0)

    def test_fgsm_on_our_models(self) -> None:
        net = models.preact_resnet(depth=8, width=4).eval()
        images, labels = torch.rand(4, 3, 16, 16, generator=seeded()), torch.arange(4)
        theirs = foolbox_attack("FGSM", net)(images, labels, 8 / 255)
        assert (theirs - fgsm(net, images, labels, eps=8 / 255)).abs().max() < 1e-6
        l2 = foolbox_attack("FGM", net)(images, labels, 0.5)
        assert (l2 - fgsm(net, images, labels, eps=0.5, norm="l2")).abs().max() < 1e-6


class TestModelsFromElsewhere:
    """Models as RobustBench's ``load_model`` returns them: images in [0, 1] to logits, normalised inside."""

    class RobustBenchStyle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1))
            self.register_buffer("sigma", torch.tensor([0.25, 0.24, 0.26]).view(1, 3, 1, 1))
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten())
            self.head = nn.Linear(392, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body((x - self.mu) / self.sigma))

    def test_every_attack_takes_it(self) -> None:
        model = self.RobustBenchStyle().eval()
        before = copy.deepcopy(model.state_dict())
        images, labels = torch.rand(6, 3, 16, 16, generator=seeded()), torch.arange(6)
        for attacked in (
            fgsm(model, images, labels, eps=8 / 255),
            pgd(model, images, labels, eps=8 / 255, alpha=2 / 255, steps=2, generator=seeded()),
            apgd(model, images, labels, eps=8 / 255, steps=3, generator=seeded()),
            square(model, images, labels, eps=8 / 255, queries=4, generator=seeded()),
        ):
            assert (attacked - images).abs().max() <= 8 / 255
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_as_an_attack_for_others(self) -> None:
        """With its parameters bound, an attack is the callable (model, images, labels) that benchmarks take."""
        from functools import partial

        attack = partial(ifgsm, eps=8 / 255, alpha=2 / 255, steps=2)
        net = models.preact_resnet(depth=8, width=4)
        images, labels = torch.rand(2, 3, 16, 16, generator=seeded()), torch.arange(2)
        assert attack(net, images, labels).shape == images.shape

    def test_robustbench_takes_our_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run its `benchmark` on our images. Its package autoattack is on PyPI only as pyautoattack."""
        autoattack = pytest.importorskip("pyautoattack")

        class AutoAttack(autoattack.AutoAttack):
            def __init__(self, model: nn.Module, *, log_path: object, **options: Any) -> None:
                super().__init__(model, **options | {"version": "custom", "attacks": ["apgd-ce"], "seed": 0})
                self.apgd.n_iter = 5

            def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int, state_path: object) -> Tensor:
                return super().run_standard_evaluation(x, y, batch_size=bs)[0]

        state = types.SimpleNamespace(EvaluationState=None)
        monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack, state=state))
        monkeypatch.setitem(sys.modules, "autoattack.state", state)
        try:
            import robustbench
            from robustbench import data
        except ImportError as error:  # also if one of its dependencies is missing
            pytest.skip(f"could not import robustbench: {error}")

        net = models.preact_resnet(depth=8, width=4, generator=seeded()).eval()
        before = copy.deepcopy(net.state_dict())
        images = torch.rand(6, 3, 32, 32, generator=seeded())
        with torch.no_grad():
            labels = net(images).argmax(1)
        labels[0] = (labels[0] + 1) % 10
        loaders = {key: lambda *_: (images, labels) for key in data._clean_dataset_loaders}
        monkeypatch.setattr(data, "_clean_dataset_loaders", loaders)
        clean, robust = robustbench.benchmark(net, n_examples=6, threat_model="Linf", eps=8 / 255, batch_size=3)
        assert clean == pytest.approx(5 / 6)
        assert robust <= clean
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert not net.training

    def test_autoattack_takes_our_models(self) -> None:
        """RobustBench's ``benchmark`` runs AutoAttack on the module it is given."""
        autoattack = pytest.importorskip("pyautoattack")
        net = models.preact_resnet(depth=8, width=4).eval()
        images = torch.rand(4, 3, 16, 16, generator=seeded())
        with torch.no_grad():
            labels = net(images).argmax(1)
        adversary = autoattack.AutoAttack(net, norm="Linf", eps=8 / 255, version="custom", attacks=["apgd-ce"], seed=0)
        adversary.apgd.n_iter = 3
        attacked, _ = adversary.run_standard_evaluation(images, labels, batch_size=4)
        assert (attacked - images).abs().max() <= 8 / 255 + 1e-6
