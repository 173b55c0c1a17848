"""Noise on the state (Wang et al. 2019): its size, that both passes see the same, and averaging over it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import small_resnet
from torch import Tensor, nn

import odeadv
from odeadv.models import PreActBlock, PreActResNet, averaged, preact_resnet, refine

ETA = 20.0
pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")


def make(dtype: torch.dtype = torch.float64, **kwargs: object) -> tuple[PreActResNet, Tensor, Tensor]:
    return small_resnet(dtype, statistics=False, **({"noise": 0.1} | kwargs))


@pytest.mark.parametrize(("channels_in", "stride"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_the_size_of_the_noise(kind, channels_in, stride):
    """The standard deviation is measured on 2 million values, with a standard error of 0.05 %."""
    block = PreActBlock(channels_in, 8, stride, noise=0.1, noise_kind=kind)
    nn.init.constant_(block.bn2.weight, 3.0)
    x = 2.0 * torch.randn(64, channels_in, 64 * stride, 64 * stride, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        noisy = block(x)
        block.noise = None
        plain = block(x)  # batch statistics again
    expected = 0.1 if kind == "absolute" else 0.1 * float(plain.std())
    noise = noisy - plain
    assert float(noise.std()) == pytest.approx(expected, rel=3e-3)
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 * expected / noise.numel() ** 0.5)
    assert (
        abs(float((noise * plain).mean())) < 4 * expected * float(plain.square().mean().sqrt()) / noise.numel() ** 0.5
    )
    if kind == "relative":
        assert abs(expected - 0.1) > 0.01  # so the test can tell the two apart


def test_relative_noise_scales_with_the_sum_and_its_scale_is_a_constant():
    block = PreActBlock(4, 4, noise=0.1, noise_kind="relative").double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    f = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    once = block.noise(x, f)
    torch.manual_seed(0)
    drawn = torch.randn_like(f)
    assert not once.requires_grad
    assert torch.allclose(once, 0.1 * (x + f).std() * drawn, rtol=1e-12)
    torch.manual_seed(0)
    assert torch.allclose(block.noise(3 * x, 3 * f), 3 * once, rtol=1e-12)
    torch.manual_seed(0)
    assert torch.allclose(block.noise(x, f, 0.25), 0.1 * (x + 0.25 * f).std() / 0.5 * drawn, rtol=1e-12)


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("damping", [None, "damp"])
def test_the_solve_is_bitwise_the_network_on_the_same_draws(kind, damping):
    net, images, labels = make(noise_kind=kind, damping=damping)
    twin, _, _ = make(noise_kind=kind, damping=damping)
    plain, _, _ = make(noise=0.0, damping=damping)
    torch.manual_seed(7)
    logits = twin(images)
    after = torch.get_rng_state()
    for scheme in ("lie", "strang", "strang-midpoint", "euler"):
        net.load_state_dict(make(noise_kind=kind, damping=damping)[0].state_dict())
        torch.manual_seed(7)
        assert torch.equal(odeadv.solve(net.field(images, labels), scheme=scheme).output, logits)
        assert torch.equal(torch.get_rng_state(), after)
    assert not torch.allclose(plain(images), logits, atol=1e-3)
    for model in (net, twin, plain):
        model.load_state_dict(plain.state_dict())
        model.eval()
    assert torch.equal(net(images), plain(images))  # off in evaluation mode
    assert torch.equal(odeadv.solve(net.field(images, labels)).output, plain(images))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_the_second_pass_sees_the_noise_of_the_recording(kind, mode):
    """Compare LAD with a computation by hand, in which the noise is drawn once and used in both passes."""
    net, images, labels = make(noise_kind=kind)
    net.noisy_inference().train(mode == "train")
    hand, _, _ = make(noise_kind=kind)
    hand.noisy_inference().train(mode == "train")
    torch.manual_seed(11)
    xs = [hand.stem(images)]
    for block in hand.blocks:
        xs.append(block(xs[-1]))
    a = torch.autograd.grad(F.cross_entropy(hand.head(xs[-1]), labels), xs)
    hand.load_state_dict(net.state_dict())
    torch.manual_seed(11)
    x = hand.stem(images)
    for n, block in enumerate(hand.blocks):
        x = block(x) + ETA * a[n + 1]
    for options in ({}, {"checkpoints": 3}):
        torch.manual_seed(11)
        sol = odeadv.solve(net.field(images, labels, eta=ETA), scheme="lie", **options)
        assert torch.allclose(sol.output, hand.head(x), rtol=1e-12, atol=1e-12)
        net.load_state_dict(make(noise_kind=kind)[0].state_dict())


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("training", [True, False])
def test_both_passes_draw_the_same_in_bfloat16(kind, training):
    net, images, labels = make(torch.float32, noise_kind=kind)
    net.noisy_inference().train(training)
    seen: list[Tensor] = []
    for block in net.blocks:
        block.noise.register_forward_hook(lambda module, args, noise: seen.append(noise.detach().clone()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        odeadv.solve(net.field(images, labels, eta=ETA), scheme="strang", sweeps=2)
    assert len(seen) == 18
    assert {noise.dtype for noise in seen} == {torch.bfloat16}
    for first, *others in zip(seen[:6], seen[6:12], seen[12:], strict=True):
        for other in others:
            if kind == "absolute":
                assert torch.equal(first, other)
            else:  # the same draw, scaled by the state it meets
                assert float(F.cosine_similarity(first.flatten().float(), other.flatten().float(), dim=0)) > 0.9999
    assert not torch.equal(seen[0], seen[1])


def test_the_draws_do_not_depend_on_layout_or_precision():
    noise = PreActBlock(4, 4, noise=0.1).noise
    x = torch.randn(2, 4, 8, 8)
    drawn = []
    for like in (x, x.to(memory_format=torch.channels_last), x.bfloat16()):
        torch.manual_seed(5)
        drawn.append(noise(like, like))
        assert (drawn[-1].stride(), drawn[-1].dtype) == (like.stride(), like.dtype)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0].bfloat16(), drawn[2])


def test_noisy_inference_is_a_switch():
    net, images, _ = make()
    net.eval()
    quiet = net(images)
    assert net.noisy_inference() is net
    assert not torch.equal(net(images), quiet)
    net.noisy_inference(False)
    assert torch.equal(net(images), quiet)
    assert not torch.equal(net.train()(images), net(images))


def test_averaged_is_the_mean_of_noisy_passes():
    net, images, _ = make()
    torch.manual_seed(3)
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    logits = averaged(net, 5, torch.Generator().manual_seed(9))(images)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert not any(block.noise.at_inference for block in net.blocks)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    net.eval().noisy_inference()
    seeds = torch.randint(2**62, (5,), generator=torch.Generator().manual_seed(9)).tolist()
    passes = []
    for seed in seeds:
        torch.manual_seed(seed)
        passes.append(net(images))
    assert torch.allclose(logits, sum(passes) / 5, rtol=1e-13, atol=1e-13)
    assert not torch.equal(passes[0], passes[1])


def test_averaged_by_a_seed_repeats_itself_and_by_a_generator_goes_on():
    net, images, _ = make()
    seeded = averaged(net, 2, 4)
    assert torch.equal(seeded(images), seeded(images))
    drawing = averaged(net, 2, torch.Generator().manual_seed(4))
    calls = [drawing(images) for _ in range(2)]
    assert not torch.equal(calls[0], seeded(images))  # each image has its own noise
    assert not torch.equal(*calls)
    again = averaged(net, 2, torch.Generator().manual_seed(4))
    assert all(torch.equal(call, again(images)) for call in calls)
    assert torch.equal(averaged(net, 2)(images), averaged(net, 2, 0)(images))
    assert not torch.equal(averaged(net, 2)(images), averaged(net, 2, 1)(images))
    assert seeded.num_classes == 7


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_averaged_by_a_seed_is_a_function_of_the_image(kind):
    """An image has the same logits alone, at another place and in a larger batch; with a generator it does not."""
    net, images, _ = make(noise_kind=kind)
    seeded = averaged(net, 2, 4)
    with torch.no_grad():
        logits = seeded(images)
        alone = torch.cat([seeded(image[None]) for image in images])
        assert torch.allclose(alone, logits, rtol=1e-12, atol=1e-13)
        assert torch.allclose(seeded(images.flip(0)).flip(0), logits, rtol=1e-12, atol=1e-13)
        twice = images[:1].expand(2, -1, -1, -1)
        assert torch.allclose(*seeded(twice), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(*averaged(net, 2, torch.Generator().manual_seed(4))(twice), atol=1e-3)
    assert not any(block.noise.shared for block in net.blocks)


def test_the_spread_of_the_mean_falls_with_the_root_of_the_passes():
    net, images, _ = make()
    spread = []
    with torch.no_grad():
        for passes in (1, 16):
            model = averaged(net, passes, torch.Generator().manual_seed(0))
            spread.append(torch.stack([model(images) for _ in range(24)]).std(0).mean())
    assert float(spread[0] / spread[1]) == pytest.approx(4.0, rel=0.25)


def test_averaged_can_be_attacked():
    """The gradient is the mean of the passes' gradients, recomputed or kept. An attack leaves the model unchanged."""
    net, images, labels = make()
    images.requires_grad_()
    grads = []
    for recompute in (True, False):
        loss = F.cross_entropy(averaged(net, 3, 5, recompute=recompute)(images), labels)
        grads.append(torch.autograd.grad(loss, images)[0])
    assert torch.equal(*grads)
    net.eval().noisy_inference()
    for block in net.blocks:
        block.noise.shared = True
    total = torch.zeros(5, 7, dtype=torch.float64)
    for seed in torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(5)).tolist():
        torch.manual_seed(seed)
        total = total + net(images)
    (expected,) = torch.autograd.grad(F.cross_entropy(total / 3, labels), images)
    assert torch.allclose(grads[0], expected, rtol=1e-10, atol=1e-14)

    net.noisy_inference(False).train()
    images = images.detach()
    attack = [
        odeadv.attacks.ifgsm(averaged(net, 2, 6), images, labels, eps=8 / 255, alpha=2 / 255, steps=2) for _ in range(2)
    ]
    assert torch.equal(*attack)
    assert not torch.equal(attack[0], images)
    assert all(p.grad is None for p in net.parameters())
    odeadv.evaluate(averaged(net, 2), (images, labels), protocol="table1")  # it refuses a model whose answers change
    assert net.training


