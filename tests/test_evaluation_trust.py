"""Figures that can be quoted: random, steep and masked networks, the worst case, data and outputs of every form."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import held_out, seeded, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import odeadv
from odeadv.data import load
from odeadv.evaluation import PROTOCOLS, AttackSpec, Evaluation, Protocol, compare, evaluate, mcnemar, saved_images
from odeadv.evaluation.data import read_data
from odeadv.support.digests import data_digest

ROOT = Path(__file__).parent.parent
IFGSM = AttackSpec("ifgsm", 8 / 255, 2 / 255, 5)


class Linear(nn.Module):
    """A linear classifier between two functions, with noise on its images."""

    def __init__(
        self, pre: Callable[[Tensor], Tensor] = torch.clone, post: Callable[..., object] = torch.clone, noise: float = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        self.pre, self.post, self.noise = pre, post, noise

    def forward(self, x: Tensor) -> object:
        return self.post(self.net(self.pre(x + self.noise * torch.randn_like(x) if self.noise else x)))


def problem(net: Linear | None = None, n: int = 200) -> tuple[Tensor, Tensor]:
    """Return images with the labels of the noise-free network; every fifth label is wrong."""
    net = net or Linear()
    x = torch.rand(n, 3, 8, 8, generator=seeded())
    y = net.net(net.pre(x)).argmax(1)
    y[::5] = (y[::5] + 1) % 10
    return x, y


def evaluated(net: nn.Module, data: object, protocol: object = "table2", **options: object) -> Evaluation:
    """Evaluate without showing warnings; ``notes`` has the same sentences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(net, data, protocol, **options)


