"""Models, protocols and options that evaluations once took for something else. Each test is of one mistake."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from odeadv import attacks
from odeadv.audit import audit
from odeadv.evaluation import AttackSpec, Protocol, compare, evaluate, mcnemar
from odeadv.evaluation._attack import CountingModel, attacked
from odeadv.evaluation.trust import differs, scales
from odeadv.models import preact_resnet
from odeadv.support.digests import function_name, is_local
from odeadv.support.folding import Folded
from odeadv.training import Pgd, Trades

IFGSM = Protocol("p", (AttackSpec("ifgsm", 8 / 255, 2 / 255, 3),))


def linear(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, classes)).eval()


IMAGES = torch.rand(12, 1, 6, 6, generator=seeded())
LABELS = linear()(IMAGES).argmax(1)


class Changed(nn.Module):
    """A network with a function applied to its images or logits."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = linear()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.net, x)


class TestMaskedClass:
    """A class that is masked by a huge negative logit must not decide what counts as rounding in the others."""

    @pytest.mark.parametrize("mask", [-1.0, -1e4, -1e9])
    def test_a_random_model_is_refused(self, mask: float) -> None:
        def noisy(net: nn.Module, x: Tensor) -> Tensor:
            z = net(x) + 1e-3 * torch.randn(len(x), 4)
            return torch.cat([z, z.new_full((len(x), 1), mask)], 1)

        with pytest.raises(ValueError, match=r"^model: two forward passes on the same images differ"):
            evaluate(Changed(noisy), (IMAGES, LABELS), IFGSM)

    def test_a_journal_of_another_model_is_refused(self, tmp_path: Path) -> None:
        class Shifted(nn.Module):
            def __init__(self, by: float) -> None:
                super().__init__()
                self.net = linear()
                self.by = [torch.tensor([by, 0.0, 0.0, 0.0])]  # no attribute that a digest looks into

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([self.net(x) + self.by[0], torch.full((len(x), 1), -1e9)], 1)

        evaluate(Shifted(0.0), (IMAGES, LABELS), IFGSM, resume=tmp_path / "j")
        with pytest.raises(ValueError, match="is the journal of another model"):
            evaluate(Shifted(9.0), (IMAGES, LABELS), IFGSM, resume=tmp_path / "j")

    def test_what_is_not_finite_is_no_rounding(self) -> None:
        nan, inf = float("nan"), float("inf")
        good = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        for bad in (torch.tensor([[1.0, nan], [3.0, 4.0]]), torch.tensor([[1.0, inf], [3.0, 4.0]])):
            assert differs(good, bad)
            assert differs(bad, good)
            assert not differs(bad, bad)
        assert not differs(good, good * (1 + 1e-6))

    def test_scales(self) -> None:
        logits = torch.tensor([[1.0, -8.0, 0.0, -1e9, -2e9], [3.0, 2.0, 0.0, -1e9, -2e9]])
        assert scales(logits).tolist() == [8.0, 8.0, 8.0, 2e9, 2e9]
        assert scales(torch.tensor([[0.0, 0.0, 5.0]])).tolist() == [5.0] * 3  # classes that are never answered
        assert scales(torch.tensor([[1e-9, -1e3, -2e3]])).tolist() == [2e3] * 3  # log-probabilities, of a sure model
        assert scales(torch.tensor([[2.0]])).tolist() == [2.0]


