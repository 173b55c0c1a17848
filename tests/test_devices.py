"""Nothing is left on the CPU when states, networks and images are on another device.

No GPU is needed: under torch's fake tensors operations have devices and shapes but no values, and one that mixes two
devices raises as it does on a GPU. Only what reads values is replaced (every number read is 1, every condition true),
as are autograd's engine and the random states of devices, which want a driver.
"""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import odeadv
import odeadv.audit
from odeadv import attacks, data, diagnostics, models
from odeadv.support import digests
from odeadv.training._defences import Layerwise, Undefended
from odeadv.training._objectives import Natural, Pgd, Trades
from odeadv.training._step import Draws, StepModule

fake = pytest.importorskip("torch._subclasses.fake_tensor", reason="no fake tensors in this version of torch")
if torch.__version__ < (2, 13):
    pytest.skip("torch 2.4 aborts: its fake tensors of a GPU want a driver", allow_module_level=True)

aten = torch.ops.aten
GPU = torch.device("cuda", 0)


class Readable(TorchDispatchMode):
    """Give fake tensors values: every number is 1, every condition is true."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            return self._places(args[0], args[0].dim())
        if func is aten.index.Tensor:
            mask = [None if i is None or i.dtype != torch.bool else self._places(i, 1)[:, 0] for i in args[1]]
            args = (args[0], [i if m is None else m for i, m in zip(args[1], mask, strict=True)])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _places(condition, dimensions):
        return torch.zeros(condition.numel(), dimensions, dtype=torch.long, device=condition.device)


class Copies(TorchDispatchMode):
    """Counts the copies between devices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is aten._to_copy.default and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


def fake_grad(outputs, inputs, *args, **kwargs):
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    return tuple(torch.empty_like(value) for value in inputs)


@pytest.fixture
def gpu(monkeypatch):
    """Imitate a machine with a GPU."""
    monkeypatch.setattr(torch.autograd, "grad", fake_grad)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda *a: None)
    monkeypatch.setattr(digests, "add_tensor", lambda *a: None)  # digests read the values
    monkeypatch.setattr(digests, "are_255ths", lambda *images: False)
    for module in [module for name, module in sys.modules.items() if name.startswith("odeadv.")]:
        for check in ("check_images", "check_labels", "check_range"):  # and so do checks of a range
            if hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *a, **k: None)
    try:
        with fake.FakeTensorMode(), Readable():
            torch.zeros(1, device=GPU)
            yield
    except (AssertionError, RuntimeError) as error:
        if "CUDA" in str(error) and "device" not in str(error):
            pytest.skip(f"torch cannot imitate a GPU here: {error}")
        raise


def net_there(**options):
    net = models.preact_resnet(depth=14, width=2, num_classes=10, **options)
    for part in net.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = None if value is None else torch.nn.Parameter(torch.empty(value.shape, device=GPU))
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else torch.zeros(value.shape, dtype=value.dtype, device=GPU)
    return net


def images_there(n=4):
    return torch.rand(n, 3, 32, 32, device=GPU), torch.zeros(n, dtype=torch.long, device=GPU)


def test_a_tensor_that_is_left_behind_is_noticed(gpu):
    """Check that the tests below can fail."""
    behind = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        odeadv.solve(lambda t, x: behind * x, torch.zeros(3, device=GPU), (0.0, 1.0), dt=0.5)
    net = net_there()
    net.head.register_forward_hook(lambda part, given, logits: logits + torch.ones(10))
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        attacks.ifgsm(net, *images_there(), eps=0.1, alpha=0.1, steps=1)


@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-midpoint", "strang-symmetric", "blanes-moan4"])
@pytest.mark.parametrize("save_at", [None, "steps", [0.1, 0.7]])
def test_solves(gpu, scheme, save_at):
    x0 = torch.zeros(3, device=GPU)
    field = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.1)
    sol = odeadv.solve(field, x0, (0.0, 1.0), dt=0.25, scheme=scheme, substep="rk4", save_at=save_at)
    assert {sol.xs.device, sol.ts.device, sol.loss.device, sol.costate(0.3).device} == {GPU}
    split = odeadv.SplitField(a=lambda t, x: -x, b=lambda t, x: t * x)
    assert odeadv.solve(split, x0, (0.0, 1.0), dt=0.25, scheme=scheme, substep="rk4").xs.device == GPU


