"""The network as a field: bitwise the same network, Eq. 5 and Eq. 8 by hand, nothing left changed."""

import pytest
import torch
import torch.nn.functional as F
from helpers import small_resnet as make
from torch import Tensor, nn

import odeadv
from odeadv.models import PreActResNet, preact_resnet

ETA = 20.0
pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_state(net: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_resnet56_is_the_papers():
    net = odeadv.models.resnet56()
    assert sum(p.numel() for p in net.parameters()) == 855_674
    assert len(net.blocks) == 27
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    projections = [block.shortcut for block in net.blocks if block.shortcut is not None]
    assert len(layers) - len(projections) == 56
    assert len(projections) == 2
    convs = torch.cat([m.weight.flatten() for m in net.blocks[-9:].modules() if isinstance(m, nn.Conv2d)][:-1])
    assert float(convs.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_depths():
    assert [len(preact_resnet(depth=d, width=2).blocks) for d in (8, 20, 32)] == [3, 9, 15]
    with pytest.raises(ValueError, match=r"^depth: got 18, expected 6n \+ 2"):
        preact_resnet(depth=18)
    with pytest.raises(ValueError, match=r"^width: got 0, expected an integer, at least 1"):
        preact_resnet(width=0)


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (preact_resnet(8, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scheme", [*odeadv.schemes.names(), "euler"])
def test_eta_zero_is_bitwise_the_network(dtype, training, scheme):
    net, images, labels = make(dtype)
    twin, _, _ = make(dtype)
    net.train(training)
    twin.train(training)
    x = twin.stem(images)
    for block in twin.blocks:
        x = block(x)
    logits = twin.head(x)
    sol = odeadv.solve(net.field(images, labels, eta=0.0), scheme=scheme)
    assert torch.equal(sol.output, logits)
    assert torch.equal(sol.loss, F.cross_entropy(logits, labels))
    assert_same_state(net, state_of(twin))  # running statistics moved once, not twice
    again, _, _ = make(dtype)
    assert torch.equal(again.train(training)(images), logits)


def record_by_hand(net: PreActResNet, images: Tensor, labels: Tensor) -> list[Tensor]:
    xs = [net.stem(images)]
    for block in net.blocks:
        xs.append(block(xs[-1]))
    return list(torch.autograd.grad(F.cross_entropy(net.head(xs[-1]), labels), xs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lie_is_eq_5_and_strang_is_eq_8_jumps_included(training, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    by_hand, _, _ = make(dtype)
    net, images, labels = make(dtype)
    by_hand.train(training)
    net.train(training)
    a = record_by_hand(by_hand, images, labels)
    by_hand.load_state_dict(net.state_dict())  # the recording by hand moved the statistics

    lie = by_hand.stem(images)
    for n, block in enumerate(by_hand.blocks):
        lie = block(lie) + ETA * a[n + 1]
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie")
    assert torch.allclose(sol.output, by_hand.head(lie), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(sol.output, net(images), rtol=1e-3, atol=1e-3)
    for n in range(len(a)):
        assert torch.allclose(sol.costate(n), a[n], rtol=tolerance, atol=tolerance * float(a[n].abs().max()))

    net.load_state_dict(state_of(make(dtype)[0]))
    by_hand.load_state_dict(net.state_dict())
    strang = by_hand.stem(images)
    for n, block in enumerate(by_hand.blocks):
        moved = block(strang + ETA / 2 * a[n])
        jump = a[n].shape != a[n + 1].shape
        strang = moved + (ETA / 2 * a[n + 1] if jump else ETA / 4 * (a[n] + a[n + 1]))
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang")
    assert torch.allclose(sol.output, by_hand.head(strang), rtol=tolerance, atol=tolerance)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, by_hand.state_dict()[name], rtol=tolerance, atol=tolerance), name


def test_the_exact_midpoint_by_hand():
    net, images, labels = make()
    net.eval()
    a = record_by_hand(net, images, labels)
    xs = [net.stem(images)]
    for block in net.blocks:
        xs.append(block(xs[-1]))
    x = xs[0]
    for n, block in enumerate(net.blocks):
        x = block(x + ETA / 2 * a[n])
        if block.shortcut is None:
            y = (0.25 * xs[n] + 0.75 * xs[n + 1]).detach().requires_grad_()
            (vjp,) = torch.autograd.grad(block.residual(y), y, 0.25 * a[n] + 0.75 * a[n + 1])
            x = x + ETA / 2 * (a[n + 1] + 0.5 * vjp)
        else:
            x = x + ETA / 2 * a[n + 1]
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang-midpoint")
    assert torch.allclose(sol.output, net.head(x), rtol=1e-12, atol=1e-12)
    assert sol.stats.vjps == len(net.blocks) - 2 + sum(block.shortcut is None for block in net.blocks) + 2


@pytest.mark.parametrize("scheme", ["lie", "strang", "strang-midpoint", "strang-symmetric"])
@pytest.mark.parametrize("recordings", [{}, {"sweeps": 2}, {"ascent": 2}])
def test_recording_leaves_no_trace(scheme, recordings):
    """In train mode the statistics move as by one forward pass; grads, flags, modes and random state do not move."""
    net, images, labels = make()
    frozen = net.blocks[1].conv1.weight
    frozen.requires_grad_(False)
    net.head[-1].bias.grad = torch.full_like(net.head[-1].bias, 3.0)
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    ids = {name: id(buffer) for name, buffer in net.named_buffers()}
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    random = torch.get_rng_state()
    before = state_of(net)

    net.eval()
    odeadv.solve(net.field(images, labels, eta=ETA), scheme=scheme, **recordings)
    assert_same_state(net, before)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    odeadv.solve(net.field(images, labels, eta=ETA), scheme=scheme, **recordings)
    assert [module.training for module in net.modules()] == modes
    assert {name: id(buffer) for name, buffer in net.named_buffers()} == ids
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net.head[-1].bias.grad, torch.full_like(net.head[-1].bias, 3.0))
    assert all(p.grad is None for name, p in net.named_parameters() if name != f"head.{len(net.head) - 1}.bias")
    assert {int(b) for n, b in net.named_buffers() if "num_batches" in n and not n.startswith("blocks.0.")} == {1}


def test_the_recording_computes_no_weight_gradients():
    net, images, labels = make()

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
                Counter.asked += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang-midpoint")
    assert Counter.asked == 0
    sol.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_gradient_of_l_lad_with_the_costate_frozen():
    """Compare gradients with finite differences of the second pass, at a fixed recorded costate."""
    net, images, labels = make(depth=8)
    net.eval()
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang")
    sol.loss.backward()
    costate = sol.costate

    def driven_loss() -> float:
        field = net.field(images, labels, eta=ETA)
        plain = odeadv.solve(field.driven_by(costate), scheme="strang", substep="euler")
        return field.evaluate(plain.xs[-1])[1].item()

    generator = torch.Generator().manual_seed(1)
    for parameter in (net.stem.conv.weight, net.blocks[1].conv2.weight, net.head[-1].weight):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        step, base = 1e-6, parameter.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(base + sign * step * direction)
            values.append(driven_loss())
        with torch.no_grad():
            parameter.copy_(base)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float((parameter.grad * direction).sum().detach()), rel=1e-5
        )


def test_eta_belongs_to_the_batch_mean():
    """The same images twice: the mean halves each image's costate, so twice the eta gives the same logits."""
    net, images, labels = make()
    net.eval()
    once = odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie").output
    twice = odeadv.solve(net.field(images.repeat(2, 1, 1, 1), labels.repeat(2), eta=2 * ETA), scheme="lie").output
    assert torch.allclose(once, twice[:5], rtol=1e-10)


def test_lad_raises_the_loss_and_saved_states_are_the_layers():
    net, images, labels = make()
    net.eval()
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie", save_at="steps")
    assert sol.loss > F.cross_entropy(net(images), labels)
    assert [tuple(x.shape[1:]) for x in sol.xs] == [(4, 16, 16)] * 3 + [(8, 8, 8)] * 2 + [(16, 4, 4)] * 2
    with pytest.raises(ValueError, match=r"^t: 2\.5 lies within the jump from 2 to 3"):
        sol.costate(2.5)
    with pytest.raises(ValueError, match=r"^save_at: got 2\.5, but the field jumps from 2 to 3"):
        odeadv.solve(net.field(images, labels), save_at=[2.5])


def test_finer_steps_and_their_limits():
    net, images, labels = make()
    net.eval()
    coarse = odeadv.solve(net.field(images, labels), dt=1.0)
    fine = odeadv.solve(net.field(images, labels), dt=0.25, substep="rk4")
    assert coarse.stats.steps == 6
    assert fine.stats.steps == 4 * 4 + 2
    assert not torch.allclose(coarse.output, fine.output)
    with pytest.raises(ValueError, match=r"^dt: the step from 0 to 2 does not lie within one piece"):
        odeadv.solve(net.field(images, labels), dt=2.0, t_span=(0.0, 2.0))
    with pytest.raises(ValueError, match=r"^dt: the field jumps from 2 to 3"):
        odeadv.solve(net.field(images, labels), t_span=(0.0, 6.0), steps=4)


def test_inference_mode_records_all_the_same():
    net, images, labels = make()
    net.eval()
    expected = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang-midpoint").output
    with torch.inference_mode():
        sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang-midpoint")
    assert torch.equal(sol.output, expected)
    net.train()
    with torch.inference_mode():
        odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie")


def test_bad_input_is_named():
    net, images, labels = make()
    with pytest.raises(ValueError, match=r"^scheme: 'euler' does not split, but the field jumps from 2 to 3"):
        odeadv.solve(net.field(images, labels, eta=ETA), scheme="euler")
    with pytest.raises(TypeError, match=r"^images: got torch.uint8, expected floating-point"):
        net.field((255 * images).byte(), labels)
    with pytest.raises(TypeError, match=r"^labels: got torch.int32"):
        net.field(images, labels.int())
    with pytest.raises(TypeError, match=r"^labels: got list"):
        net.field(images, labels.tolist())
    with pytest.raises(ValueError, match=r"^images: got none"):
        net.field(images[:0], labels[:0])
    with pytest.raises(TypeError, match=r"^depth: got 8\.0, expected an integer"):
        preact_resnet(8.0)
    with pytest.raises(ValueError, match=r"^mean, std: got 3 and 1"):
        preact_resnet(8, std=(0.2,))
    with pytest.raises(ValueError, match=r"^images: got shape \(5, 1, 16, 16\), expected \(n, 3"):
        net.field(images[:, :1], labels)
    with pytest.raises(ValueError, match=r"^labels: got shape \(3,\), expected \(5,\)"):
        net.field(images, labels[:3])
    with pytest.raises(ValueError, match=r"^labels: got classes 0 to 9, expected 0 to 6"):
        net.field(images, torch.tensor([0, 1, 2, 3, 9]))
    with pytest.raises(ValueError, match=r"^x0: contains NaN"):
        odeadv.solve(net.field(images * float("nan"), labels, eta=1.0))


def test_autocast_to_bfloat16_runs_both_passes():
    net, images, labels = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang")
    assert sol.loss.dtype == torch.float32
    sol.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [2, 3, 8])
def test_the_projection_is_a_strided_convolution(channels, layout):
    """The projection avoids oneDNN's kernel, which writes outside its memory for fewer than 8 channels on AVX2."""
    generator = torch.Generator().manual_seed(0)
    block = odeadv.models.preact_resnet(8, channels, generator=generator).blocks[1]
    ours = next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1))
    images = torch.rand(6, channels, 9, 8, generator=generator).contiguous(memory_format=layout)
    found, expected = images.clone().requires_grad_(), images.clone().requires_grad_()
    mine = ours.to(memory_format=layout)(found)
    theirs = torch.nn.functional.conv2d(expected.contiguous(), ours.weight.contiguous(), stride=2)
    assert mine.shape == (6, 2 * channels, 5, 4)
    torch.testing.assert_close(mine, theirs)
    direction = torch.rand(mine.shape, generator=generator)
    gradients = [
        torch.autograd.grad(out, [x, ours.weight], direction) for out, x in ((mine, found), (theirs, expected))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert gradients[0][0].is_contiguous(
        memory_format=layout
    )  # otherwise all earlier layers would mix layouts and be slow


def test_soft_labels_are_class_probabilities():
    """One-hot probabilities are the class numbers; a mixture of labels is the mixture of the losses."""
    net, images, labels = make()
    net.eval()
    one_hot = F.one_hot(labels, 7).double()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)

    def loss(targets: Tensor) -> Tensor:
        return odeadv.solve(net.field(images, targets, eta=0.0)).loss

    assert torch.allclose(loss(one_hot), loss(labels), rtol=1e-12)
    assert torch.allclose(loss(mixed), 0.7 * loss(labels) + 0.3 * loss(labels.flip(0)), rtol=1e-12)
    with pytest.raises(ValueError, match=r"^labels: got probabilities of shape \(5, 6\), expected \(5, 7\)"):
        net.field(images, one_hot[:, :6])