class TestSmallNoise:
    """The draws of a random model may look like rounding in one pass and not in the next one."""

    FGSM = Protocol("p", (AttackSpec("fgsm", 8 / 255),))

    def evaluated(self, model: nn.Module, seed: int, protocol: Protocol = FGSM, ambient: int = 0) -> list[bool]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * ambient + seed)  # a global object of the user's
            return evaluate(model, (IMAGES, LABELS), protocol, stochastic=True, seed=seed).attacks[0].outcomes.tolist()

    @pytest.mark.parametrize("noise", [1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 1e-2])
    def test_a_model_said_to_be_random_is_never_refused(self, noise: float) -> None:
        model = Changed(lambda net, x: net(x) + noise * torch.randn(()))
        for seed in range(20):
            assert self.evaluated(model, seed) == self.evaluated(model, seed, ambient=1)

    def test_nor_one_that_draws_seldom(self) -> None:
        model = Changed(lambda net, x: net(x) + 0.1 * (torch.rand(()) < 0.3))
        for seed in range(20):
            assert self.evaluated(model, seed) == self.evaluated(model, seed, ambient=1)

    @pytest.mark.parametrize("stochastic", [False, True])
    def test_one_that_looks_at_the_gradient_mode_is(self, stochastic: bool) -> None:
        model = Changed(lambda net, x: net(x) + 0.1 * x.requires_grad)
        with pytest.raises(ValueError, match="its logits with gradients differ from those without"):
            evaluate(model, (IMAGES, LABELS), IFGSM, stochastic=stochastic)

    def test_the_global_random_state_decides_nothing(self) -> None:
        model = Changed(lambda net, x: net(x + 0.05 * torch.randn_like(x)))
        assert self.evaluated(model, 3, IFGSM, ambient=1) == self.evaluated(model, 3, IFGSM, ambient=2)


def negative_logit(z: Tensor, y: Tensor) -> Tensor:
    return -z.gather(1, y[:, None])[:, 0]


def positive_logit(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None])[:, 0]


class TestFunctions:
    def test_a_journal_with_a_local_function_is_refused(self, tmp_path: Path) -> None:
        protocol = Protocol("p", (AttackSpec("pgd", 0.1, 0.05, 3, options={"loss": lambda z, y: -z[:, 0]}),))
        with pytest.raises(ValueError, match=r"^resume: the option loss of pgd-3 at 25\.5/255 is a lambda or loc"):
            evaluate(linear(), (IMAGES, LABELS), protocol, resume=tmp_path / "j")
        with pytest.raises(ValueError, match=r"^resume: the model's attribute change is a lambda or local function"):
            evaluate(Changed(lambda net, x: net(x)), (IMAGES, LABELS), IFGSM, resume=tmp_path / "j")
        assert not (tmp_path / "j").exists()
        evaluate(linear(), (IMAGES, LABELS), protocol)  # without a journal it does not matter

    def test_a_journal_of_another_named_function_is_refused(self, tmp_path: Path) -> None:
        def evaluated(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
            protocol = Protocol("p", (AttackSpec("pgd", 0.1, 0.05, 3, options={"loss": loss}),))
            return evaluate(linear(), (IMAGES, LABELS), protocol, resume=tmp_path / "j").attacks[0].robust_accuracy

        first = evaluated(negative_logit)
        assert evaluated(negative_logit) == first
        with pytest.raises(ValueError, match="is the journal of another attacks"):
            evaluated(positive_logit)

    def test_names(self) -> None:
        assert function_name(F.cross_entropy) == "torch.nn.functional.cross_entropy"
        assert function_name(partial(negative_logit, None)).startswith(
            "partial of test_evaluation_faults.negative_logit"
        )
        assert not is_local(partial(negative_logit, None))
        assert is_local(lambda x: x)

    def test_what_is_written_is_the_same_in_another_process(self) -> None:
        code = """
import torch
from odeadv.support.digests import function_name, model_digest
def make():
    return lambda x: x
net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
net[0].weight.data.fill_(1)
net.function, net.words = make(), {"a", "b", "c", "d"}
compiled = torch.compile(net)
parallel = torch.nn.DataParallel(net)
print(function_name(make()), *map(model_digest, (net, compiled, parallel)))
"""
        said = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")  # two orders of the set of words
        }
        assert len(said) == 1

    def test_a_journal_of_a_model_with_another_function_is_refused(self, tmp_path: Path) -> None:
        class Reversed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: object, *gradients: Tensor) -> Tensor:
                return -gradients[0]

        class Maybe(nn.Module):
            def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.net, self.before = linear(), before

            def forward(self, x: Tensor) -> Tensor:
                return self.net(self.before(x))

        masked, honest = Maybe(Reversed.apply), Maybe(torch.clone)
        assert evaluate(masked, (IMAGES, LABELS), IFGSM, resume=tmp_path / "j").attacks[0].robust_accuracy == 1
        with pytest.raises(ValueError, match="is the journal of another model"):
            evaluate(honest, (IMAGES, LABELS), IFGSM, resume=tmp_path / "j")

    def test_a_journal_of_a_random_model_with_another_tensor_is_refused(self, tmp_path: Path) -> None:
        class Noisy(nn.Module):
            def __init__(self, std: float) -> None:
                super().__init__()
                self.net, self.std = linear(), torch.tensor(std)

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x + self.std * torch.randn_like(x))

        evaluate(Noisy(0.01), (IMAGES, LABELS), IFGSM, stochastic=True, resume=tmp_path / "j")
        with pytest.raises(ValueError, match="is the journal of another model"):
            evaluate(Noisy(5.0), (IMAGES, LABELS), IFGSM, stochastic=True, resume=tmp_path / "j")


