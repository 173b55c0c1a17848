"""In-ResNet and lambda-In-ResNet (Yang et al. 2020): the formulas by hand, which blocks, which scalars."""

import pytest
import torch
import torch.nn.functional as F
from helpers import small_resnet
from torch import Tensor, nn

import odeadv
from odeadv.models import PreActBlock, PreActResNet, preact_resnet, resnet56

ETA = 20.0
KINDS = ["damp", "lambda-damp"]
pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")


def make(kind: str | None, dtype: torch.dtype = torch.float64, depth: int = 14) -> tuple[PreActResNet, Tensor, Tensor]:
    return small_resnet(dtype, depth, statistics=False, damping=kind)


def by_hand(block: PreActBlock, x: Tensor, kind: str | None) -> Tensor:
    """x_{n+1} as the paper's Appendix writes it."""
    f = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
    if block.shortcut is not None:
        return block.shortcut(x) + f
    if block.damping is None:
        return x + f
    k = block.damping.k
    if kind == "damp":
        strength = torch.relu(1 - k)
        return f + (1 - strength) * x
    strength = torch.relu(k)
    return (1 + strength) * f + (1 - strength) * x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_by_hand(kind, training):
    net, images, _ = make(kind)
    net.train(training)
    x = net.stem(images)
    for block in net.blocks:
        expected = by_hand(block, x, kind)
        assert torch.allclose(block(x), expected, rtol=1e-13, atol=1e-13)
        if block.damping is not None:
            assert not torch.allclose(expected, by_hand(block, x, "damp" if kind != "damp" else "lambda-damp"))
            strength = block.damping.strength
            f = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x))))))
            field = (f if kind == "damp" else (1 + strength) * f) - strength * x
            assert torch.allclose(block.residual(x), field, rtol=1e-13, atol=1e-13)
        x = expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_scalar_a_block_but_the_first_and_the_jumps(kind):
    net = resnet56(damping=kind, generator=torch.Generator().manual_seed(3))
    assert sum(p.numel() for p in net.parameters()) == 855_674 + 24
    damped = [i for i, block in enumerate(net.blocks) if block.damping is not None]
    assert damped == [i for i in range(27) if i not in (0, 9, 18)]
    low, high = {"damp": (0.75, 0.8), "lambda-damp": (0.2, 0.25)}[kind]
    k = torch.stack([net.blocks[i].damping.k for i in damped]).detach()
    assert low <= float(k.min()) < float(k.max()) <= high
    assert k.mean() == pytest.approx((low + high) / 2, abs=0.01)
    assert k.std() == pytest.approx(0.05 / 12**0.5, rel=0.4)
    strengths = torch.stack([net.blocks[i].damping.strength for i in damped])
    assert torch.equal(strengths, 1 - k if kind == "damp" else k)
    again = resnet56(damping=kind, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_do_not_depend_on_the_damping(kind, own):
    def weights(damping: str | None) -> dict[str, Tensor]:
        torch.manual_seed(4)
        return preact_resnet(
            14, 4, damping=damping, generator=torch.Generator().manual_seed(5) if own else None
        ).state_dict()

    plain, damped = weights(None), weights(kind)
    assert all(torch.equal(value, damped[name]) for name, value in plain.items())
    assert sorted(set(damped) - set(plain)) == [f"blocks.{i}.damping.k" for i in (1, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", [*odeadv.schemes.names(), "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_eta_zero_is_bitwise_the_network(kind, scheme, dtype):
    net, images, labels = make(kind, dtype)
    twin, _, _ = make(kind, dtype)
    logits = twin(images)
    sol = odeadv.solve(net.field(images, labels), scheme=scheme)
    assert torch.equal(sol.output, logits)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_lad_by_hand(kind):
    net, images, labels = make(kind)
    net.eval()
    xs = [net.stem(images)]
    for block in net.blocks:
        xs.append(by_hand(block, xs[-1], kind))
    a = torch.autograd.grad(F.cross_entropy(net.head(xs[-1]), labels), xs)
    x = xs[0]
    for n, block in enumerate(net.blocks):
        x = by_hand(block, x, kind) + ETA * a[n + 1]
    sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie")
    assert torch.allclose(sol.output, net.head(x), rtol=1e-11, atol=1e-11)
    sol.loss.backward()
    for block in net.blocks:
        if block.damping is not None:
            assert block.damping.k.grad is not None
            assert float(block.damping.k.grad) != 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_k_and_its_end_at_lambda_zero(kind):
    net, images, labels = make(kind, depth=20)
    net.eval()
    k = net.blocks[1].damping.k

    def loss(value: float) -> Tensor:
        with torch.no_grad():
            k.fill_(value)
        return odeadv.solve(net.field(images, labels), scheme="lie").loss

    start, step = k.item(), 1e-6
    (grad,) = torch.autograd.grad(loss(start), k)
    assert float(grad) == pytest.approx((loss(start + step) - loss(start - step)).item() / (2 * step), rel=1e-5)
    beyond = 1.5 if kind == "damp" else -0.5
    (grad,) = torch.autograd.grad(loss(beyond), k)
    assert float(grad) == 0.0
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    twin = preact_resnet(20, 4, 7, generator=torch.Generator().manual_seed(0)).double().eval()
    assert torch.equal(net.blocks[1](x), twin.blocks[1](x))  # undamped


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_and_bfloat16(kind):
    net, images, labels = make(kind, torch.float32)
    other = preact_resnet(14, 4, 7, damping=kind)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images), net.eval()(images))
    net.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang")
        assert net.blocks[1].residual(net.stem(images)).dtype == torch.bfloat16  # a scalar does not promote the state
    sol.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_bad_damping_is_named():
    with pytest.raises(ValueError, match=r"^damping: got 'lambda', expected None, 'damp' \(In-ResNet\) or"):
        preact_resnet(8, damping="lambda")
    with pytest.raises(ValueError, match=r"^damping: got 'damp' for a block that changes the state's shape"):
        PreActBlock(4, 8, 2, damping="damp")
    with pytest.raises(ValueError, match=r"^damping: got 'damp' for depth 8, expected depth 14 or more"):
        preact_resnet(8, damping="damp")  # it would be the plain network under another name
    assert isinstance(preact_resnet(14, 4, damping="damp").blocks[1].damping, nn.Module)
