"""The residual MLP: a network of linear layers that is a field."""

import pytest
import torch

import odeadv
from odeadv import models


@pytest.fixture
def net():
    return models.residual_mlp(3, 16, image_size=8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 8, 8, generator=generator), torch.arange(5)


def test_the_plain_solve_is_the_network_bit_for_bit(net, batch):
    solution = odeadv.solve(net.field(*batch))
    assert torch.equal(solution.output, net(batch[0]))
    x = net.stem(batch[0])
    for block in net.blocks:
        x = block(x)
    assert torch.equal(net.head(x), net(batch[0]))


def test_lad_is_equation_5_written_out(net, batch):
    images, labels = batch
    eta = 10.0
    states = [net.stem(images)]
    for block in net.blocks:
        states.append(block(states[-1]))
    loss = torch.nn.functional.cross_entropy(net.head(states[-1]), labels)
    costates = torch.autograd.grad(loss, states)
    x = net.stem(images)
    for n, block in enumerate(net.blocks):
        x = block(x) + eta * costates[n + 1]
    solution = odeadv.solve(net.field(images, labels, eta), scheme="lie")
    torch.testing.assert_close(solution.output, net.head(x), rtol=1e-5, atol=1e-6)
    assert solution.loss.item() > loss.item() + 1e-3


def test_it_is_built_by_its_configuration_with_the_same_weights(net):
    again = models.build(**net.config, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    other = models.build(**net.config, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(net.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (torch.rand(2, 3, 9, 9), ValueError, r"images: got shape \(2, 3, 9, 9\), expected \(n, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "divide by 255"),
        ([1.0], TypeError, "images: got list, expected a tensor"),
    ],
)
def test_other_images_are_rejected_by_name(net, images, error, says):
    with pytest.raises(error, match=says):
        net.field(images, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["blocks", "width", "num_classes", "image_size"])
def test_sizes_are_checked_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}: got 0, expected"):
        models.residual_mlp(**{name: 0})
    with pytest.raises(TypeError, match=rf"^{name}: got 2\.0, expected"):
        models.residual_mlp(**{name: 2.0})


def test_statistics_are_one_per_channel():
    with pytest.raises(ValueError, match=r"^mean, std: got 1 and 3 values"):
        models.residual_mlp(mean=(0.5,))