class TestRandomModels:
    """The worst of many draws must not count as an attack."""

    def test_a_tiny_radius_changes_nothing(self) -> None:
        net = Linear(noise=0.1)
        specs = [AttackSpec("ifgsm", 1e-6, 1e-6, k) for k in (1, 20)]
        result = evaluate(net, problem(net), specs, stochastic=True, passes=8)
        for attack in result.attacks:
            assert attack.worst_so_far_outcomes is None
            assert abs(attack.robust_accuracy - result.clean_accuracy) < 0.05
        with pytest.raises(ValueError, match=r"^worst_case: the model is random"):
            _ = result.worst_case
        assert result.to_dict()["worst_case_accuracy"] is None

    def test_worst_so_far_is_refused_with_the_reason(self) -> None:
        spec = AttackSpec("ifgsm", 1e-6, 1e-6, 3, "worst")
        with pytest.raises(ValueError, match=r"^protocol: got score='worst' .* counts noise as an attack"):
            evaluate(Linear(noise=0.1), problem(), spec, stochastic=True)

    def test_scores_are_means_over_passes_with_their_error(self) -> None:
        """A model that is right with probability 0.7, whatever the image."""

        class Coin(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                wrong = (torch.rand(len(x)) < 0.3).to(x)
                slope = x.flatten(1).sum(1)
                return torch.stack([1e-3 * slope - 1e-3 * slope.detach(), 2 * wrong - 1], dim=1)

        data = torch.rand(400, 1, 4, 4, generator=seeded()), torch.zeros(400, dtype=torch.int64)
        result = evaluate(Coin(), data, IFGSM, stochastic=True, passes=20, seed=1)
        attack = result.attacks[0]
        assert len(attack.pass_accuracies) == len(result.clean_pass_accuracies) == 20
        assert attack.standard_error == pytest.approx(float(numpy.std(attack.pass_accuracies, ddof=1)) / 20**0.5)
        for mean in (attack.robust_accuracy, result.clean_accuracy):
            assert abs(mean - 0.7) < 4 * (0.21 / 8000) ** 0.5
        again = Evaluation.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again.to_dict() == result.to_dict()
        assert "+-" in str(result)

    def test_passes_need_a_random_model(self) -> None:
        with pytest.raises(ValueError, match=r"^passes: got 3, expected 1 for a model that is not stochastic"):
            evaluate(Linear(), problem(), passes=3)

    @pytest.mark.parametrize("after", [1, 2])
    def test_an_interrupted_run_draws_the_same(self, tmp_path: Path, after: int) -> None:
        class Stop(Exception):
            pass

        def progress(done: int, total: int) -> None:
            if done == after:
                raise Stop

        net, data = Linear(noise=0.1), problem(n=60)
        options = {"stochastic": True, "passes": 3, "batch_size": 20}
        whole = evaluate(net, data, IFGSM, **options)
        with pytest.raises(Stop):
            evaluate(net, data, IFGSM, resume=tmp_path / "j", progress=progress, **options)
        resumed = evaluate(net, data, IFGSM, resume=tmp_path / "j", **options)
        assert {**resumed.to_dict(), "seconds": 0} == {**whole.to_dict(), "seconds": 0}

    def test_an_averaged_model_is_a_function_of_the_image(self) -> None:
        net = odeadv.models.averaged(Linear(noise=0.1), passes=4)
        result = evaluate(net, problem(), "table2", batch_size=50)
        assert 0 < result.worst_case < result.clean_accuracy


class Steep(nn.Module):
    """A network that amplifies rounding in its last layer."""

    def __init__(self, float32: bool = False, of_the_batch: float = 0.0) -> None:
        super().__init__()
        self.net = odeadv.models.preact_resnet(14, 8, generator=seeded())
        self.float32, self.of_the_batch = float32, of_the_batch

    def forward(self, x: Tensor) -> Tensor:
        if self.float32:
            x = torch.frombuffer(x.detach().numpy(), dtype=torch.float32).view(x.shape) + 0 * x  # refuses float64
        z = self.net(x)
        return z + 0.5 * torch.sin(3e4 * z) + self.of_the_batch * (z.mean(0) if len(z) > 1 else 0)


class TestSteepModels:
    DATA = torch.rand(16, 3, 16, 16, generator=seeded()), torch.zeros(16, dtype=torch.int64)

    def test_amplified_rounding_is_noted_and_not_refused(self) -> None:
        result = evaluated(Steep().eval(), self.DATA, IFGSM)
        assert any("amplifies rounding" in note for note in result.notes)

    def test_so_it_is_without_float64(self) -> None:
        result = evaluated(Steep(float32=True).eval(), self.DATA, IFGSM, channels_last=False)
        assert any("amplifies rounding" in note for note in result.notes)

    @pytest.mark.parametrize("share", [1e-3, 1.0])
    def test_a_real_dependence_is_refused_in_a_steep_model_too(self, share: float) -> None:
        net = Steep(of_the_batch=share).eval()
        with pytest.raises(ValueError, match=r"^model: the logits of an image depend on the other .* is not rounding"):
            evaluate(net, self.DATA, IFGSM)

    def test_an_adaptive_solver_is_refused_by_its_name_and_fixed_steps_are_not(self) -> None:
        torchdiffeq = pytest.importorskip("torchdiffeq")

        class NeuralOde(nn.Module):
            def __init__(self, **options: object) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.conv, self.head, self.options = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 256, 4), options

            def forward(self, x: Tensor) -> Tensor:
                times = torch.tensor([0.0, 1.0])
                path = torchdiffeq.odeint(lambda t, y: 3 * torch.tanh(self.conv(y)), x, times, **self.options)
                return self.head(path[-1].flatten(1))

        with pytest.raises(ValueError, match=r"adaptive ODE solver, which chooses one step size for the whole batch"):
            evaluate(NeuralOde(rtol=1e-2, atol=1e-2).eval(), self.DATA, IFGSM)
        for options in ({"rtol": 1e-6, "atol": 1e-6}, {"method": "rk4", "options": {"step_size": 0.25}}):
            evaluated(NeuralOde(**options).eval(), self.DATA, IFGSM)

    def test_the_way_past_is_recorded(self) -> None:
        net = Steep(of_the_batch=1.0).eval()
        result = evaluated(net, self.DATA, IFGSM, accept="batch dependence")
        assert result.settings["accept"] == ["batch dependence"]
        assert any(note.startswith("accepted: logits depend on the other images") for note in result.notes)
        with pytest.raises(ValueError, match=r"^accept: got 'noise', expected one of 'batch dependence'"):
            evaluate(net, self.DATA, IFGSM, accept="noise")

    def test_plain_networks_have_no_note(self) -> None:
        assert evaluate(trained(), held_out(40), IFGSM).notes == ()


