"""The audit: an honest network passes, and each model built to break attacks is caught."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Small, held_out, trained
from torch import Tensor, nn
from torch.nn import functional

from odeadv.audit import Audit, audit
from odeadv.evaluation import AttackSpec, Protocol, evaluate

EPS = 0.1
QUICK = {"steps": 10, "more_steps": 40, "restarts": 2, "queries": 150}
N = 80


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(trained())  # a copy, because tests share the network


class Rounded(Wrapped):
    """Inputs rounded to 8 levels: the gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net((8 * x).round() / 8)


class Saturated(Wrapped):
    """Softmax saturates in float32: cross-entropy has gradients of exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


class NotANumber(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, logits)


class DropoutOn(Wrapped):
    """The forward pass puts the dropout back into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        self.drop.train()
        return self.net(self.drop(x))


class TooMany(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(self.net(x), (0, 3), value=-100.0)


class TooFew(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :7]


class Learning(Wrapped):
    """A model with a buffer that follows the inputs, in eval mode too."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(), 0.1)
        return self.net(x + 0.01 * self.mean)


class Late(Wrapped):
    """A model that changes its answer at the twelfth call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) if self.calls < 12 else self.net(x.flip(3))


class BatchStatistics(Wrapped):
    """A model that subtracts the mean of the batch from its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.2 * x.mean(dim=(0, 1), keepdim=True))


class ByRow(Wrapped):
    """A model whose answer depends on the parity of the row in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (torch.arange(len(x)) % 2)[:, None] * torch.eye(10)[3]


class ByBatchSize(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + 0.01 * (len(x) > 2))


class WhenDifferentiated(Wrapped):
    """A model that changes a buffer only if gradients are on."""

    moved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.moved.add_(1)
        return self.net(x)


class NoisyGradients(Wrapped):
    """A model that adds noise only if the images require a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x)) if x.requires_grad else self.net(x)


class OtherGradients(Wrapped):
    """A model that is another fixed function if the images require a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(3)) if x.requires_grad else self.net(x)


class Private(Wrapped):
    """A model that keeps the batch sizes in a private list."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append(len(x))
        return self.net(x)


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(dim=1)


def run(model: nn.Module, **changes: object) -> Audit:
    return audit(
        model, **{"data": held_out(N), "eps": EPS, "generator": torch.Generator().manual_seed(0), **QUICK, **changes}
    )


@functools.cache
def audited(make: Callable[[], nn.Module]) -> Audit:
    """Return the audit of a new model, once for all tests. It must not warn, because its lines say everything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(make(), num_classes=10)


@pytest.fixture(scope="module")
def masked() -> Audit:
    """Return the audit of a network with gradients of zero, next to one whose examples transfer to it."""
    return run(Rounded(), surrogate=trained())