@pytest.mark.parametrize("options", [{}, {"damping": "lambda-damp"}, {"noise": 0.1}, {"damping": "damp", "noise": 0.1}])
@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-midpoint"])
def test_networks(gpu, options, scheme):
    net = net_there(**options)
    images, labels = images_there()
    assert net(images).device == GPU
    assert odeadv.solve(net.field(images, labels, 50.0), scheme=scheme).loss.device == GPU


@pytest.mark.parametrize(
    "defence",
    [
        Undefended(),
        Layerwise("lie"),
        Layerwise("strang", perturbation="random"),
        Layerwise("lie", perturbation="shuffled"),
        Layerwise("lie", perturbation="input"),
        Layerwise("strang", ascent=2),
    ],
)
@pytest.mark.parametrize("objective", [Natural(), Pgd(steps=2), Trades(steps=2)])
def test_training_steps(gpu, objective, defence):
    images, labels = images_there()
    loss, logits = StepModule(net_there(), objective, defence)(images, labels, Draws(0, 0, slice(0, 4), 8), 0.5)
    assert (loss.device, logits.device) == (GPU, GPU)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("fgsm", {}),
        ("ifgsm", {"alpha": 0.1, "steps": 2, "momentum": 0.9}),
        ("pgd", {"alpha": 0.1, "steps": 2, "restarts": 2, "loss": "margin"}),
        ("pgd", {"alpha": 0.1, "steps": 2, "norm": "l2"}),
        ("apgd", {"steps": 10}),
        ("apgd", {"steps": 10, "norm": "l2"}),
        ("square", {"queries": 4}),
        ("square", {"queries": 4, "norm": "l2"}),
    ],
)
def test_attacks(gpu, attack, options):
    images, labels = images_there()
    random = {} if attack in ("fgsm", "ifgsm") else {"generator": torch.Generator().manual_seed(0)}
    assert getattr(attacks, attack)(net_there(), images, labels, eps=0.1, **options, **random).device == GPU


@pytest.mark.parametrize("there", [True, False])
def test_evaluations(gpu, there):
    images, labels = images_there()
    if not there:  # data may stay on the CPU: batches are moved
        images, labels = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    result = odeadv.evaluate(net_there(), (images, labels), "table2", stochastic=True)
    assert result.clean_outcomes.device.type == "cpu"
    assert result.gradient_evaluations == 4 * 20  # everything is right, and all radii go together


def test_diagnostics(gpu):
    field = net_there().field(*images_there(), 50.0)
    assert diagnostics.perturbation(field).relative
    assert diagnostics.second_order(field).ts
    assert diagnostics.contraction(field).factor
    assert diagnostics.growth(field).ts
    assert diagnostics.energy(field).schemes


def test_draws_made_on_the_device(gpu, monkeypatch):
    class There(torch.Generator):
        """A generator that claims to be on the GPU."""

        device = GPU

        def __new__(cls, device="cpu"):
            return super().__new__(cls)

        def manual_seed(self, seed):
            super().manual_seed(seed)
            return self

    monkeypatch.setattr(torch, "Generator", There)
    draws = Draws(0, 0, slice(0, 2), 4, device=GPU)
    like = torch.zeros(2, 3, device=GPU)
    with Copies() as copies:
        assert {draws.uniform(like).device, draws.normal(like).device, draws.permutation(2, GPU).device} == {GPU}
    assert not copies.count


def test_batches(gpu):
    images, labels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.zeros(10, dtype=torch.long)
    generator = torch.Generator()
    for augment in (False, True):
        batches = data.Batches(
            images, labels, batch_size=4, shuffle=True, augment=augment, generator=generator, device=GPU
        )
        assert [batch[0].device for batch in batches] == [GPU] * 3
