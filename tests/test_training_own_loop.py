"""A defence in your own training loop: three lines, any targets, any loss; statistics move once."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_training import config, tiny_data, tiny_net
from torch import Tensor, nn

import odeadv
from odeadv import models
from odeadv.training import Layerwise, Penalty, Undefended, train

ETA = 5.0


def resnet() -> models.PreActResNet:
    return models.preact_resnet(8, 4, 10, generator=torch.Generator().manual_seed(0)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8)


def test_three_lines():
    net, (images, labels) = resnet(), batch()
    passed = Layerwise("strang", eta=ETA)(net, images, labels)
    passed.loss.backward()
    assert passed.logits.shape == (8, 10)
    assert all(p.grad is not None for p in net.parameters())
    twin = resnet()
    expected = odeadv.solve(twin.field(images, labels, eta=ETA), scheme="strang")
    assert torch.equal(passed.loss, expected.loss)


def by_hand(net: models.PreActResNet, images: Tensor, loss: object) -> Tensor:
    """Eq. 5 with any loss of the logits, in evaluation mode."""
    states = [net.stem(images)]
    for block in net.blocks:
        states.append(block(states[-1]))
    a = torch.autograd.grad(loss(net.head(states[-1])), states)
    x = net.stem(images)
    for n, block in enumerate(net.blocks):
        x = block(x) + ETA * a[n + 1]
    return loss(net.head(x))


@pytest.mark.parametrize("kind", ["soft", "mixup", "regression", "smoothing"])
def test_targets_that_are_not_class_numbers(kind):
    net, (images, labels) = resnet().eval(), batch()
    noise = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(labels, 10).double()
    targets, loss = {
        "soft": (noise.softmax(1), None),
        "mixup": (0.6 * one_hot + 0.4 * one_hot.flip(0), None),
        "regression": (noise, F.mse_loss),
        "smoothing": (labels, nn.CrossEntropyLoss(label_smoothing=0.1)),
    }[kind]
    value = loss or F.cross_entropy
    passed = Layerwise("lie", eta=ETA)(net, images, targets, loss=loss)
    assert torch.allclose(passed.loss, by_hand(net, images, lambda logits: value(logits, targets)), rtol=1e-10)
    assert torch.allclose(passed.loss, value(passed.logits, targets), rtol=1e-12)
    plain = Undefended()(net, images, targets, loss=loss)
    assert torch.allclose(plain.loss, value(net(images), targets), rtol=1e-12)
    assert Penalty(eta=1e-3)(net, images, targets, loss=loss).loss > plain.loss
    with pytest.raises(TypeError, match=r"^loss: got str, expected a callable loss\(output, targets\)"):
        Layerwise("lie", eta=ETA)(net, images, targets, loss="mse")


def test_statistics_move_once_and_the_mode_is_kept():
    net, (images, labels) = resnet(), batch()
    net.blocks[0].eval()  # frozen by its user
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    Layerwise("strang", eta=0.0)(net, images, labels)
    twin = resnet()
    twin.blocks[0].eval()
    twin(images)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    net.load_state_dict(before)
    Layerwise("strang", eta=ETA)(net, images, labels)
    assert [module.training for module in net.modules()] == modes
    counts = {int(b) for name, b in net.named_buffers() if "num_batches" in name and not name.startswith("blocks.0.")}
    assert counts == {1}


@pytest.mark.parametrize(
    "defence",
    [
        Undefended(),
        Penalty(eta=0.0),
        Layerwise("lie", eta=0.0),
        Layerwise("strang", eta=0.0),
        *(Layerwise("lie", eta=0.0, perturbation=kind) for kind in ("random", "shuffled", "input")),
    ],
    ids=str,
)
def test_without_eta_a_step_with_dropout_is_the_plain_one(defence):
    """The same masks, loss, gradients and random state afterwards, from the same seed, in training mode."""
    x, y = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3

    def step(loss_of):
        torch.manual_seed(3)
        layers = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(2)]
        net = models.from_blocks(nn.Linear(4, 6), layers, nn.Linear(6, 3)).train()
        loss = loss_of(net)
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters()), torch.get_rng_state()]

    plain, defended = step(lambda net: F.cross_entropy(net(x), y)), step(lambda net: defence(net, x, y).loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, defended, strict=True))


def test_a_pushed_step_draws_nothing_unless_its_directions_are_random():
    net, (images, labels) = resnet(), batch()
    before = torch.get_rng_state()
    for kind in ("costate", "input"):
        Layerwise("lie", eta=ETA, perturbation=kind)(net, images, labels)
        assert torch.equal(torch.get_rng_state(), before)
    Layerwise("lie", eta=ETA, perturbation="random")(net, images, labels)
    assert not torch.equal(torch.get_rng_state(), before)


def test_parts_of_a_batch_add_up_with_their_share():
    net, (images, labels) = resnet().eval(), batch()
    lad = Layerwise("strang", eta=ETA)
    whole = lad(net, images, labels)
    parts = [lad(net, images[k : k + 4], labels[k : k + 4], share=0.5) for k in (0, 4)]
    assert torch.allclose(torch.cat([part.logits for part in parts]), whole.logits, rtol=1e-10)


def test_a_foreign_network_learns_in_a_plain_loop():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 16), nn.Sequential(nn.Tanh(), nn.Linear(16, 16)), nn.Linear(16, 1))
    net = models.from_module(plain, layers=["1"], loss=F.mse_loss)
    lad, optimizer = Layerwise("lie", eta=0.1), torch.optim.AdamW(net.parameters(), lr=1e-2)
    x = torch.rand(64, 2)
    y = (x[:, :1] * x[:, 1:]).detach()
    first = F.mse_loss(plain(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        lad(net, x, y).loss.backward()
        optimizer.step()
    assert F.mse_loss(plain(x), y).item() < 0.2 * first


def test_the_loggers_of_the_page_fit(monkeypatch):
    """Loggers are not dependencies, so functions with the same signatures replace them."""
    logged = []

    class Run:
        def log(self, data, step=None, commit=None):
            logged.append(("wandb", step, data["loss"]))

    class SummaryWriter:
        def add_scalar(self, tag, scalar_value, global_step=None):
            if tag == "loss":
                logged.append(("tensorboard", global_step, scalar_value))

    def log_metrics(metrics, step=None):
        logged.append(("mlflow", step, metrics["loss"]))

    stand_ins = {
        "wandb": types.SimpleNamespace(init=lambda project: Run()),
        "mlflow": types.SimpleNamespace(log_metrics=log_metrics),
        "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=SummaryWriter),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (program,) = (each for each in re.findall(r"```py\n(.*?)```", page, re.S) if "import wandb" in each)
    exec(program, {"net": tiny_net(), "digits": tiny_data(), "config": config(epochs=1, milestones=()), "train": train})
    assert [(name, step) for name, step, _ in logged] == [("wandb", 1), ("mlflow", 1), ("tensorboard", 1)]


def test_the_lightning_module_of_the_page_returns_the_loss(monkeypatch):
    """Lightning is not a dependency: a module replaces its base class."""

    class Module(nn.Module):
        def log(self, name, value):
            logged.append(name)

    class Trainer:
        def __init__(self, max_epochs):
            self.epochs = max_epochs

        def fit(self, module, loader):
            optimizer = module.configure_optimizers()
            for number, each in enumerate(loader):
                optimizer.zero_grad()
                module.training_step(each, number).backward()
                optimizer.step()

    logged: list[str] = []
    monkeypatch.setitem(sys.modules, "lightning", types.SimpleNamespace(LightningModule=Module, Trainer=Trainer))
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "own_loop.md").read_text(encoding="utf-8")
    (program,) = (each for each in re.findall(r"```py\n(.*?)```", page, re.S) if "import lightning" in each)
    net, (images, labels) = resnet(), batch()
    exec(program, {"net": net, "images": images, "labels": labels})
    assert set(logged) == {"loss"}
    assert all(p.grad is not None for p in net.parameters())