def test_noise_is_a_diffusion_term_on_finer_steps():
    """With f = 0, k Euler steps of dt = 1/k add noise of variance std^2 per unit of time, jumps included."""
    net = preact_resnet(14, 8, 7, noise=0.1, generator=torch.Generator().manual_seed(0))
    for block in net.blocks:
        nn.init.zeros_(block.conv2.weight)
    labels = torch.zeros(32, dtype=torch.int64)
    for k in (1, 4):
        torch.manual_seed(1)
        field = refine(net, k).field(torch.zeros(32, 3, 64, 64), labels)
        with torch.no_grad():
            xs = odeadv.solve(field, save_at=[0.0, 1.0, 2.0, 3.0]).xs
        for unit in range(2):
            assert float((xs[unit + 1] - xs[unit]).std()) == pytest.approx(0.1, rel=0.01)
        jump = xs[3] - net.blocks[2].shortcut(xs[2]).detach()
        assert float(jump.std()) == pytest.approx(0.1, rel=0.02)


def test_bad_noise_is_named():
    assert preact_resnet(8, 4, noise=True).config["noise"] == 0.1
    with pytest.raises(ValueError, match=r"^noise_kind: got 'other', expected one of 'absolute', 'relative'"):
        preact_resnet(8, noise_kind="other")
    with pytest.raises(ValueError, match=r"^noise: got -1, expected a finite number, at least 0"):
        preact_resnet(8, noise=-1)
    with pytest.raises(TypeError, match=r"^noise: got '0.1', expected a number, at least 0"):
        preact_resnet(8, noise="0.1")
    with pytest.raises(
        ValueError, match=r"^net: got a network without noise, expected one with it; make it with noise=0.1"
    ):
        preact_resnet(8, 4).noisy_inference()
    net = preact_resnet(8, 4, noise=0.1)
    with pytest.raises(ValueError, match=r"^passes: got 0, expected an integer, at least 1"):
        averaged(net, 0)
    with pytest.raises(TypeError, match=r"^passes: got 2\.0, expected an integer"):
        averaged(net, 2.0)
    with pytest.raises(TypeError, match=r"^generator: got str, expected a torch.Generator, a seed or None"):
        averaged(net, 2, "0")