class Sequence(nn.Module):
    """BatchNorm1d on (n, channels, length), behind a ReLU."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(6, channels, 3, padding=1), nn.BatchNorm1d(channels)
        self.last = nn.Linear(6 * channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(F.relu(self.first(x.squeeze(1)))).flatten(1))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(input=self.first(x)).flatten(1))


class Masked(nn.Module):
    """A network with one class masked by -1e9."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([z, torch.full_like(z[:, :1], -1e9)], 1)


def spectral(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Conv2d(1, 3, 3)), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (Sequence, 1),
        (lambda: Sequence(6), 1),  # as many channels as positions: a wrong axis would go unnoticed
        (lambda: Masked(Sequence(6)), 1),
        (lambda: spectral(nn.utils.parametrizations.spectral_norm), 1),
        (lambda: spectral(nn.utils.parametrizations.weight_norm), 1),
        (lambda: spectral(nn.utils.spectral_norm), 1),
        (ByKeyword, 0),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:not folded:RuntimeWarning", "ignore::FutureWarning")
def test_folding_what_is_no_plain_convolution(make: Callable[[], nn.Module], folded: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = make().train()
        net(IMAGES)
        net = net.eval()
        for part in net.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.weight.data.uniform_(-2, 2)
    with torch.no_grad():
        labels = net(IMAGES).argmax(1)
        again = Folded(net).eval()
        assert again.count == folded
        assert torch.allclose(again(IMAGES), net(IMAGES), atol=1e-5)
    result = evaluate(net, (IMAGES, labels), IFGSM, fold=True)
    assert result.clean_accuracy == 1
    assert len(result.notes) == (folded == 0)


def test_a_fold_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def folding(model: nn.Module) -> nn.Module:
        raise KeyError("something new in torch")

    monkeypatch.setattr("odeadv.evaluation._prepare.Folded", folding)
    with pytest.warns(RuntimeWarning, match="not folded: KeyError"):
        evaluate(linear(), (IMAGES, LABELS), IFGSM, fold=True)


def test_an_answer_that_depends_on_a_large_batch_is_refused() -> None:
    large = Changed(lambda net, x: net(x) - (net(x).mean(0) if len(x) > 8 else 0))
    with pytest.raises(ValueError, match=r"^model: the logits of an image depend on the other images in its batch"):
        evaluate(large, (IMAGES, LABELS), IFGSM)


class TestCompare:
    ATTACKS = (
        AttackSpec("pgd", 8 / 255, 2 / 255, 3, "worst"),
        AttackSpec("pgd", 8 / 255, 2 / 255, 3, "worst", options={"loss": "margin"}),
        AttackSpec("square", 8 / 255, score="worst", options={"queries": 2}),
        AttackSpec("square", 8 / 255, options={"queries": 2}),
        AttackSpec("pgd", 0.5, 0.1, 3),
        AttackSpec("pgd", 0.5, 0.1, 3, options={"norm": "l2"}),
    )

    def test_no_attack_is_lost(self) -> None:
        result = evaluate(linear(), (IMAGES, LABELS), Protocol("p", self.ATTACKS))
        found = compare(result, result)
        assert list(found) == [
            "clean",
            "pgd-3 at 8/255 (attack 0), worst so far",
            "pgd-3 at 8/255 (attack 1), worst so far",
            "square at 8/255 (attack 2), worst so far",
            "square at 8/255 (attack 3)",
            "square at 8/255 (attack 3), worst so far",
            "pgd-3 at 127.5/255",
            "pgd-3 at 0.5 in L2",
            "worst case",
        ]
        assert found["pgd-3 at 8/255 (attack 1), worst so far"] == mcnemar(result, result, attack=1, score="worst")


def test_attacks_that_are_not_compiled_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    protocol = Protocol("p", (*IFGSM.attacks, AttackSpec("pgd", 0.1, 0.05, 3), AttackSpec("apgd", 0.1, steps=3)))
    result = evaluate(linear(), (IMAGES, LABELS), protocol, compile=True)
    says = "compile=True: for FGSM and IFGSM without options only, not for apgd-3 at 25.5/255, pgd-3 at 25.5/255"
    assert says in result.notes
    assert not evaluate(linear(), (IMAGES, LABELS), IFGSM, compile=True).notes


class TestAttackArguments:
    def test_the_global_generator_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^generator: got torch's global one"):
            attacks.pgd(linear(), IMAGES, LABELS, eps=0.1, alpha=0.01, steps=1, generator=torch.default_generator)

    @pytest.mark.parametrize(
        "attack",
        [
            lambda net, loss: attacks.square(net, IMAGES, LABELS, eps=0.1, queries=5, loss=loss, generator=seeded()),
            lambda net, loss: attacks.worst_of(net, [IMAGES, 1 - IMAGES], LABELS, loss=loss),
            lambda net, loss: attacks.ifgsm(net, IMAGES, LABELS, eps=0.1, alpha=0.1, steps=2, loss=loss),
        ],
    )
    def test_a_loss_that_is_nan_is_refused(self, attack: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=r"^loss: returned NaN"):
            attack(linear(), lambda z, y: z[:, 0] * float("nan"))

    @pytest.mark.parametrize("start", [torch.full_like(IMAGES, float("nan")), lambda x, g: x * float("nan")])
    def test_a_start_that_is_nan_is_refused(self, start: object) -> None:
        with pytest.raises(ValueError, match=r"^start: (contains|returned) NaN"):
            attacks.ifgsm(
                linear(),
                IMAGES,
                LABELS,
                eps=0.1,
                alpha=0.1,
                steps=1,
                start=start,
                generator=seeded(),  # type: ignore[arg-type]
            )

    def test_one_model_is_no_sequence_of_surrogates(self) -> None:
        with pytest.raises(TypeError, match=r"^surrogates: got one Sequential, expected a sequence of models"):
            attacks.transfer(linear(), IMAGES, LABELS, surrogates=linear(), attack=lambda m, x, y: x)  # type: ignore[arg-type]

    def test_a_specification_can_be_copied_and_sent(self) -> None:
        spec = AttackSpec("pgd", 0.1, 0.05, 3, options={"restarts": 2})
        assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))