@pytest.fixture(scope="session")
def honest() -> Audit:
    """Return the audit of a network, next to one with weights that are a little different."""
    surrogate, generator = copy.deepcopy(trained()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in surrogate.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    return run(trained(), surrogate=surrogate)


@pytest.mark.parametrize(
    ("surrogate", "why"),
    [
        (lambda: trained(), "the surrogate is the model itself"),
        (lambda: Small().eval(), "as good as guessing"),
        (lambda: Rounded(), "breaks nothing"),  # it is right, and has no gradient
    ],
)
def test_a_surrogate_that_shows_nothing_is_no_pass(surrogate: Callable[[], nn.Module], why: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        checks = {check.name: check for check in run(trained(), surrogate=surrogate()).checks}
    transfer = checks["transfer does not beat gradients"]
    assert transfer.status == "not applicable"
    assert re.search(why, transfer.found)


def test_no_sentence_has_a_number_that_is_not_one(masked: Audit) -> None:
    assert not [check for check in masked.checks if "nan" in f"{check.found} {check.name}".split()]
    assert {check.name: check.found for check in masked.checks}["local linearity"] == (
        "the gradient of the margin is zero for every image"
    )


def test_an_honest_network_passes_every_line(honest: Audit) -> None:
    assert [(check.name, check.found) for check in honest.checks if check.status != "pass"] == []
    assert honest.passed
    assert len(honest.checks) == 18


def test_figures_of_the_honest_network(honest: Audit) -> None:
    radii, accuracies = zip(*honest.against_eps, strict=True)
    assert radii[0] == 0
    assert radii[-1] == 1
    assert accuracies == tuple(sorted(accuracies, reverse=True))
    assert accuracies[-1] == 0 < accuracies[radii.index(EPS)] < accuracies[0]
    expected = evaluate(
        trained(), held_out(N), Protocol("p", tuple(AttackSpec("ifgsm", EPS, EPS / 4, k) for k in (1, 10, 40)))
    )
    curve = dict(honest.against_steps)
    assert [curve[k] for k in (1, 10, 40)] == [attack.worst_so_far_accuracy for attack in expected.attacks]
    assert honest["iterative beats single step"].figures["ifgsm"] == expected.attacks[1].robust_accuracy
    assert honest["local linearity"].figures["ratio_at_eps_over_100"] == pytest.approx(1, abs=0.02)


def test_the_headline_is_the_accuracy_under_everything_tried(honest: Audit) -> None:
    clean = (trained()(held_out(N)[0]).argmax(1) == held_out(N)[1]).float().mean().item()
    assert honest.clean_accuracy == pytest.approx(clean)
    lowest = dict(honest.against_steps)[40]
    assert honest.robust_accuracy is not None
    assert 0 < honest.robust_accuracy <= lowest
    for name in ("another loss", "gradient-free does not beat gradients", "transfer does not beat gradients"):
        broken = honest[name].figures.get("broken_by_it_only", honest[name].figures.get("broken_by_other_losses_only"))
        assert honest.robust_accuracy <= dict(honest.against_steps)[10] - broken / N
    low, high = honest.to_dict()["robust_accuracy_interval"]
    assert low < honest.robust_accuracy < high
    line = f"accuracy under everything tried: {100 * honest.robust_accuracy:.1f} % (95 % interval {100 * low:.1f} to"
    assert line in repr(honest)
    assert line in honest.to_markdown()


def test_the_headline_counts_what_only_a_weak_attack_breaks(masked: Audit) -> None:
    """Square and transfer break a masked network whose gradients are zero."""
    found = masked
    assert found.robust_accuracy is not None
    assert found.robust_accuracy < dict(found.against_steps)[40]
    broken = sum(
        found[f"{name} does not beat gradients"].figures["broken_by_it_only"] for name in ("gradient-free", "transfer")
    )
    resistant = round(N * dict(found.against_steps)[40])
    assert resistant - broken <= N * found.robust_accuracy <= resistant - broken / 2


@pytest.mark.parametrize("make", [Noisy, NotANumber, TooFew])
def test_no_headline_without_a_figure_that_can_be_believed(make: Callable[[], nn.Module]) -> None:
    found = audited(make)
    assert found.robust_accuracy is None
    assert "accuracy under everything tried: unknown" in repr(found)


def test_a_model_that_guesses_fails() -> None:
    images, labels = held_out(60)
    found = audit(trained(), (images, (labels + 5) % 10), eps=EPS, steps=1, more_steps=2, restarts=1, queries=1)
    line = found["better than guessing"]
    assert line.status == "fail"
    assert line.figures["clean"] <= line.figures["guessing"] == 0.1


def test_noise_is_not_counted_as_an_attack() -> None:
    """At a radius of 1e-6 a noisy network has the accuracy that it has without an attack."""
    found = run(Noisy(), eps=1e-6, steps=20)
    images, labels = held_out(N)
    with torch.no_grad():
        clean = torch.stack([(Noisy()(images).argmax(1) == labels).float().mean() for _ in range(10)]).mean().item()
    accuracies = [accuracy for _, accuracy in found.against_steps]
    assert max(abs(accuracy - clean) for accuracy in accuracies) < 0.12  # 2.5 standard errors
    for name in ("another loss", "restarts", "gradient-free does not beat gradients", "planted examples are found"):
        assert found[name].status == "not applicable"
        assert "random" in found[name].found


def test_a_loader_gives_the_lines_of_its_tensors() -> None:
    images, labels = held_out(30)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=7)
    few = {"steps": 2, "more_steps": 4, "restarts": 2, "queries": 20}
    expected, found = (audit(trained(), data, eps=EPS, **few) for data in ((images, labels), loader))
    assert repr(found) == repr(expected)  # the strides of one channel differ, and so the last bits of figures


class TestL2:
    EPS = 0.3

    def test_an_honest_network_passes_every_line(self) -> None:
        found = run(trained(), eps=self.EPS, norm="l2")
        assert [(check.name, check.found) for check in found.checks if check.status == "fail"] == []
        radii, accuracies = zip(*found.against_eps, strict=True)
        assert radii[-1] == pytest.approx(held_out(N)[0][0].numel() ** 0.5)
        assert accuracies[-1] == 0
        assert found.robust_accuracy is not None
        assert 0 < found.robust_accuracy <= dict(found.against_steps)[40] < found.clean_accuracy
        assert found.to_dict()["eps_255"] is None
        assert "eps = 0.3 in L2" in repr(found)
        assert "| eps in L2 | accuracy, % |" in found.to_markdown()

    def test_a_masked_network_is_caught(self) -> None:
        failed = {check.name for check in run(Rounded(), eps=self.EPS, norm="l2").failures}
        assert {"gradients not zero", "accuracy falls to 0 with eps"} <= failed


class StraightThrough(Wrapped):
    """A model that rounds its inputs and passes the gradient on unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + ((8 * x).round() / 8 - x).detach())


class Steep(Wrapped):
    """A function of the single image whose steps turn rounding into differences."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z + 0.5 * torch.sin(2e3 * z)


def test_amplified_rounding_is_not_called_a_dependence_on_the_batch() -> None:
    line = run(Steep())["same answer in any batch"]
    assert line.figures["largest_difference"] > 0
    assert line.figures["is_rounding"]
    assert line.status == "pass"
    assert "steep" in line.found
    for make in (BatchStatistics, ByRow, ByBatchSize):
        line = audited(make)["same answer in any batch"]
        assert (line.status, line.figures["is_rounding"]) == ("fail", False)


class OneLogit(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :1]


def test_a_straight_through_gradient_is_called_by_its_name() -> None:
    found = run(StraightThrough())["local linearity"]
    assert found.status == "fail"
    assert found.figures["may_be_straight_through"]
    assert "straight-through" in found.found
    assert "straight-through" in found.meaning
    other = audited(OtherGradients)["local linearity"]
    assert not other.figures["may_be_straight_through"]
    assert "straight-through" not in other.found


def test_one_logit_is_named() -> None:
    images, labels = held_out(N)
    found = audit(OneLogit(), (images, 0 * labels), eps=EPS, **QUICK)
    assert "torch.cat([-z, z], 1)" in found["number of classes"].found
    assert found["restarts"].status == "not applicable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda z: z[:, 0],
            r"shape (2,), expected (2, classes); if they are the logits z of class 1, return torch.stack(",
        ),
        (lambda z: z[:, :, None, None], "shape (2, 10, 1, 1), expected (2, classes); a model with one answer per pos"),
        (lambda z: (z, z), "TypeError: model: returned tuple, expected a tensor of logits"),
    ],
)
def test_answers_of_another_shape_are_named(change: Callable[[Tensor], object], message: str) -> None:
    class Other(Wrapped):
        def forward(self, x: Tensor) -> object:
            return change(self.net(x))

    found = run(Other())
    assert message in found["finite logits"].found
    assert [check.status for check in found.checks] == ["fail"] + ["not applicable"] * 17


