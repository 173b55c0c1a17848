"""Training: the losses it minimises, its reproducibility, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odeadv.data import Batches, ImageDataset
from odeadv.models import preact_resnet
from odeadv.training import TrainConfig, TrainingDiverged, train


def tiny_data(images: int = 20, classes: int = 3) -> ImageDataset:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(images) % classes
    pixels = torch.randint(0, 256, (images, 8, 8, 3), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(images), 0, labels] = 255
    return ImageDataset("tiny", "made here", pixels, labels, pixels, labels, classes, flip=False)


def tiny_net(seed: int = 0) -> torch.nn.Module:
    return preact_resnet(8, 4, 3, generator=torch.Generator().manual_seed(seed))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "milestones": (1,), "channels_last": False, **changes})


def lad_by_hand(net, images: Tensor, labels: Tensor, eta: float) -> Tensor:
    """Eq. 5 written out, with the recording on the same batch statistics."""
    twin = preact_resnet(8, 4, 3)
    twin.load_state_dict(net.state_dict())
    twin.train()
    xs = [twin.stem(images)]
    for block in twin.blocks:
        xs.append(block(xs[-1]))
    a = torch.autograd.grad(F.cross_entropy(twin.head(xs[-1]), labels), xs)
    x = net.stem(images)
    for n, block in enumerate(net.blocks):
        x = block(x) + eta * a[n + 1]
    return F.cross_entropy(net.head(x), labels)


@pytest.mark.parametrize(("scheme", "eta"), [(None, 0.0), ("lie", 5.0)])
def test_training_is_sgd_on_the_loss_of_the_formulas(scheme, eta):
    data, settings = tiny_data(), config(scheme=scheme, eta=eta, seed=3)
    trained = tiny_net()
    results = train(trained, data, settings)

    by_hand = tiny_net().train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batches = Batches(
        data.train_images, data.train_labels, batch_size=8, shuffle=True, augment=True, flip=False, drop_last=True,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    losses = []
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1**epoch
        for images, labels in batches:
            loss = (
                F.cross_entropy(by_hand(images), labels)
                if scheme is None
                else lad_by_hand(by_hand, images, labels, eta)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert [r.loss for r in results] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5)
    assert [r.lr for r in results] == pytest.approx([0.1, 0.01])
    for (name, a), b in zip(trained.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_two_runs_of_one_seed_are_bitwise_equal_and_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nets = [tiny_net(), tiny_net()]
    for net in nets:
        train(net, tiny_data(), config(scheme="strang", eta=2.0))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    other = tiny_net()
    train(other, tiny_data(), config(scheme="strang", eta=2.0, seed=1))
    assert not torch.equal(other.stem.conv.weight, nets[0].stem.conv.weight)


def test_bf16_autocast_stays_near_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        losses[precision] = train(tiny_net(), tiny_data(), config(precision=precision, scheme="lie", eta=2.0))[0].loss
    assert losses["fp32"] != losses["bf16"]
    assert losses["fp32"] == pytest.approx(losses["bf16"], rel=0.05)


def test_callbacks_see_every_step_and_epoch():
    steps, epochs = [], []
    train(tiny_net(), tiny_data(), config(), on_step=lambda *now: steps.append(now), on_epoch=epochs.append)
    assert steps == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
    assert [result.epoch for result in epochs] == [1, 2]
    assert all(0 <= result.accuracy <= 1 for result in epochs)


def test_divergence_stops_with_the_step_and_a_hint():
    with pytest.raises(
        TrainingDiverged, match=r"^training: epoch \d, step \d: .*lower lr \(1e\+30\) or eta \(2 at batch"
    ):
        train(tiny_net(), tiny_data(), config(scheme="lie", eta=2.0, lr=1e30))


def test_learning_rate_schedule_is_the_papers():
    paper = TrainConfig()
    assert [paper.learning_rate(epoch) for epoch in (0, 79, 80, 119, 120, 159)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "^epochs: got 0"),
        ({"batch_size": 0}, "^batch_size: got 0"),
        ({"lr": -1.0}, r"^lr: got -1\.0"),
        ({"eta": float("nan"), "scheme": "lie"}, "^eta: got nan"),
        ({"precision": "fp8"}, "^precision: got 'fp8'"),
        ({"scheme": "strong"}, "^scheme: 'strong' is not known"),
        ({"eta": 1.0}, r"^eta: got 1\.0 without a scheme"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match=r"^batch_size: got 64 for 20 training images"):
        train(tiny_net(), tiny_data(), config(batch_size=64))