class TestChannelsLast:
    def net(self) -> nn.Module:
        class Flattening(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                return self.head(x.view(x.size(0), -1))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Flattening().eval()

    def test_a_network_that_flattens_by_view_is_evaluated_on_contiguous_images(self) -> None:
        images = torch.rand(12, 3, 8, 8, generator=seeded())
        labels = self.net()(images).argmax(1)
        found = evaluate(self.net(), (images, labels), IFGSM)
        assert found.settings["channels_last"] is False
        assert any("channels_last" in note for note in found.notes)
        asked = evaluate(self.net(), (images, labels), IFGSM, channels_last=False)
        assert torch.equal(found.attacks[0].outcomes, asked.attacks[0].outcomes)
        assert not any("channels_last" in note for note in asked.notes)

    def test_what_takes_no_images_at_all_says_so_itself(self) -> None:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            evaluate(self.net(), (torch.rand(4, 3, 9, 9), torch.zeros(4, dtype=torch.int64)), IFGSM)


class TestUnits:
    """A radius of 8 is one of 8/255 that was not divided."""

    @pytest.mark.parametrize("attack", [attacks.fgsm, attacks.ifgsm, attacks.pgd, attacks.apgd, attacks.square])
    def test_attacks(self, attack: Callable[..., Tensor]) -> None:
        more: dict[str, object] = {"alpha": 2.0, "steps": 2} if attack in (attacks.ifgsm, attacks.pgd) else {}
        more |= {} if attack in (attacks.fgsm, attacks.ifgsm) else {"generator": seeded()}
        with pytest.raises(ValueError, match=r"eps: got 8, expected at most 1 .*1/255"):
            attack(linear(), IMAGES, LABELS, eps=8, **more)

    @pytest.mark.parametrize("objective", [Pgd, Trades])
    def test_objectives(self, objective: type) -> None:
        with pytest.raises(ValueError, match=r"eps: got 8, expected at most 1 .*1/255"):
            objective(eps=8)

    def test_an_l2_radius_may_be_larger(self) -> None:
        attacked = attacks.pgd(linear(), IMAGES, LABELS, eps=1.5, alpha=1.5, steps=3, norm="l2", generator=seeded())
        moved = (attacked - IMAGES).flatten(1).norm(dim=1)
        assert float(moved.max()) <= 1.5
        assert float(moved.max()) > 1.0


def test_images_of_another_dtype_are_refused_by_attacks_too() -> None:
    with pytest.raises(ValueError, match=r"images: got torch.float64, but the model has torch.float32"):
        attacks.ifgsm(linear(), IMAGES.double(), LABELS, eps=8 / 255, alpha=2 / 255, steps=2)


def test_grey_images_are_not_repeated_by_the_normalisation_of_a_colour_network() -> None:
    net = preact_resnet(depth=8, width=4)
    with pytest.raises(ValueError, match=r"images: got shape \(2, 1, 8, 8\), expected \(n, 3, height, width\)"):
        net(torch.rand(2, 1, 8, 8))


def test_a_journal_that_is_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"resume: .* is a folder"):
        evaluate(linear(), (IMAGES, LABELS), IFGSM, resume=tmp_path)


