"""Continuous depth: OdeNet against torchdiffeq and by hand, and residual networks on finer steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import measured_order, seeded, small_resnet
from torch import Tensor, nn
from torchdiffeq import odeint

import odeadv
from odeadv.models import OdeNet, PreActResNet, ode_net, refine

ETA = 5.0
LABELS = torch.tensor([0, 1, 2, 3, 6])


def make(**kwargs: object) -> tuple[OdeNet, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = ode_net(4, 7, generator=generator, **kwargs).double()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return net, torch.rand(5, 3, 12, 12, generator=generator, dtype=torch.float64)


def resnet(noise: float = 0.0) -> tuple[PreActResNet, Tensor]:
    net, images, _ = small_resnet(statistics=False, noise=noise)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2, generator=seeded(1))
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=seeded(2))
    return net, images


def test_the_field_by_hand():
    net, _ = make()
    f = net.segments[0]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    time = torch.full((2, 1, 6, 6), 0.3, dtype=torch.float64)

    def norm(layer: nn.GroupNorm, value: Tensor) -> Tensor:  # four groups of one channel
        mean = value.mean((2, 3), keepdim=True)
        scaled = (value - mean) / (value.var((2, 3), unbiased=False, keepdim=True) + layer.eps).sqrt()
        return scaled * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    y = F.conv2d(torch.cat([F.relu(norm(f.norm1, x)), time], 1), f.conv1.weight, padding=1)
    z = F.conv2d(torch.cat([F.relu(norm(f.norm2, y)), time], 1), f.conv2.weight, padding=1)
    assert torch.allclose(f(t, x), norm(f.norm3, z), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(f(t, x), f(t + 0.5, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("substep", ["rk4", "torchdiffeq:rk4", {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}])
def test_it_is_what_torchdiffeq_solves(stages, substep):
    """Each segment by torchdiffeq on its own clock, in finer steps."""
    net, images = make(stages=stages, steps=16 if isinstance(substep, str) else 2, t_end=1.5, substep=substep)
    images = images[:2, :, :8, :8]
    fine = {"step_size": 1.5 / 64}  # of the 3/8 rule, which torchdiffeq calls rk4
    with torch.no_grad():
        x = net.stem(images)
        for stage, segment in enumerate(net.segments):
            if stage:
                x = net.jumps[stage - 1](x)
            x = odeint(segment, x, torch.tensor([0.0, 1.5], dtype=x.dtype), method="rk4", options=fine)[-1]
        expected, logits = net.head(x), net(images)
        euler = make(stages=stages, steps=16, t_end=1.5, substep="euler")[0](images)
    error = float((logits - expected).abs().max())
    assert 0.0 < error < 2e-4  # ReLUs have kinks, so it is not of fourth order
    assert float((euler - expected).abs().max()) > 30 * error


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("substep", ["euler", "midpoint", "rk4", "torchdiffeq:midpoint"])
def test_eta_zero_is_bitwise_the_network(stages, substep):
    net, images = make(stages=stages, steps=3, substep=substep)
    sol = odeadv.solve(net.field(images, LABELS), scheme="lie", **net.solve_options)
    assert torch.equal(sol.output, net(images))
    assert torch.equal(sol.loss, F.cross_entropy(sol.output, LABELS))
    assert sol.stats.steps == 3 * stages + stages - 1
    assert [int(x.shape[1]) for x in sol.xs] == [4, 4 * 2 ** (stages - 1)]


def test_lad_with_euler_by_hand():
    """Eq. 5 with steps h: x_{n+1} = x_n + h f(t_n, x_n) + h eta a_{n+1}; the jump takes the place of the F step."""
    net, images = make(stages=2, steps=3, t_end=0.9, substep="euler")
    h = 0.3

    def move(n: int, x: Tensor) -> Tensor:
        if n == 3:
            return net.jumps[0](x)
        stage, step = divmod(n, 4)
        return x + h * net.segments[stage](torch.tensor(step * h, dtype=x.dtype), x)

    xs = [net.stem(images)]
    for n in range(7):
        xs.append(move(n, xs[-1]))
    a = torch.autograd.grad(F.cross_entropy(net.head(xs[-1]), LABELS), xs)
    x = xs[0]
    for n in range(7):
        x = move(n, x) + h * ETA * a[n + 1]
    sol = odeadv.solve(net.field(images, LABELS, eta=ETA), scheme="lie", **net.solve_options)
    assert torch.allclose(sol.output, net.head(x), rtol=1e-11, atol=1e-11)
    assert sol.loss > F.cross_entropy(net(images), LABELS)
    sol.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-midpoint", "strang-symmetric"])
@pytest.mark.parametrize("substep", ["euler", "rk4", "torchdiffeq:rk4"])
@pytest.mark.filterwarnings("error::odeadv.AccuracyWarning")
def test_every_defence_runs_and_raises_the_loss(scheme, substep):
    net, images = make(stages=2, steps=2, substep=substep)
    sol = odeadv.solve(net.field(images, LABELS, eta=ETA), scheme=scheme, **net.solve_options)
    assert sol.loss > F.cross_entropy(net(images), LABELS)


def test_the_adversarial_solve_converges_to_the_continuous_one():
    """One segment has the order of Strang with midpoint sub-steps, for eta = 5. Each grid has its own recording."""

    def output(steps: int) -> Tensor:
        net, images = make(stages=1, steps=steps, substep="midpoint")
        with torch.no_grad():
            return odeadv.solve(net.field(images[:2, :, :8, :8], LABELS[:2], ETA), **net.solve_options).output

    reference = output(512)
    order = measured_order(lambda n: float((output(n) - reference).norm()), (16, 32, 64))
    assert order == pytest.approx(2.0, abs=0.25)  # 1.86: ReLUs have kinks


def test_bfloat16_and_gradients():
    net, images = make()
    net, images = net.float(), images.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = odeadv.solve(net.field(images, LABELS, eta=ETA), scheme="strang", **net.solve_options)
    assert sol.loss.dtype == torch.float32
    sol.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (ode_net(4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    weight = ode_net(32, stages=1).segments[0].conv1.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)


def test_bad_input_is_named():
    net, images = make()
    with pytest.raises(ValueError, match=r"^substep: got 'rk5', expected one of .*did you mean 'rk4'"):
        ode_net(substep="rk5")
    with pytest.raises(ValueError, match=r"^substep: got 'exact', expected another sub-step such as 'rk4'"):
        ode_net(substep="exact")
    with pytest.raises(TypeError, match=r"^substep: got \{'methd': 'rk4'\}, expected the arguments of"):
        ode_net(substep={"methd": "rk4"})
    with pytest.raises(TypeError, match=r"^substep: got float"):
        ode_net(substep=4.0)
    with pytest.raises(ValueError, match=r"^t_end: got 0, expected a finite number, above 0"):
        ode_net(t_end=0)
    with pytest.raises(ValueError, match=r"^stages: got 0, expected an integer, at least 1"):
        ode_net(4, stages=0)
    with pytest.raises(TypeError, match=r"^steps: got 1\.5, expected an integer"):
        ode_net(4, steps=1.5)
    with pytest.raises(ValueError, match=r"^images: got shape \(5, 2, 12, 12\), expected \(n, 3"):
        net(images[:, :2])
    with pytest.raises(TypeError, match=r"^images: got torch.uint8"):
        net((255 * images).byte())
    with pytest.raises(ValueError, match=r"^labels: got classes 0 to 9, expected 0 to 6"):
        net.field(images, torch.tensor([0, 1, 2, 3, 9]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_refined_by_one_is_bitwise_the_network(training, noise):
    net, images = resnet(noise)
    twin = copy.deepcopy(net).train(training)
    fine = refine(net, 1).train(training)
    torch.manual_seed(2)
    logits = twin(images)
    torch.manual_seed(2)
    assert torch.equal(fine(images), logits)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    torch.manual_seed(2)
    net.load_state_dict(resnet(noise)[0].state_dict())
    assert torch.equal(odeadv.solve(fine.field(images, LABELS)).output, logits)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_refined_by_hand(k):
    net, images = resnet()
    net.eval()
    x = net.stem(images)
    for block in net.blocks:
        if block.shortcut is not None:
            x = block(x)
            continue
        for _ in range(k):
            x = x + block.residual(x) / k
    fine = refine(net, k)
    assert torch.allclose(fine(images), net.head(x), rtol=1e-12, atol=1e-12)
    sol = odeadv.solve(fine.field(images, LABELS), save_at="steps", **fine.solve_options)
    assert torch.equal(sol.output, fine(images))
    assert sol.stats.steps == 4 * k + 2
    xs = [net.stem(images), *(torch.empty(0) for _ in range(sol.stats.steps))]
    n = 0
    for block in net.blocks:
        steps = 1 if block.shortcut is not None else k
        for _ in range(steps):
            xs[n + 1] = block(xs[n]) if steps == 1 and k > 1 else xs[n] + block.residual(xs[n]) / k
            n += 1
    a = torch.autograd.grad(F.cross_entropy(net.head(xs[-1]), LABELS), xs)
    x, n = xs[0], 0
    for block in net.blocks:
        for _ in range(1 if block.shortcut is not None else k):
            moved = block(x) + ETA * a[n + 1] if block.shortcut is not None else None
            x = x + block.residual(x) / k + ETA / k * a[n + 1] if moved is None else moved
            n += 1
    lad = odeadv.solve(fine.field(images, LABELS, eta=ETA), scheme="lie", **fine.solve_options)
    assert torch.allclose(lad.output, net.head(x), rtol=1e-11, atol=1e-11)


def test_refinement_converges_at_first_order_with_euler():
    """Towards a fine solve by rk4, which is better at equal cost too (ReLUs have kinks, so its order is not four)."""
    net, images = resnet()
    net.eval()
    images = images[:2]
    with torch.no_grad():
        reference = refine(net, 64, substep="rk4")(images)
        order = measured_order(lambda k: float((refine(net, k)(images) - reference).norm()), (8, 16, 32, 64))
        rk4, euler = (refine(net, 8, substep="rk4")(images), refine(net, 32)(images))
    assert order == pytest.approx(1.0, abs=0.1)
    assert float((rk4 - reference).norm()) < 0.05 * float((euler - reference).norm())


def test_refined_shares_the_weights_and_composes():
    net, images = resnet()
    net.eval()
    fine = refine(net, 2)
    assert not fine.training
    assert {id(p) for p in fine.parameters()} == {id(p) for p in net.parameters()}
    before = fine(images)
    with torch.no_grad():
        net.head[-1].bias.add_(1.0)
    assert torch.allclose(fine(images), before + 1.0)
    assert torch.equal(refine(fine, 3)(images), refine(net, 6)(images))
    fine.train()
    assert net.training
    rk4 = refine(net, 2, substep="rk4")
    assert rk4.solve_options == {"substep": "rk4"}
    assert refine(rk4, 2).solve_options == {"substep": "rk4"}
    assert fine.num_classes == 7

    ode, small = make(stages=2, steps=2)
    finer, _ = make(stages=2, steps=6)
    assert torch.allclose(refine(ode, 3)(small), finer(small), rtol=1e-12, atol=1e-12)


def test_refine_refuses():
    net, _ = resnet()
    with pytest.raises(ValueError, match=r"^k: got 0, expected an integer, at least 1"):
        refine(net, 0)
    with pytest.raises(TypeError, match=r"^k: got 0\.5, expected an integer"):
        refine(net, 0.5)
    with pytest.raises(TypeError, match=r"^net: got Linear, expected a network of odeadv.models"):
        refine(nn.Linear(2, 2), 2)
    assert math.isclose(refine(net, 3).dt, 1 / 3)