class InPlace(Wrapped):
    """A model that normalises its images in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(1.5))


CAUGHT: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (
        Rounded,
        [
            "gradients not zero",
            "local linearity",
            "gradient-free does not beat gradients",
            "planted examples are found",
            "accuracy falls to 0 with eps",
        ],
    ),
    (Saturated, ["gradients not zero", "another loss"]),
    (Noisy, ["same answer twice"]),
    (NotANumber, ["finite logits"]),
    (InPlace, ["finite logits"]),
    (DropoutOn, ["same answer twice"]),
    (TooMany, ["number of classes"]),
    (TooFew, ["number of classes"]),
    (Learning, ["state left alone"]),
    (Late, ["state left alone"]),
    (BatchStatistics, ["same answer in any batch"]),
    (ByRow, ["same answer in any batch"]),
    (ByBatchSize, ["same answer in any batch"]),
    (WhenDifferentiated, ["state left alone"]),
    (NoisyGradients, ["same answer twice"]),
    (OtherGradients, ["same answer twice"]),
    (Private, ["state left alone"]),
    (Probabilities, ["logits, not probabilities"]),
]


@pytest.mark.parametrize(("make", "lines"), CAUGHT, ids=lambda value: getattr(value, "__name__", None))
def test_models_that_break_attacks_are_caught(make: Callable[[], nn.Module], lines: list[str]) -> None:
    found = audited(make)
    failed = {check.name for check in found.failures}
    assert set(lines) <= failed
    assert not found.passed
    printed = " ".join(repr(found).split())  # lines are wrapped
    assert all(" ".join(check.meaning.split()) in printed for check in found.failures)
    assert max(map(len, repr(found).splitlines())) <= 120


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (
        Noisy,
        r"model: two forward passes .* differ by .*averaged\(model, passes=\.\.\.\), or give stochastic",
    ),
    (DropoutOn, r"model: two forward passes .* \(drop in training mode: dropout left on\?\)"),
    (NotANumber, "model: returned logits that are not finite"),
    (InPlace, "model: writes to its images"),
    (TooFew, r"labels: got 9, expected class indices < 7"),
    (TooMany, r"model: returned 13 logits per image, expected num_classes, 10"),
    (Learning, "model: its forward changes mean in eval mode"),
    (BatchStatistics, "model: the logits of an image depend on the other images in its batch.* running statistics"),
    (ByRow, "model: the logits of an image depend on the other images in its batch"),
    (ByBatchSize, "model: the logits of an image depend on the other images in its batch"),
    (WhenDifferentiated, "model: its forward changes moved in eval mode"),
    (NoisyGradients, "model: two forward passes on the same images differ by"),
    (OtherGradients, "model: its logits with gradients differ from those without"),
    (Late, r"model: its logits of the first images have changed during the evaluation.*changed by a forward: calls"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_evaluate_refuses(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate(make(), held_out(40), "table1", num_classes=10)


def test_what_a_forward_changes_is_in_the_notes() -> None:
    (note,) = evaluate(Private(), held_out(20), Protocol("p", (AttackSpec("fgsm", EPS),))).notes
    assert note.startswith("a forward pass changes _seen of the model")


@pytest.mark.parametrize("run_it", [evaluate, audit])
def test_images_of_a_dtype_that_the_model_does_not_take_are_refused(run_it: Callable[..., object]) -> None:
    options = {"generator": torch.Generator()} if run_it is audit else {}
    message = r"^images: got torch\.float32, but the model has torch\.float64 .*expected images\.to\(torch\.float64\)"
    with pytest.raises(ValueError, match=message):
        run_it(copy.deepcopy(trained()).double(), held_out(20), **options)


def test_a_random_model_is_evaluated_by_single_draws_on_request(tmp_path: Path) -> None:
    protocol = Protocol("p", (AttackSpec("ifgsm", EPS, EPS / 4, 3),))
    first = evaluate(Noisy(), held_out(40), protocol, stochastic=True, seed=1, batch_size=16)
    torch.manual_seed(5)
    before, path = torch.get_rng_state(), tmp_path / "journal"
    evaluate(Noisy(), held_out(40), protocol, stochastic=True, seed=1, batch_size=16, resume=path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))  # all but the first batch again
    second = evaluate(Noisy(), held_out(40), protocol, stochastic=True, seed=1, batch_size=16, resume=path)
    assert torch.equal(first.attacks[0].outcomes, second.attacks[0].outcomes)
    assert torch.equal(torch.get_rng_state(), before)


def test_leaves_model_and_random_state_alone() -> None:
    model = Learning().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    run(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_is_reproducible_from_its_generator(honest: Audit) -> None:
    first, second = audited(Noisy), run(Noisy(), num_classes=10)
    assert first.to_dict() == second.to_dict()


def test_a_transfer_that_beats_gradients_is_caught(masked: Audit) -> None:
    assert masked["transfer does not beat gradients"].status == "fail"


def test_write(honest: Audit, tmp_path: Path) -> None:
    honest.write(tmp_path / "report", "A small network.")
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"audit.json", "audit.md", "accuracy_against_eps.png", "accuracy_against_steps.png"}
    data = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert data == json.loads(json.dumps(honest.to_dict() | {"about": "A small network."}))
    assert data["schema"] == "odeadv.audit/1"
    page = (tmp_path / "report" / "audit.md").read_text()
    assert page.startswith("# Audit of a robustness evaluation\n\nA small network.\n\n18 checks passed")
    assert all(check.name in page and check.meaning in page for check in honest.checks)
    assert "18 checks passed, 0 failed, 0 not applicable; 80 examples" in page


def test_write_of_an_unusable_model(tmp_path: Path) -> None:
    found = run(NotANumber())
    found.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "audit.md"}
    assert [check.status for check in found.checks] == ["fail"] + ["not applicable"] * 17


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps: got 0, expected a finite number, above 0, at most 0.5"),
        ({"generator": 0}, TypeError, "generator: got 0, expected e.g. torch.Generator"),
        ({"steps": 0}, ValueError, "steps: got 0, expected an integer, at least 1"),
        ({"data": 3}, TypeError, r"data: got int, expected a pair \(images, labels\), a Dataset, a DataLoader"),
        ({"norm": "l1"}, ValueError, "norm: got 'l1', expected one of 'linf', 'l2'"),
        ({"eps": 0.6}, ValueError, "eps: got 0.6, expected a finite number, above 0, at most 0.5"),
        ({"num_classes": 2.0}, TypeError, "num_classes: got 2.0, expected an integer, at least 1"),
        ({"surrogate": len}, TypeError, "surrogate: got builtin_function_or_method"),
        ({"progress": 3}, TypeError, "progress: got 3, expected a function of one string"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        run(trained(), **change)