class TestAutoAttack:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("pyautoattack")

    @pytest.mark.parametrize(("classes", "part"), [(3, "apgd-t"), (2, "apgd-t"), (2, "apgd-dlr")])
    def test_too_few_classes_are_refused_by_name(self, classes: int, part: str) -> None:
        net = linear(classes)
        spec = AttackSpec("autoattack", 0.05, options={"version": "custom", "attacks": (part,)})
        with pytest.raises(ValueError, match=f"^attacks: '{part}' of AutoAttack needs at least"):
            evaluate(net, (IMAGES, net(IMAGES).argmax(1)), Protocol("p", (spec,)))

    def test_its_l2_images_are_in_the_ball(self) -> None:
        eps = 0.3
        options = {"version": "custom", "attacks": ("apgd-ce",), "norm": "L2"}
        found, _ = attacked(
            AttackSpec("autoattack", eps, options=options), CountingModel(linear(), 3), IMAGES, LABELS, seed=0, place=""
        )
        pairs = zip(found.flatten(1).tolist(), IMAGES.flatten(1).tolist(), strict=True)
        squares = [sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs]
        assert max(squares) <= Fraction(eps) ** 2
        assert max(squares) > Fraction(eps) ** 2 * Fraction(999, 1000)


@pytest.mark.parametrize("eps", [0.01 / 255, 0.2 / 255, 8 / 255])
def test_the_audit_plants_examples_at_any_radius(eps: float) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 36))
        net[1].bias.copy_(torch.tensor([-18.0, 18.0]))
    images = torch.zeros(12, 1, 6, 6)
    images[::2] = 1
    labels = net(images).argmax(1)
    report = audit(net, (images, labels), eps=eps, generator=seeded(), steps=2, more_steps=2, queries=2)
    planted = report["planted examples are found"]
    assert planted.status == "pass", planted
    assert planted.figures["planted"] == 12
