"""Existing networks by the names of their layers: the same network bit for bit, and errors that say what to do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import odeadv
from odeadv import models
from odeadv.fields import Jump

torchvision = pytest.importorskip("torchvision")


def resnet_layers(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if name.count(".") == 1 and name.startswith("layer")]


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=7
    )


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 16, 2), CNBlockConfig(16, None, 1)]
    return ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=7)


MADE = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=7, width_per_group=4),
    "wide_resnet50_2": lambda: torchvision.models.wide_resnet50_2(num_classes=7),
    "vit": vit,
    "convnext": convnext,
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
        nn.Linear(256, 7),
    ),
}  # fmt: skip
LAYERS = {
    "vit": lambda net: [f"encoder.layers.encoder_layer_{n}" for n in range(3)],
    "convnext": lambda net: [f"features.{name}" for name in ("1.0", "1.1", "2", "3.0", "3.1", "4", "5.0")],
    "sequential": lambda net: ["1", "2"],
}
JUMPS = {
    "resnet18": [False, False, True, False, True, False, True, False],
    "vit": [False, False, False],
    "convnext": [False, False, True, False, False, True, False],
    "sequential": [False, False],
}


@pytest.mark.parametrize("name", MADE)
def test_a_network_is_split_by_the_names_of_its_layers(name):
    torch.manual_seed(0)
    net = MADE[name]().eval()
    layers = LAYERS.get(name, resnet_layers)(net)
    images, labels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 6])
    before, keys = net(images), set(net.state_dict())
    wrapped = models.from_module(net, layers)
    assert not wrapped.training
    assert torch.equal(wrapped(images), before)
    field = wrapped.field(images, labels, eta=0.0)
    assert torch.equal(odeadv.solve(field, scheme="strang").output, before)
    found = [isinstance(piece, Jump) for piece in field.f.pieces]
    assert found == JUMPS.get(name, found)
    assert len(found) == len(layers)
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in net.parameters()}
    assert set(net.state_dict()) == keys

    wrapped.train()
    assert all(part.training for part in wrapped.modules())
    torch.manual_seed(3)
    loss = odeadv.solve(wrapped.field(images, labels, eta=1.0), scheme="strang").loss
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    assert torch.equal(net(images), before) or any("running" in key for key in keys)


@pytest.mark.parametrize("name", ["resnet18", "convnext", "vit"])
def test_it_is_eq_8_by_a_plain_loop(name):
    torch.manual_seed(0)
    net = MADE[name]().double().eval()
    wrapped = models.from_module(net, LAYERS.get(name, resnet_layers)(net))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 6])
    x = wrapped.stem(images)
    states = [x]
    for block in wrapped.blocks:
        states.append(block(states[-1]))
    a = torch.autograd.grad(F.cross_entropy(wrapped.head(states[-1]), labels), states)
    for n, block in enumerate(wrapped.blocks):
        x = block(x + a[n])
        x = x + (0.5 * (a[n] + a[n + 1]) if a[n].shape == a[n + 1].shape else a[n + 1])
    sol = odeadv.solve(wrapped.field(images, labels, eta=2.0), scheme="strang")
    assert torch.allclose(sol.output, wrapped.head(x), rtol=1e-10)


def test_layers_that_are_not_named_between_two_named_ones_are_a_block():
    net = MADE["convnext"]().eval()
    wrapped = models.from_module(net, ["features.1.0", "features.1.1", "features.3.0", "features.3.1", "features.5.0"])
    images = torch.rand(2, 3, 32, 32)
    assert len(wrapped.blocks) == 7
    assert wrapped.names[2] == "between 'features.1.1' and 'features.3.0'"
    assert torch.equal(wrapped(images), net(images))


class Skipping(nn.Module):
    """A skip over two blocks, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(self.b(self.a(x)) + x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.stages[1](self.stages[0](x)) + x


def test_a_skip_over_two_blocks_is_refused_by_the_name_of_the_layer():
    with pytest.raises(
        ValueError, match=r"^layers: 2 tensors cross the cut after 'a' \('a' and 'stem'\).*What about a U-Net"
    ):
        models.from_module(Skipping(), ["a", "b"])
    whole = nn.Sequential(Skipping(), Skipping())
    with pytest.raises(ValueError, match=r"^layers: .* after '0.a' .*name a layer that contains the skip, such as '0'"):
        models.from_module(whole, ["0.a", "0.b"])
    with pytest.raises(ValueError, match=r"'stages.0'.* name a layer that contains the skip; or pack"):
        models.from_module(Listed(), ["stages.0", "stages.1"])  # 'stages' is no example: a list is not called
    inner = models.from_module(nn.Sequential(nn.Linear(4, 4), Skipping(), nn.Linear(4, 3)), ["1"])
    assert inner(torch.rand(2, 4)).shape == (2, 3)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.sum() > 0 else x


def test_a_forward_pass_that_cannot_be_traced_is_named():
    net = nn.Sequential(nn.Linear(4, 4), Decides())
    with pytest.raises(ValueError, match=r"^net: the forward pass of '1' \(Decides\) cannot be traced.*from_blocks"):
        models.from_module(net, ["0", "1.a"])
    assert models.from_module(net, ["0", "1"])(torch.rand(2, 4)).shape == (2, 4)  # as a layer it need not be traced


class Trained(nn.Module):
    """A layer that reads its mode in code that tracing would freeze, and takes a second argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        x = F.dropout(self.a(x) * scale, 0.5, self.training)
        return self.b(x)


def test_the_mode_is_that_of_now_and_not_of_the_tracing():
    net = Trained()
    wrapped = models.from_module(net, ["a"])
    x = torch.rand(50, 4)
    for training in (True, False, True):
        net.train(training)
        wrapped.train(training)
        torch.manual_seed(0)
        expected = net(x)
        torch.manual_seed(0)
        assert torch.equal(wrapped(x), expected)
    copied = copy.deepcopy(wrapped).eval()
    assert torch.equal(copied(x), net.eval()(x))


def test_frozen_layers_stay_in_their_mode():
    net = MADE["resnet18"]().train()
    net.bn1.eval()
    wrapped = models.from_module(net, resnet_layers(net))
    assert wrapped.training
    assert not net.bn1.training


def test_names_that_do_not_fit_are_named():
    net = MADE["resnet18"]()
    with pytest.raises(ValueError, match=r"^layers: got 'layer1.2', expected .* did you mean 'layer1.1'\?"):
        models.from_module(net, ["layer1.0", "layer1.2"])
    with pytest.raises(ValueError, match=r"^layers: got none"):
        models.from_module(net, [])
    with pytest.raises(TypeError, match=r"^layers: got str, expected a sequence of names"):
        models.from_module(net, "layer1")
    with pytest.raises(ValueError, match=r"^layers: got 'layer1.0' twice"):
        models.from_module(net, ["layer1.0", "layer1.0"])
    with pytest.raises(ValueError, match=r"^layers: got 'layer1.0', which lies in 'layer1'"):
        models.from_module(net, ["layer1", "layer1.0"])
    with pytest.raises(TypeError, match=r"^net: got function"):
        models.from_module(lambda x: x, ["a"])
    # The order of the names does not matter, but the order of the network does.
    assert models.from_module(net, ["layer2", "layer1"]).names == ("layer1", "layer2")
    with pytest.raises(ValueError, match=r"^layers: 'b' is called 0 times, expected once"):
        models.from_module(Once(), ["a", "b"])
    with pytest.raises(ValueError, match=r"^layers: 'a' is called 2 times, expected once"):
        models.from_module(Twice(), ["a"])
    with pytest.raises(ValueError, match=r"^net: got a network that needs 'x' and 'mask', expected .* a single input"):
        models.from_module(Masked(), ["a"])


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Twice(Once):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


class Masked(Once):
    def forward(self, x: Tensor, mask: Tensor, **more: object) -> Tensor:
        return self.a(x) * mask


def test_arguments_with_defaults_keep_them():
    class Optional(Once):
        def forward(self, x: Tensor, mask: Tensor | None = None, **more: object) -> Tensor:
            x = self.a(x) if mask is None else self.a(x) * mask
            return self.b(x)

    net = Optional()
    x = torch.rand(2, 4)
    assert torch.equal(models.from_module(net, ["a", "b"])(x), net(x))
    assert torch.equal(models.from_module(net, ["b"])(x), net(x))


def test_checks_between_two_layers_are_no_block():
    """A block that does nothing would be a further step, in which the costate acts once more."""

    class Checked(Once):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._assert(x.shape[1] == 4, "width")
            return self.b(x)

    wrapped = models.from_module(Checked(), ["a", "b"])
    assert wrapped.names == ("a", "b")
    assert wrapped(torch.rand(2, 4)).shape == (2, 4)