class Jittered(torch.nn.Module):
    """A module without odeadv's noise: it draws from the global random state in evaluation mode."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.net, self.branches = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)), branches

    def forward(self, x):
        x = x + 0.3 * torch.randn_like(x)
        return self.net(x if not self.branches or x.sum() < 1e9 else -x)


@pytest.mark.parametrize("branches", [False, True])
def test_any_module_can_be_averaged(branches):
    """With a seed the mean is a function of the image: the same alone, at another place, and differentiable."""
    torch.manual_seed(0)
    net, images = Jittered(branches), torch.rand(6, 3, 4, 4)
    model = averaged(net, 8)
    state = torch.get_rng_state()
    logits = model(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(logits, torch.cat([model(image[None]) for image in images]), atol=1e-5)
    assert torch.allclose(logits, model(images.flip(0)).flip(0), atol=1e-5)
    expected = []
    for seed in torch.randint(2**62, (8,), generator=torch.Generator().manual_seed(0)).tolist():
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        expected.append(net.net(images + 0.3 * noise))
    assert torch.allclose(logits, torch.stack(expected).mean(dim=0), atol=1e-5)
    leaf = images.clone().requires_grad_()
    gradient = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]
    assert torch.allclose(gradient.flatten(1), net.net[1].weight[0].expand(6, -1), atol=1e-5)


def test_a_generator_draws_anew_for_every_image_of_any_module():
    net, same = Jittered(), torch.rand(1, 3, 4, 4).expand(4, -1, -1, -1)
    logits = averaged(net, 2, torch.Generator().manual_seed(0))(same)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