class Reversed(torch.autograd.Function):
    """The identity in the forward pass; its gradient has the opposite sign."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def stepped(x: Tensor) -> Tensor:
    return (7 * x).round() / 7


class TestNotes:
    @pytest.mark.parametrize(
        "spec",
        [
            IFGSM,
            AttackSpec("ifgsm", 8 / 255, 2 / 255, 5, "worst"),
            AttackSpec("pgd", 8 / 255, 2 / 255, 5),
            AttackSpec("apgd", 8 / 255, None, 5, "worst"),
        ],
        ids=lambda spec: spec.label,
    )
    def test_zero_gradients(self, spec: AttackSpec) -> None:
        net = Linear(pre=stepped)
        with pytest.warns(RuntimeWarning, match=r"evaluate: the gradient .* is exactly zero for") as said:
            result = evaluate(net, problem(net), spec)
        assert len(said) == 1
        survived = int(result.worst_case_outcomes.sum())
        assert f"exactly zero for {survived} of 200 images" in result.notes[-1]
        assert result.notes[-1] in str(result)
        assert result.notes[-1] in result.to_dict()["notes"]

    def test_zero_gradients_survive_a_journal(self, tmp_path: Path) -> None:
        net = nn.Sequential(Rounded(), nn.Flatten(), nn.Linear(192, 10))
        data = torch.rand(40, 3, 8, 8, generator=seeded()), torch.zeros(40, dtype=torch.int64)
        data = data[0], net(data[0]).argmax(1)
        for score in ("last", "worst"):
            spec = AttackSpec("ifgsm", 8 / 255, 2 / 255, 5, score)
            first, again = (evaluated(net, data, spec, resume=tmp_path / score) for _ in range(2))
            assert first.notes == again.notes != ()

    def test_an_attack_that_does_not_need_gradients_removes_the_note(self) -> None:
        """Images that some attack broke are not counted."""
        net = Linear(pre=stepped)
        both = [IFGSM, AttackSpec("square", 0.5, score="worst", options={"queries": 300})]
        result = evaluate(net, problem(net), both)
        assert not result.attacks[0].outcomes.float().mean() < 0.5
        assert not result.notes

    def test_more_right_attacked_than_clean(self) -> None:
        net, spec = Linear(pre=Reversed.apply), AttackSpec("ifgsm", 0.1, 0.025, 5)
        notes = evaluated(net, problem(net), spec).notes
        assert any("more images are right after ifgsm-5" in note for note in notes)

    def test_one_step_beats_many(self) -> None:
        """From the first step on the gradient leads back."""

        class Bump(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                moved = (x - 0.5).flatten(1).sum(1)
                slope = torch.where(moved.detach() > 0.005, -moved, moved)
                value = torch.where(moved > 0.02, 1.0, -1.0)
                return torch.stack([0 * moved, slope + (value - slope).detach()], dim=1)

        data = torch.full((60, 1, 1, 1), 0.5), torch.zeros(60, dtype=torch.int64)
        specs = [AttackSpec("fgsm", 8 / 255), AttackSpec("ifgsm", 8 / 255, 2 / 255, 20)]
        result = evaluated(Bump(), data, specs)
        assert any("leaves 60 more images right than fgsm" in note for note in result.notes)

    def test_probabilities(self) -> None:
        net = Linear(post=lambda z: z.softmax(1))
        assert any("look like probabilities" in note for note in evaluated(net, problem(), IFGSM).notes)

    def test_saturated_cross_entropy(self) -> None:
        net = Linear(post=lambda z: 1e4 * z)
        tiny = AttackSpec("ifgsm", 1e-4, 1e-4, 2)
        notes = evaluated(net, problem(), tiny).notes
        assert any("the cross-entropy is exactly 0 for" in note for note in notes)
        assert not evaluate(net, problem(), [tiny, AttackSpec("ifgsm", 0.5, 0.1, 5, options={"loss": "margin"})]).notes

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"post": torch.sigmoid}, "all outputs lie in [0, 1], as after a sigmoid"),
            ({"post": lambda z: 1e-6 * z}, "the outputs of each image lie within 0.01 of each other"),
            ({"post": torch.relu}, "several outputs are exactly 0 and none is negative for"),
            ({"post": lambda z: 2 * z.detach() - z}, "lowered the cross-entropy of"),
        ],
    )
    def test_outputs_and_gradients_that_weaken_attacks(self, changes: dict[str, object], message: str) -> None:
        notes = evaluated(Linear(**changes), problem(), AttackSpec("ifgsm", 3 / 255, 1 / 255, 5)).notes
        assert [note for note in notes if message in note], notes

    def test_a_random_loss_that_falls_by_chance_is_not_noted(self) -> None:
        spec = AttackSpec("ifgsm", 1e-6, 5e-7, 3)
        assert evaluated(Linear(noise=0.1), problem(), spec, stochastic=True, passes=2).notes == ()

    @pytest.mark.parametrize("spec", [IFGSM, AttackSpec("pgd", 8 / 255, 2 / 255, 2)], ids=lambda spec: spec.label)
    def test_clipped_images(self, spec: AttackSpec) -> None:
        class Bounds(torch.autograd.Function):
            """A clamp without a gradient at its bounds, which not every version of torch has."""

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.clamp(0, 1)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return gradient * ((x > 0) & (x < 1))

        images = (2 * torch.rand(60, 3, 8, 8, generator=seeded()) - 0.5).clamp(0, 1)
        data = images, Linear()(images).argmax(1)
        notes = evaluated(Linear(pre=Bounds.apply), data, spec).notes
        assert [note for note in notes if "at all pixels that are 0 or 1 for 60 of 60 images" in note], notes
        assert not evaluate(Linear(), data, spec).notes

    def test_attacks_that_leave_saturation_are_not_noted(self) -> None:
        net, (images, labels) = Linear(post=lambda z: 40 * z), problem()
        images, labels = images[10:], labels[10:]  # the first ones stay saturated
        result = evaluate(net, (images, labels), AttackSpec("ifgsm", 0.05, 0.05 / 3, 6))
        saturated = nn.functional.cross_entropy(net(images), labels, reduction="none") == 0
        assert int((saturated & result.worst_case_outcomes).sum()) == 2
        assert not result.notes

    @pytest.mark.parametrize("protocol", list(PROTOCOLS)[:3])
    def test_plain_networks_have_none(self, protocol: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evaluate(Linear(), problem(), protocol).notes == ()
            assert evaluate(trained(), held_out(100), protocol).notes == ()


class RandomBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * torch.randn_like(gradient)


class TestDoubts:
    """Data that do not fit the model, and attacks that do not fit the dtype."""

    def test_a_random_backward_pass(self) -> None:
        net = Linear(pre=RandomBackward.apply)
        result = evaluated(net, problem(net, n=40), "table1")
        assert result.notes[0].startswith("gradients of the same images differ from one pass to the next: a random")

    def test_guessing(self) -> None:
        x, y = problem(n=60)
        result = evaluated(Linear(), (x, (y + 3) % 10), "table1")
        assert f"{100 * result.clean_accuracy:.3g} %, no better than guessing among 10 classes" in result.notes[0]
        assert not evaluated(Linear(), (x[:40], (y[:40] + 3) % 10), "table1").notes

    def test_divided_by_255_twice(self) -> None:
        x, _ = problem(n=10)
        y = Linear()(x / 255).argmax(1)
        assert "divided by 255 twice" in evaluated(Linear(), (x / 255, y), "table1").notes[0]

    def test_steps_that_the_dtype_cannot_take(self) -> None:
        x, y = problem(n=10)
        net = Linear().bfloat16()
        specs = [AttackSpec("ifgsm", 8 / 255, 1 / 255, 3), AttackSpec("fgsm", 8 / 255)]
        (note,) = evaluated(net, (x.bfloat16(), y), specs).notes
        assert "bfloat16, whose numbers between 0.5 and 1 are 1/255 apart: too coarse for the steps of ifgsm-3" in note
        assert "fgsm at" not in note.replace("ifgsm", "")
        assert not evaluated(net, (x.bfloat16(), y), "table2").notes


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return stepped(x)


class TestWorstCase:
    def test_counts_an_example_only_if_every_attack_failed(self) -> None:
        specs = [
            AttackSpec("ifgsm", 0.02, 0.01, 3),
            AttackSpec("pgd", 0.02, 0.01, 3, "worst"),
            AttackSpec("square", 0.02, options={"queries": 20}),
        ]
        result = evaluate(trained(), held_out(100), specs)
        rows = [result.clean_outcomes, *(row for attack in result.attacks for row in attack.measured)]
        expected = torch.stack(rows).all(dim=0)
        assert torch.equal(result.worst_case_outcomes, expected)
        assert result.worst_case == int(expected.sum()) / 100 <= min(float(row.float().mean()) for row in rows)
        data = result.to_dict()
        assert (data["worst_case_accuracy"], data["worst_case_interval"]) == (
            result.worst_case,
            list(result.worst_case_interval),
        )
        assert f"right under every attack (worst case) {100 * result.worst_case:13.2f}  [" in str(result)
        other = evaluate(nn.Sequential(trained()), held_out(100), specs)
        assert compare(result, other)["worst case"] == mcnemar(result, other, attack="worst case")

    def test_committed_records_are_still_read(self) -> None:
        files = sorted((ROOT / "docs/results/runs").glob("*.json"))[:20]
        read = 0
        for file in files:
            for by_protocol in json.loads(file.read_text())["evaluations"].values():
                for value in by_protocol.values():
                    if value["schema"] == "odeadv.evaluation/1":
                        continue  # the first version kept no outcomes
                    read += 1
                    now = Evaluation.from_dict(value).to_dict()
                    assert {key: now[key] for key in value if key not in ("schema", "attacks")} == {
                        key: item for key, item in value.items() if key not in ("schema", "attacks")
                    }
        assert read


class TestData:
    def check_same(self, data: object, **options: object) -> None:
        x, y = problem()
        a, b = evaluate(Linear(), data, IFGSM, **options), evaluate(Linear(), (x, y), IFGSM)
        assert torch.equal(a.attacks[0].outcomes, b.attacks[0].outcomes)
        assert a.data == b.data

    def test_datasets_loaders_and_arrays(self) -> None:
        x, y = problem()
        self.check_same(TensorDataset(x, y))
        self.check_same(DataLoader(TensorDataset(x, y), batch_size=33))
        self.check_same((x.numpy(), y.numpy()))
        self.check_same((x.numpy(), y.int().numpy()))

    def test_memory_mapped_arrays_are_not_copied(self, tmp_path: Path) -> None:
        x, y = problem()
        numpy.save(tmp_path / "x.npy", x.numpy())
        mapped = numpy.load(tmp_path / "x.npy", mmap_mode="r")
        images, _, _ = read_data((mapped, y))
        assert images.data_ptr() == mapped.ctypes.data
        self.check_same((mapped, y))

    @pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs the memory figures of Linux")
    def test_memory_mapped_arrays_may_be_larger_than_memory(self, tmp_path: Path) -> None:
        numpy.save(tmp_path / "x.npy", numpy.full((256, 3, 128, 128), 0.5, numpy.float32))
        mapped = numpy.load(tmp_path / "x.npy", mmap_mode="r")
        mapped_at = f"{mapped.ctypes.data & ~4095:x}"
        net = nn.Sequential(nn.AvgPool2d(64), nn.Flatten(), nn.Linear(12, 2))
        most = []

        def progress(done: int, total: int) -> None:
            """Record the resident kilobytes of the mapping: the line Rss after its address."""
            lines = Path("/proc/self/smaps").read_text().splitlines()
            start = next(i for i, line in enumerate(lines) if line.startswith(mapped_at))
            most.append(int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1]))

        evaluate(net, (mapped, torch.zeros(256).long()), AttackSpec("fgsm", 0.1), batch_size=32, progress=progress)
        assert len(most) == 8
        assert max(most) < 0.5 * mapped.nbytes / 1024

    def test_half_precision_in_a_loader(self) -> None:
        x, y = problem()
        images, labels, _ = read_data(DataLoader(TensorDataset(x.bfloat16(), y), batch_size=33))
        assert torch.equal(images, x.bfloat16())
        assert torch.equal(labels, y)

    def test_this_packages_data_set(self) -> None:
        data = load("digits").subset(None, 20)
        net = odeadv.models.preact_resnet(8, 4, generator=seeded()).eval()
        assert evaluate(net, data, IFGSM).data == data_digest(data.test_images, data.test_labels)

    def test_bytes_and_floats_are_the_same_data(self) -> None:
        stored = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8, generator=seeded())
        floats = stored.permute(0, 3, 1, 2).float() / 255
        y = Linear().net(floats).argmax(1)
        a, b = evaluate(Linear(), (stored, y), IFGSM), evaluate(Linear(), (floats, y), IFGSM)
        assert a.data == b.data == data_digest(floats.double().mul(255).round() / 255, y)
        assert compare(a, b)["clean"].p_value == 1
        assert data_digest(torch.nextafter(floats, torch.tensor(2.0)), y) != a.data

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([1], r"data: got list, expected a pair \(images, labels\), a Dataset, a DataLoader"),
            (DataLoader([{"x": 1}]), "data: got batches of dict, expected pairs of tensors"),
        ],
    )
    def test_refusals(self, data: object, message: str) -> None:
        with pytest.raises(TypeError, match=f"^{message}"):
            evaluate(Linear(), data, IFGSM)


class TestOutputs:
    @pytest.mark.parametrize(
        ("post", "output"),
        [
            (lambda z: (z, None), 0),
            (lambda z: {"logits": z}, "logits"),
            (lambda z: type("Answer", (), {"logits": z})(), "logits"),
            (lambda z: [z], lambda outputs: outputs[0]),
        ],
    )
    def test_the_logits_are_picked(self, post: Callable[[Tensor], object], output: object) -> None:
        result = evaluate(Linear(post=post), problem(), IFGSM, output=output)
        assert torch.equal(result.attacks[0].outcomes, evaluate(Linear(), problem(), IFGSM).attacks[0].outcomes)
        with pytest.raises(TypeError, match=r"^model: returned .* give output="):
            evaluate(Linear(post=post), problem(), IFGSM)

    def test_refusals(self) -> None:
        with pytest.raises(TypeError, match=r"^output: got 1\.5, expected a key"):
            evaluate(Linear(), problem(), IFGSM, output=1.5)
        with pytest.raises(ValueError, match=r"^output: got 'z', but the model returned dict without it"):
            evaluate(Linear(post=lambda z: {"logits": z}), problem(), IFGSM, output="z")


class TestUnits:
    def test_radii_have_their_own_units(self) -> None:
        specs = [AttackSpec("pgd", 0.5, 0.1, 2, options={"norm": "l2"}), IFGSM]
        result = evaluate(Linear(), problem(), specs)
        assert result.names == ("pgd-2 at 0.5 in L2", "ifgsm-5 at 8/255")
        assert "0.5 in L2" in str(result)
        rows = result.to_dict()["attacks"]
        assert [(row["radius"], row["eps_255"]) for row in rows] == [("0.5 in L2", None), ("8/255", 8.0)]
        assert AttackSpec("autoattack", 12, options={"norm": "L1"}).label == "autoattack at 12 in L1 (worst so far)"


class TestSave:
    @pytest.mark.parametrize("score", ["last", "worst"])
    def test_saved_images_have_the_outcomes(self, tmp_path: Path, score: str) -> None:
        net, (x, y) = trained(), held_out(50)
        specs = [AttackSpec("ifgsm", 0.05, 0.01, 5, score), AttackSpec("pgd", 0.05, 0.01, 5, score)]
        result = evaluate(net, (x, y), specs, save=tmp_path / "images", batch_size=20, resume=tmp_path / "j")
        images = saved_images(tmp_path / "images")
        assert tuple(images) == result.names == tuple(spec.label for spec in specs)
        plain = evaluate(net, (x, y), specs, batch_size=20)
        for attack, expected, attacked in zip(result.attacks, plain.attacks, images.values(), strict=True):
            right = net(attacked).argmax(1) == y
            outcomes = attack.measured[-1] if score == "worst" else attack.outcomes
            assert torch.equal(right & result.clean_outcomes if score == "worst" else right, outcomes)
            assert torch.equal(attack.measured[0], expected.measured[0])
            assert len(attack.measured) == 1
            assert float((attacked - x).abs().max()) <= 0.05 + 1e-7

    def test_an_attack_with_both_scores_has_the_same_names_everywhere(self, tmp_path: Path) -> None:
        specs = [AttackSpec("ifgsm", 0.05, 0.01, 3, score) for score in ("last", "worst")]
        result = evaluate(trained(), held_out(10), specs, save=tmp_path / "images")
        assert tuple(saved_images(tmp_path / "images")) == result.names == Protocol("both", tuple(specs)).names
        assert Evaluation.from_dict(result.to_dict()).names == result.names

    def test_images_that_were_lost_are_made_again(self, tmp_path: Path) -> None:
        net, data, folder = trained(), held_out(30), tmp_path / "images"
        given = {"save": folder, "batch_size": 10, "resume": tmp_path / "j"}
        first = evaluate(net, data, IFGSM, **given)
        whole = saved_images(folder)[IFGSM.label]
        (folder / "batch-00001.safetensors").unlink()
        with pytest.raises(ValueError, match=r"lacks images 10 to 19; resume the evaluation"):
            saved_images(folder)
        again = evaluate(net, data, IFGSM, **given)
        assert torch.equal(saved_images(folder)[IFGSM.label], whole)
        assert torch.equal(again.attacks[0].outcomes, first.attacks[0].outcomes)
        assert again.forward_passes == first.forward_passes
        (folder / "batch-00002.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has 20 of 30 images"):
            saved_images(folder)

    def test_evaluations_are_not_mixed(self, tmp_path: Path) -> None:
        net, (x, y) = trained(), held_out(30)
        evaluate(net, (x, y), IFGSM, save=tmp_path / "a", batch_size=10)
        with pytest.raises(ValueError, match=r"^save: .* holds images of another evaluation"):
            evaluate(net, (x[:10], y[:10]), IFGSM, save=tmp_path / "a")
        evaluate(net, (x.flip(0), y.flip(0)), IFGSM, save=tmp_path / "b", batch_size=10)
        (tmp_path / "b" / "batch-00002.safetensors").replace(tmp_path / "a" / "batch-00002.safetensors")
        with pytest.raises(ValueError, match=r"batch-00002.safetensors belongs to another evaluation"):
            saved_images(tmp_path / "a")

    def test_a_folder_without_images(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"^folder: .* lacks files batch-\*\.safetensors"):
            saved_images(tmp_path)


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("\\documentclass{article}\nmy thesis\n")
    with pytest.raises(
        ValueError, match=r"^resume: .*thesis\.tex is not a journal of an evaluation; give another path"
    ):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), problem(), IFGSM, resume=path)
    assert path.read_text().endswith("thesis\n")


def test_a_journal_of_the_last_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "j"
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    evaluate(net, problem(), IFGSM, resume=path)
    from odeadv.evaluation._journal import _checksum

    header = {**json.loads(path.read_text().splitlines()[0]), "schema": "odeadv.evaluation.journal/2"}
    header.pop("checksum")
    path.write_text(json.dumps({**header, "checksum": _checksum(header)}) + "\n")
    with pytest.raises(ValueError, match=r"^resume: .* is the journal of another version .*journal/2"):
        evaluate(net, problem(), IFGSM, resume=path)


def test_protocols_are_an_attack_or_a_list_too() -> None:
    one = evaluate(Linear(), problem(), IFGSM)
    assert one.protocol == "custom"
    many = evaluate(Linear(), problem(), [IFGSM, AttackSpec("fgsm", 4 / 255)])
    assert torch.equal(one.attacks[0].outcomes, many.attacks[0].outcomes)
    with pytest.raises(TypeError, match=r"^attacks: got \('fgsm',\), expected a tuple of AttackSpec"):
        evaluate(Linear(), problem(), ["fgsm"])
    assert Protocol("p", (IFGSM, IFGSM)).names == ("ifgsm-5 at 8/255 (attack 0)", "ifgsm-5 at 8/255 (attack 1)")
