"""A step of training does not wait for the device: its checks are read later, and fail as if they were read at once."""

import json

import pytest
import torch
from test_training import LAD, LAD_SM, config, tiny_data, tiny_net
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from odeadv import attacks, solve
from odeadv.models import residual_mlp
from odeadv.splitting import Status
from odeadv.support.deferred import deferring
from odeadv.support.plain import from_dict, identity, key, to_dict
from odeadv.training import (
    Awp,
    Layerwise,
    Mart,
    Natural,
    Penalty,
    Pgd,
    Trades,
    TrainConfig,
    TrainingDiverged,
    Undefended,
    train,
)
from odeadv.training._loop import TrainingRun

pytestmark = pytest.mark.filterwarnings("ignore:eta. .* is for the mean over batches of 8:UserWarning")

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
DEFENCES = (
    Undefended(), LAD, LAD_SM, Penalty(2.0), Layerwise("strang-midpoint", 2.0), Layerwise("lie", 2.0, ascent=2),
    Layerwise("lie", 2.0, sweeps=2), Layerwise("lie", 2.0, perturbation="random"),
    Layerwise("lie", 2.0, perturbation="shuffled"), Layerwise("lie", 2.0, perturbation="input"),
    Layerwise("strang", strength=0.05, warmup=1),
)  # fmt: skip
ATTACKED = (Pgd(steps=2), Trades(steps=2), Trades(steps=1, start="clamped"), Mart(steps=1), Awp(Pgd(steps=1)))
PAIRS = [(Natural(), each) for each in DEFENCES] + [(each, defence) for each in ATTACKED for defence in DEFENCES[1:3]]


class Reads(TorchDispatchMode):
    """Count the operations that a GPU would have to wait for."""

    def __init__(self):
        super().__init__()
        self.counting, self.count = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += self.counting and function.name() in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("objective", "defence"), PAIRS, ids=str)
def test_a_step_reads_nothing_from_the_device(objective, defence, monkeypatch):
    reads, step = Reads(), TrainingRun._checked_step

    def counted(self, *arguments):
        reads.counting = True
        step(self, *arguments)
        reads.counting = False

    monkeypatch.setattr(TrainingRun, "_checked_step", counted)
    with reads:
        train(
            tiny_net(),
            tiny_data(),
            config(objective=objective, defence=defence, epochs=1, milestones=()),
            progress=False,
        )
        assert reads.count == 0
        reads.counting = True
        assert bool(torch.ones(1)) and reads.count == 1  # the counter works  # noqa: PT018


def bad(where, value):
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 3
    (images if where == "images" else labels)[19] = value
    return TensorDataset(images, labels)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (tiny_data, {"defence": LAD, "lr": 1e30}, "epoch 1, step 2: .*lower lr"),
        (tiny_data, {"defence": LAD_SM, "stop_above": 1.15, "ema": 0.9}, r"the loss is 1\.\d.* is largest at layer \d"),
        (tiny_data, {"objective": Pgd(steps=1), "lr": 1e30, "optimizer": {"name": "adamw"}}, "step 2: "),
        (lambda: bad("images", torch.nan), {"augment": "none"}, "data: got inputs that are NaN .* epoch 1, step 2"),
        (lambda: bad("images", 2.0), {"augment": "none", "objective": Pgd(steps=1)}, r"values in \[.*, 2\], exp"),
        (lambda: bad("labels", 7), {"augment": "none", "defence": LAD}, "labels: got classes 0 to 7, exp"),
        (lambda: bad("labels", 7), {"augment": "none", "objective": Trades(steps=1)}, "labels: got 7, exp"),
    ],
)  # fmt: skip
def test_what_is_read_later_fails_as_if_it_were_read_at_once(data, changes, message):
    found = []
    for often in (1, 50):
        net = tiny_net()
        with pytest.raises((TrainingDiverged, ValueError), match=message) as raised:
            train(net, data(), config(**changes, check_every=often, epochs=4), progress=False)
        found.append((str(raised.value), net.state_dict()))
    for said, weights in found[1:]:
        assert said == found[0][0]
        for one, other in zip(weights.values(), found[0][1].values(), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_fault_that_does_not_come_back_stops_the_run(monkeypatch):
    steps = []

    def faulty(self, step):
        steps.append(1)
        passed = step.defended(step.images)
        return type(passed)(passed.loss + (torch.inf if len(steps) == 2 else 0.0), passed.logits)

    monkeypatch.setattr(Natural, "__call__", faulty)
    with pytest.raises(TrainingDiverged, match="step 2: a state or the loss was not finite, but was finite when"):
        train(tiny_net(), tiny_data(), config(), progress=False)


def test_checks_are_kept_for_later_inside_deferring_only():
    net = tiny_net()
    images, labels = torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 1])
    list(net.parameters())[-2].data.fill_(torch.inf)
    with deferring() as kept:
        assert solve(net.field(images, labels), throw=False).status is Status.UNKNOWN
        attacks.fgsm(net, images, labels, eps=0.1)
    assert not all(bool(check) for check in kept)
    with pytest.raises(ValueError, match="not finite"):
        attacks.fgsm(net, images, labels, eps=0.1)
    assert solve(net.field(images, labels), throw=False).status is Status.NON_FINITE


class TestOptions:
    """Options that save a GPU's time. They change results, so their defaults are off."""

    def test_options_are_recorded_and_leave_the_keys_of_other_runs_alone(self):
        before = key(config())
        for option in ({"draws": "device"}, {"fold": True}, {"cudnn_benchmark": True}):
            assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config(**option))))) == config(**option)
            assert key(config(**option)) != before
        assert not {"draws", "fold", "cudnn_benchmark"} & set(identity(config()))

    def test_attacks_on_the_folded_network_follow_the_weights(self, monkeypatch):
        seen, ifgsm = [], attacks.ifgsm

        def compared(attacked, images, labels, **options):
            found = ifgsm(attacked, images, labels, **options)
            seen.append((found, ifgsm(net, images, labels, **options)))
            assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in attacked.modules())
            return found

        monkeypatch.setattr(attacks, "ifgsm", compared)
        net = tiny_net()
        modes = [part.training for part in net.train().modules()]
        train(net, tiny_data(), config(objective=Pgd(steps=2), fold=True), progress=False)
        assert len(seen) == 4
        for found, expected in seen:
            assert (found != expected).double().mean() < 0.01  # a gradient near zero may change its sign
        assert [part.training for part in net.modules()] == modes

    @pytest.mark.parametrize(
        ("changes", "net", "message"),
        [
            ({"objective": Pgd(steps=1, mode="train")}, tiny_net, "fold: got a pass in training mode"),
            ({}, lambda: residual_mlp(2, 4, num_classes=3, image_size=8), "fold: got a network without a batch norm"),
            # torch 2.4 cannot trace the noise.
            ({}, lambda: tiny_net(noise=1.0).noisy_inference(), "fold: the (logits of the folded|model's)"),
        ],
    )
    def test_a_network_that_cannot_be_folded_is_refused(self, changes, net, message):
        with pytest.raises(ValueError, match=message):
            train(net(), tiny_data(), config(fold=True, **changes), progress=False)

    @pytest.mark.parametrize("before", [False, True])
    def test_cudnn_tries_algorithms_during_the_run_only(self, before, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        seen = []

        def on_step(*_):
            seen.append(torch.backends.cudnn.benchmark)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(tiny_net(), tiny_data(), config(cudnn_benchmark=True), on_step=on_step, progress=False)
        assert (seen, torch.backends.cudnn.benchmark) == ([True, True], before)
