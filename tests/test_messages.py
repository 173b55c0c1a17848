"""Messages that a user can meet and that the tests of the parts leave out."""

import re

import pytest
import torch
from helpers import conv_net, image_batch, seeded
from torch import nn

from odeadv import attacks, data, evaluate, experiments, models, solve
from odeadv.evaluation import AttackSpec
from odeadv.training import Awp, Layerwise, Mart, Pgd, TrainConfig, TrainResult, train, weights_digest

IMAGES, LABELS = image_batch(torch.float32)
OPTIONS = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 1}


def attacked(model=None, **options):
    return attacks.pgd(model or conv_net(torch.float32), IMAGES, LABELS, **OPTIONS, **options)


class Rounded(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5].round().long()


def scheduled(**schedule):
    digits = data.load("digits").resized(8).subset(32, 8)
    config = TrainConfig(epochs=1, batch_size=16, milestones=(), augment="none", schedule=schedule)
    train(models.preact_resnet(8, 4, generator=seeded()), digits, config)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: attacked(Rounded()), TypeError, "model: returned dtype torch.int64, expected floating logits"),
        (
            lambda: attacked(start=lambda x, generator: torch.full_like(x, torch.nan)),
            ValueError,
            "start: returned NaN, expected pixel values",
        ),
        (
            lambda: attacked(start=torch.full_like(IMAGES, torch.nan)),
            ValueError,
            "start: contains NaN, expected pixel values",
        ),
        (lambda: TrainConfig(stop_above=0), ValueError, "stop_above: got 0.0, expected a number above 0"),
        (lambda: Layerwise(ascent=2, sweeps=2), ValueError, "ascent: got 2 with sweeps=2, expected one of the two"),
        (
            lambda: Layerwise(perturbation="random", sweeps="converge"),
            ValueError,
            "sweeps: got 'converge' with perturbation='random', which lacks a fixed point",
        ),
        (
            lambda: scheduled(name="one-cycle", cycle_momentum=True),
            ValueError,
            "schedule: got cycle_momentum=True, expected False",
        ),
        (
            lambda: AttackSpec("autoattack", (0.1, 0.2)),
            ValueError,
            "eps: got 2 radii, expected one number for 'autoattack'",
        ),
        (
            lambda: AttackSpec("square", 8 / 255, steps=3),
            ValueError,
            "steps: got 3, expected None, because 'square' does not take steps",
        ),
        (lambda: next(experiments.rehearse_all([], 1, None)), ValueError, "rehearse: got 1, expected 2 steps or more"),
        (
            lambda: solve(lambda t, x: -x, torch.ones(2), (0.0, 1.0), dt="adaptive", atol=torch.tensor([1e-3, -1.0])),
            ValueError,
            "atol: got ",
        ),
        (lambda: TrainResult().plot(), ValueError, "epochs: got none, expected at least one to draw"),
    ],
)
def test_wrong_arguments(call, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call()


def test_resilient_propagation_takes_no_weight_decay():
    """Its class in torch lacks the argument."""
    net = models.preact_resnet(8, 4, generator=seeded())
    assert type(TrainConfig(optimizer={"name": "rprop"}).make_optimizer(net)).__name__ == "Rprop"


def test_perturbed_weights_attack_as_often_as_their_base():
    assert (Awp(Pgd(steps=3)).steps, Awp(Mart(steps=4)).steps) == (3, 4)


def test_equal_weights_have_equal_digests():
    net, same, other = (models.preact_resnet(8, 4, generator=seeded(seed)) for seed in (0, 0, 1))
    assert weights_digest(net.state_dict()) == weights_digest(same.state_dict())
    assert weights_digest(net.state_dict()) != weights_digest(other.state_dict())


def test_weights_of_another_program_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match="was not written by odeadv"):
        weights_digest(tmp_path / "last.safetensors")


def test_a_model_that_cannot_be_copied_is_evaluated_as_it_is():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net(torch.float32)

        def forward(self, x):
            return self.net(x)

        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind")

    with pytest.warns(RuntimeWarning, match=r"cannot be copied \(RuntimeError: one of a kind\)"):
        found = evaluate(Kept(), (IMAGES, LABELS), AttackSpec("fgsm", 8 / 255), fold=True)
    assert found.n == len(LABELS)
