"""Models by name and as plain values, the interface of every network, and losses other than cross-entropy."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odeadv
from odeadv import models
from odeadv.models import Network, build, ode_net, preact_resnet, refine

MADE = {
    "plain": lambda: preact_resnet(8, 4, 5, mean=(0.5,), std=(0.25,)),
    "damped": lambda: preact_resnet(14, 4, damping="lambda-damp", noise=0.2, noise_kind="relative"),
    "ode": lambda: ode_net(4, 3, stages=2, steps=2, t_end=0.5),
    "dopri5": lambda: ode_net(4, substep=odeadv.TorchDiffEq("dopri5", rtol=1e-3, atol=1e-3)),
    "named": lambda: ode_net(4, substep="torchdiffeq:rk4"),
    "refined": lambda: refine(preact_resnet(14, 4, damping="damp"), 3, substep="midpoint"),
}


@pytest.mark.parametrize("name", MADE)
def test_config_makes_an_equal_architecture(name):
    net = MADE[name]()
    config = json.loads(json.dumps(net.config))
    assert config == net.config
    again = build(**config, generator=torch.Generator().manual_seed(0))
    again.load_state_dict(net.state_dict())
    assert repr(again) == repr(net)
    assert again.config == config
    images = torch.rand(3, net.stem.mean.numel() if name == "plain" else 3, 16, 16)
    assert torch.equal(again.eval()(images), net.eval()(images))
    net.config.clear()  # a copy
    assert net.config == config
    twin = build(**config, generator=torch.Generator().manual_seed(0))
    again = build(**config, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))


def test_names_and_what_is_wrong_with_others():
    assert {"preact_resnet", "ode_net", "residual_mlp", "resnet20", "resnet56", "refined"} == set(models.names())
    assert build("resnet20", num_classes=3).config["depth"] == 20
    with pytest.raises(
        ValueError, match=r"^model: got 'preactresnet', expected one of .*; did you mean 'preact_resnet'"
    ):
        build("preactresnet")
    with pytest.raises(
        TypeError, match=r"^model: got 'widht' for 'ode_net', expected its arguments .*; did you mean 'width'\?"
    ):
        build("ode_net", widht=4)
    with pytest.raises(TypeError, match=r"^model: got no 'net' for 'refined', which needs one"):
        build("refined", k=2)
    with pytest.raises(ValueError, match=r"^depth: got 18"):
        build("preact_resnet", depth=18)


@pytest.mark.parametrize("name", MADE)
def test_every_model_is_a_network(name):
    """A `Network` returns logits of its `num_classes`, and a solve with its `solve_options` returns the same logits."""
    net = MADE[name]()
    assert isinstance(net, Network)
    assert not isinstance(nn.Linear(2, 2), Network)
    net.eval()
    images = torch.rand(2, net.stem.mean.numel() if name == "plain" else 3, 16, 16)
    labels = torch.tensor([0, 2])
    logits = net(images)
    assert logits.shape == (2, net.num_classes)
    sol = odeadv.solve(net.field(images, labels), **net.solve_options)
    assert torch.equal(sol.output, logits)
    driven = odeadv.solve(net.field(images, labels, eta=1.0), scheme="lie", **net.solve_options)
    assert not torch.equal(driven.output, logits)


@pytest.mark.parametrize("make", [lambda: preact_resnet(8, 4), lambda: ode_net(4), lambda: refine(ode_net(4), 2)])
def test_another_loss_drives_and_is_reported(make):
    """The costate belongs to the given loss: with L = c logits . w it is c times as large."""
    net = make().double().eval()
    images, labels = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    weight = torch.randn(3, 10, dtype=torch.float64)

    def loss(scale: float) -> object:
        def value(logits: Tensor) -> Tensor:
            return scale * (logits * weight).sum()

        return value

    options = {"scheme": "lie", **net.solve_options}
    one = odeadv.solve(net.field(images, labels, 1e-2, loss=loss(2.0)), **options)
    two = odeadv.solve(net.field(images, labels, 2e-2, loss=loss(1.0)), **options)
    assert torch.allclose(one.output, two.output, rtol=1e-11)
    assert torch.allclose(one.loss, 2.0 * (one.output * weight).sum())
    with torch.no_grad():
        assert (one.output * weight).sum() > (net(images) * weight).sum()
    default = odeadv.solve(net.field(images, labels, 1e-2), **options)
    same = odeadv.solve(net.field(images, labels, 1e-2, loss=lambda logits: F.cross_entropy(logits, labels)), **options)
    assert torch.equal(default.output, same.output)
    assert not torch.allclose(default.output, one.output)
    with pytest.raises(TypeError, match=r"^loss: got float, expected a callable"):
        net.field(images, labels, loss=1.0)
    ignored = odeadv.solve(net.field(images, None, 1e-2, loss=loss(2.0)), **options)
    assert torch.equal(ignored.output, one.output)
    with pytest.raises(ValueError, match=r"^loss: returned shape \(3, 10\), expected a scalar"):
        odeadv.solve(net.field(images, labels, 1.0, loss=lambda logits: logits), **options)


def test_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert "### What about a U-Net?\n" in page  # messages name it
    scope: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(program, scope)
    assert scope["logits"].shape == scope["finer"].shape == (4, 10)
    assert scope["again"].config == scope["net"].config
