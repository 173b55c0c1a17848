"""Training: the losses it minimises, its reproducibility, and what it refuses."""

import functools
import io
import re
import sys
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from odeadv import attacks
from odeadv.data import Batches, ImageDataset, to_float
from odeadv.models import from_blocks, ode_net, preact_resnet
from odeadv.solver import solve
from odeadv.splitting import Grid, schemes
from odeadv.support.plain import from_dict, key, to_dict
from odeadv.training import (
    CheckpointWarning,
    Draws,
    Layerwise,
    Natural,
    Objective,
    Passed,
    Penalty,
    Pgd,
    Trades,
    TrainConfig,
    TrainingDiverged,
    Undefended,
    train,
)
from odeadv.training._step import StepModule

LAD = Layerwise("lie", 2.0)
LAD_SM = Layerwise("strang", 2.0)

pytestmark = pytest.mark.filterwarnings("ignore:eta. .* is for the mean over batches of 8:UserWarning")


def tiny_data(images: int = 20, classes: int = 3) -> ImageDataset:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(images) % classes
    pixels = torch.randint(0, 256, (images, 8, 8, 3), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(images), 0, labels] = 255
    return ImageDataset("tiny", "made here", pixels, labels, pixels, labels, classes, flip=False)


def tiny_net(seed: int = 0, **changes) -> torch.nn.Module:
    return preact_resnet(8, 4, 3, generator=torch.Generator().manual_seed(seed), **changes)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "milestones": (1,), "channels_last": False, **changes})


def costates_by_hand(net, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return dL/dx_n by back-propagation through a copy, so that statistics are not updated."""
    twin = preact_resnet(8, 4, 3, mean=net.stem.mean.flatten().tolist(), std=net.stem.std.flatten().tolist())
    twin.to(images.dtype).load_state_dict(net.state_dict())
    twin.train()
    xs = [twin.stem(images)]
    for block in twin.blocks:
        xs.append(block(xs[-1]))
    return torch.autograd.grad(F.cross_entropy(twin.head(xs[-1]), labels), xs)


def lad_by_hand(net, images: Tensor, labels: Tensor, eta: float, a: tuple[Tensor, ...] | None = None) -> Tensor:
    """Eq. 5 written out."""
    a = costates_by_hand(net, images, labels) if a is None else a
    x = net.stem(images)
    for n, block in enumerate(net.blocks):
        x = block(x) + eta * a[n + 1]
    return F.cross_entropy(net.head(x), labels)


def batch(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(n) % 3


def loss_of(objective, defence, net, images, labels, seed: int = 0) -> Tensor:
    module = StepModule(net, objective, defence)
    return module(images, labels, Draws(seed, 0, slice(0, len(labels)), len(labels)), 1.0)[0]


class TestLosses:
    @pytest.mark.parametrize("defence", [Undefended(), Layerwise("lie", 5.0)])
    def test_training_is_sgd_on_the_loss_of_the_formulas(self, defence):
        data, settings = tiny_data(), config(defence=defence, seed=3)
        trained = tiny_net()
        results = train(trained, data, settings).epochs

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
                plain = isinstance(defence, Undefended)
                logits_loss = F.cross_entropy(by_hand(images), labels) if plain else None
                loss = lad_by_hand(by_hand, images, labels, 5.0) if logits_loss is None else logits_loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert [r.loss for r in results] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5)
        assert [r.lr for r in results] == pytest.approx([0.1, 0.01])
        for (name, a), b in zip(trained.state_dict().items(), by_hand.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name

    @pytest.mark.parametrize("defended", [False, True])
    def test_pgd_is_the_loss_of_attacked_images(self, defended):
        images, labels = batch()
        net = tiny_net().train()
        noise = Draws(5, 0, slice(0, 6), 6).uniform(images)
        eps, alpha = 8 / 255, 2 / 255
        x = (images + eps * (2 * noise - 1)).clamp(images - eps, images + eps).clamp(0, 1)
        twin = tiny_net().eval()
        for _ in range(3):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(twin(x), labels), x)
            x = (x + alpha * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1).detach()
        expected = lad_by_hand(tiny_net().train(), x, labels, 2.0) if defended else F.cross_entropy(net(x), labels)
        found = loss_of(Pgd(steps=3), LAD if defended else Undefended(), tiny_net().train(), images, labels, seed=5)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("start", ["free", "clamped"])
    @pytest.mark.parametrize("defended", [False, True])
    def test_trades_is_the_loss_of_spec_section_4(self, defended, start):
        images, labels = batch()
        eps, alpha, lam, gamma = 8 / 255, 2 / 255, 1 / 6, 0.3
        images = (images * 1.2 - 0.1).clamp(0, 1)  # so that many pixels start outside [0, 1]
        x = images + 0.001 * Draws(5, 0, slice(0, 6), 6).normal(images)
        if start == "clamped":
            x = x.clamp(0, 1)
        twin = tiny_net().eval()
        with torch.no_grad():
            target = twin(images).softmax(1)
        for _ in range(3):
            x = x.detach().requires_grad_()
            kl = (target * (target.log() - twin(x).log_softmax(1))).sum()
            (gradient,) = torch.autograd.grad(kl, x)
            x = (x + alpha * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1).detach()
        net = tiny_net().train()
        clean, attacked = net(images), net(x)
        p = clean.softmax(1)
        kl = (p * (p.log() - attacked.log_softmax(1))).sum(1).mean()
        ce = F.cross_entropy(clean, labels)
        expected = ce + kl / lam
        if defended:
            lad = lad_by_hand(tiny_net().train(), x, labels, 2.0)
            expected = gamma * ce + (1 - gamma) * lad + kl / lam
        objective = Trades(steps=3, lam=lam, gamma=gamma, start=start)
        found = loss_of(objective, LAD if defended else Undefended(), tiny_net().train(), images, labels, seed=5)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)

    def test_a_record_from_before_the_start_of_trades_was_a_choice_keeps_its_meaning_and_key(self):
        old = {
            "name": "trades",
            "eps": 8 / 255,
            "alpha": 2 / 255,
            "steps": 10,
            "mode": "eval",
            "lam": 1 / 6,
            "gamma": 0.5,
        }
        assert from_dict(Objective, old) == Trades(start="clamped")
        assert key(TrainConfig(objective=Trades(start="clamped"))) == "3ec4e797a8c814fe"
        assert key(TrainConfig(objective=Trades())) != "3ec4e797a8c814fe"
        assert from_dict(Objective, {"name": "trades", "steps": 10}) == from_dict(Objective, "trades") == Trades()
        assert from_dict(Objective, to_dict(Trades())) == Trades()

    def test_gradients_of_trades_reach_both_sides_of_the_divergence(self):
        images, labels = batch()
        net = tiny_net().train()
        objective = Trades(steps=1)
        loss_of(objective, Undefended(), net, images, labels).backward()
        found = net.head[4].weight.grad.clone()
        twin = tiny_net().train()
        start = images + 0.001 * Draws(0, 0, slice(0, 6), 6).normal(images)
        x = attacks.ifgsm(twin, images, labels, eps=8 / 255, alpha=2 / 255, steps=1, loss="kl", start=start)
        clean, attacked = twin(images), twin(x)
        p = clean.softmax(1)
        kl = (p * (p.log() - attacked.log_softmax(1))).sum(1).mean()
        (F.cross_entropy(clean, labels) + 6 * kl).backward()
        assert torch.allclose(found, twin.head[4].weight.grad, rtol=1e-4, atol=1e-6)

    def test_the_gradient_of_lad_holds_the_costate_constant(self):
        images, labels = batch(dtype=torch.float64)
        net = tiny_net().double().train()
        loss_of(Natural(), LAD, net, images, labels).backward()
        a = costates_by_hand(net, images, labels)
        for weight in (net.stem.conv.weight, net.blocks[1].conv2.weight, net.head[4].bias):
            index = weight.numel() // 2
            h, values = 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.view(-1)[index] += sign * h
                    values.append(lad_by_hand(net, images, labels, 2.0, a).item())
                    weight.view(-1)[index] -= sign * h
            assert weight.grad.view(-1)[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


class TestAblations:
    def test_random_directions_have_the_costates_norms(self, monkeypatch):
        images, labels = batch()
        net = tiny_net().train()
        seen = {}
        real = net.field

        def field(*arguments, **keywords):
            made = real(*arguments, **keywords)
            transformed = made.transformed

            def spying(transform):
                def spy(nodes):
                    seen["before"], seen["after"] = list(nodes), list(transform(nodes))
                    return seen["after"]

                return transformed(spy)

            made.transformed = spying
            return made

        monkeypatch.setattr(net, "field", field)
        for perturbation in ("random", "shuffled", "input"):
            loss_of(Natural(), Layerwise("lie", 2.0, perturbation=perturbation), net, images, labels)
            before, after = seen["before"], seen["after"]
            if perturbation == "random":
                for a, b in zip(before, after, strict=True):
                    assert torch.allclose(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1), rtol=1e-4)
                    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
                    assert abs(cosine) < 0.2
            elif perturbation == "shuffled":
                order = Draws(0, 0, slice(0, 6), 6).permutation(6, images.device)
                assert not torch.equal(order, torch.arange(6))
                assert all(torch.equal(a[order], b) for a, b in zip(before, after, strict=True))
            else:
                assert torch.equal(before[0], after[0])
                assert not any(node.any() for node in after[1:])

    def test_input_only_is_one_step_up_the_loss_at_the_stem(self):
        images, labels = batch()
        net = tiny_net().train()
        a = costates_by_hand(net, images, labels)
        x = net.stem(images) + 2.0 * a[0]
        for block in net.blocks:
            x = block(x)
        expected = F.cross_entropy(net.head(x), labels)
        found = loss_of(Natural(), Layerwise("lie", 2.0, perturbation="input"), tiny_net().train(), images, labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_eta_zero_is_the_plain_loss_bit_for_bit(self):
        images, labels = batch()
        plain = loss_of(Natural(), Undefended(), tiny_net().train(), images, labels)
        assert torch.equal(plain, loss_of(Natural(), Layerwise("strang", 0.0), tiny_net().train(), images, labels))


class TestState:
    @pytest.mark.parametrize("objective", [Natural(), Pgd(steps=2), Pgd(steps=2, mode="train")])
    @pytest.mark.parametrize("defence", [Undefended(), LAD, Layerwise("strang-midpoint", 2.0)])
    def test_statistics_are_updated_once_a_step(self, objective, defence):
        images, labels = batch()
        net = tiny_net().train()
        loss_of(objective, defence, net, images, labels)
        assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1}
        assert net.training
        assert all(p.grad is None and p.requires_grad for p in net.parameters())

    def test_two_runs_of_one_seed_are_bitwise_equal_and_the_global_random_state_is_left_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        settings = config(objective=Pgd(steps=2), defence=LAD_SM)
        nets = [tiny_net(noise=0.1) for _ in range(2)]
        for net in nets:
            train(net, tiny_data(), settings)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
        other = tiny_net(noise=0.1)
        train(other, tiny_data(), replace(settings, seed=1))
        assert not torch.equal(other.stem.conv.weight, nets[0].stem.conv.weight)

    def test_draws_do_not_depend_on_how_a_batch_is_spread(self):
        whole = Draws(1, 5, slice(0, 8), 8).uniform(torch.empty(8, 3))
        parts = [Draws(1, 5, slice(i, i + 2), 8).uniform(torch.empty(2, 3)) for i in (0, 2, 4, 6)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, Draws(1, 6, slice(0, 8), 8).uniform(torch.empty(8, 3)))
        assert not torch.equal(whole, Draws(2, 5, slice(0, 8), 8).uniform(torch.empty(8, 3)))

    @pytest.mark.parametrize("native", [True, False])
    def test_bf16_that_is_only_imitated_gives_a_warning(self, native, monkeypatch):
        monkeypatch.setattr("odeadv.support.precision.bf16_is_native", lambda device: native)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for precision in ("bf16", "fp32"):
                train(tiny_net(), tiny_data(), config(precision=precision, epochs=1, milestones=()))
        said = [str(warning.message) for warning in caught if "imitated" in str(warning.message)]
        assert len(said) == (0 if native else 1)
        assert native or said[0].startswith("precision: 'bf16' is imitated on this CPU")

    @pytest.mark.filterwarnings("ignore:precision:RuntimeWarning")
    def test_bf16_autocast_stays_near_fp32(self):
        losses = {}
        for precision in ("fp32", "bf16"):
            losses[precision] = train(tiny_net(), tiny_data(), config(precision=precision, defence=LAD)).epochs[0].loss
        assert losses["fp32"] != losses["bf16"]
        assert losses["fp32"] == pytest.approx(losses["bf16"], rel=0.05)


class TestEta:
    """eta belongs to the mean over the whole batch, however it is computed."""

    def net(self):
        # Group norm: no statistics over the batch, so that micro-batches must give exactly the same mean gradient.
        return ode_net(width=4, num_classes=3, steps=2, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("objective", [Natural(), Pgd(steps=2), Trades(steps=2)])
    def test_accumulation_gives_the_same_gradient(self, objective):
        nets = [self.net() for _ in range(2)]
        settings = config(objective=objective, defence=Layerwise("lie", 20.0), epochs=1)
        losses = [
            train(net, tiny_data(8), replace(settings, accumulate=parts)).epochs[0].loss  # one step
            for net, parts in zip(nets, (1, 4), strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        plain = self.net()
        train(plain, tiny_data(8), config(objective=objective, epochs=1))
        assert max((a - b).abs().max() for a, b in zip(nets[0].parameters(), plain.parameters(), strict=True)) > 1e-3

    def test_the_ratio_of_eq_16_is_that_of_the_whole_batch(self):
        """The images of a batch are equal, so the ratio of a part, once scaled, is that of the batch."""
        data = tiny_data(8)
        same = replace(
            data,
            train_images=data.train_images[:1].expand(8, -1, -1, -1).contiguous(),
            train_labels=torch.zeros(8).long(),
        )
        found = [
            train(self.net(), same, config(lr=0.0, epochs=1, accumulate=parts, defence=LAD)).epochs[0]
            for parts in (1, 2, 4)
        ]
        ratios = [epoch.ratio for epoch in found]
        assert ratios == pytest.approx([ratios[0]] * 3, rel=0.6)  # crops differ; unscaled it would be 1/2 and 1/4
        assert [epoch.relative[0] for epoch in found] == pytest.approx([found[0].relative[0]] * 3, rel=0.4)

    @pytest.mark.filterwarnings("default")
    def test_a_batch_size_other_than_the_papers_says_what_eta_would_be(self):
        with pytest.warns(UserWarning, match=r"^eta: 2 is for the mean over batches of 8; .* eta = 32$"):
            train(tiny_net(), tiny_data(), config(defence=LAD, epochs=1))


@functools.cache
def uninterrupted(accumulate: int):
    """Return the network and the result of a run that was not stopped, for all tests of `TestResuming`."""
    return TestResuming().run(accumulate=accumulate)


class TestResuming:
    def run(self, folder=None, stop_at=(), every=0.0, **changes):
        """Train, stopping by an exception after the steps ``stop_at`` and going on in a new network each time."""
        settings = config(objective=Pgd(steps=1), defence=LAD_SM, epochs=3, **changes)
        steps = 0

        class StopHereError(Exception):
            pass

        def on_step(*_):
            nonlocal steps
            steps += 1
            if steps in stop_at:
                raise StopHereError

        while True:
            net = tiny_net(noise=0.05)
            try:
                result = train(
                    net, tiny_data(), settings, validation=(tiny_data().test_images, tiny_data().test_labels),
                    checkpoints=folder, checkpoint_every=every, on_step=on_step,
                )  # fmt: skip
            except StopHereError:
                continue
            return net, result

    @pytest.mark.parametrize("stop_at", [(1,), (2,), (3, 5), (1, 2, 3, 4, 5)])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_an_interrupted_run_ends_with_the_same_bits(self, tmp_path, stop_at, accumulate):
        whole, expected = uninterrupted(accumulate)
        resumed, found = self.run(tmp_path, stop_at, accumulate=accumulate)
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        for a, b in zip(expected.epochs, found.epochs, strict=True):
            assert replace(a, seconds=0.0) == replace(b, seconds=0.0)
        assert expected.best_epoch == found.best_epoch
        assert all(torch.equal(value, found.best[name]) for name, value in expected.best.items())

    @pytest.mark.parametrize("damage", ["truncated", "altered"])
    def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(self, tmp_path, damage):
        whole, _ = uninterrupted(1)
        with pytest.raises(KeyboardInterrupt):
            self.interrupted(tmp_path)
        older, newest = sorted(tmp_path.glob("*.safetensors"))
        content = bytearray(newest.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        else:
            content[-5] ^= 1
        newest.write_bytes(content)
        with pytest.warns(CheckpointWarning, match=f"checkpoint refused: {re.escape(str(newest))}"):
            resumed, _ = self.run(tmp_path)
        assert older.name != newest.name
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    def interrupted(self, folder):
        def on_step(epoch, step, steps):
            if (epoch, step) == (2, 2):
                raise KeyboardInterrupt

        settings = config(objective=Pgd(steps=1), defence=LAD_SM, epochs=3)
        validation = (tiny_data().test_images, tiny_data().test_labels)
        train(
            tiny_net(noise=0.05), tiny_data(), settings, validation=validation, checkpoints=folder,
            checkpoint_every=0.0, on_step=on_step,
        )  # fmt: skip

    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path):
        train(tiny_net(), tiny_data(), config(), checkpoints=tmp_path)
        with pytest.raises(ValueError, match="is the checkpoint of another run"):
            train(tiny_net(), tiny_data(), config(lr=0.2), checkpoints=tmp_path)

    def test_a_full_disk_leaves_the_checkpoints_there_are(self, tmp_path, monkeypatch):
        from odeadv.support import files as _files

        real = _files._sync
        written = []

        def full(path):
            if len(written) == 1:
                raise OSError(28, "No space left on device")
            written.append(path)
            real(path)

        monkeypatch.setattr(_files, "_sync", full)
        with pytest.raises(OSError, match=r"^checkpoint: .*No space left.*free some space"):
            train(tiny_net(), tiny_data(), config(), checkpoints=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.safetensors"]
        monkeypatch.undo()
        resumed, whole = tiny_net(), tiny_net()
        train(resumed, tiny_data(), config(), checkpoints=tmp_path)
        train(whole, tiny_data(), config())
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class TestSeeing:
    def test_callbacks_see_every_step_and_epoch(self):
        steps, epochs = [], []
        train(tiny_net(), tiny_data(), config(), on_step=lambda *now: steps.append(now), on_epoch=epochs.append)
        assert steps == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
        assert [result.epoch for result in epochs] == [1, 2]
        assert all(0 <= result.accuracy <= 1 for result in epochs)

    def test_a_logger_gets_numbers_and_progress_is_silent_when_piped(self, capsys):
        logged = []
        images = tiny_data()
        result = train(
            tiny_net(), images, config(defence=LAD), logger=lambda values, epoch: logged.append((epoch, values)),
            validation=(images.test_images, images.test_labels),
        )  # fmt: skip
        assert capsys.readouterr() == ("", "")
        assert [epoch for epoch, _ in logged] == [1, 2]
        values, last = logged[-1][1], result.epochs[-1]
        assert (values["loss"], values["validation/clean"]) == (last.loss, last.validation["clean"])
        assert values["relative/1"] == last.relative[1]
        assert all(isinstance(value, float) for value in values.values())

        loss, accuracy, ratio, strength = (axes.lines for axes in result.plot().axes)
        assert list(loss[0].get_ydata()) == [epoch.loss for epoch in result.epochs]
        assert [line.get_label() for line in accuracy[:2]] == ["training", "clean"]
        assert list(ratio[0].get_ydata()) == [epoch.ratio for epoch in result.epochs]
        assert list(strength[0].get_ydata()) == [epoch.strength for epoch in result.epochs]

    def test_on_a_terminal_there_is_a_bar(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("sys.stderr", Terminal())
        result = train(tiny_net(), tiny_data(), config())
        shown = sys.stderr.getvalue()
        assert "training: 100%" in shown
        assert f"loss {result.epochs[0].loss:.4g}" in shown
        before = len(shown)
        train(tiny_net(), tiny_data(), config(epochs=1), progress=False)
        assert len(sys.stderr.getvalue()) == before

    def test_the_ratio_and_the_perturbation_of_every_layer_are_measured(self):
        epochs = train(tiny_net(), tiny_data(), config(defence=LAD)).epochs
        assert all(result.ratio > 0 and len(result.relative) == 4 and min(result.relative) > 0 for result in epochs)
        assert set(train(tiny_net(), tiny_data(), config()).epochs[0].relative) == {0.0}

    def test_the_best_epoch_is_the_first_with_the_highest_validation_accuracy(self):
        data = tiny_data()
        result = train(tiny_net(), data, config(epochs=4), validation=(data.test_images, data.test_labels))
        scores = [epoch.validation["clean"] for epoch in result.epochs]
        assert result.best_epoch == scores.index(max(scores)) + 1
        net = tiny_net()
        again = train(net, data, config(epochs=4))
        assert again.best is None
        robust = train(
            tiny_net(), data, config(objective=Pgd(steps=1)), validation=(data.test_images, data.test_labels)
        )
        assert set(robust.epochs[0].validation) == {"clean", "robust"}

    def test_divergence_stops_with_the_step_the_layer_and_a_hint(self, tmp_path):
        with pytest.raises(
            TrainingDiverged,
            match=r"^training: epoch \d, step \d: .*lower lr \(1e\+30\) or eta \(2 at batch size 8\)",
        ):
            train(tiny_net(), tiny_data(), config(defence=LAD, lr=1e30))
        with pytest.raises(
            TrainingDiverged,
            match=r"the loss is \d.*\|\|eta a_n\|\| / \|\|x_n\|\| is largest at layer \d \(.*last good",
        ):
            train(tiny_net(), tiny_data(), config(defence=LAD, stop_above=1e-3), checkpoints=self.one_epoch(tmp_path))

    def one_epoch(self, folder):
        (folder / "step-00000000.safetensors").write_bytes(b"")
        warnings.simplefilter("ignore")
        return folder


@dataclass(frozen=True)
class LogitDecay(Objective, name="test-logit-decay"):
    """An objective that a user wrote."""

    weight: float = 0.1

    def __call__(self, step) -> Passed:
        passed = step.defended(step.images)
        return Passed(passed.loss + self.weight * passed.logits.square().mean(), passed.logits)


def test_an_objective_of_ones_own_goes_with_every_defence():
    images, labels = batch()
    for defence in (Undefended(), LAD):
        plain = loss_of(Natural(), defence, tiny_net().train(), images, labels)
        mine = loss_of(LogitDecay(0.5), defence, tiny_net().train(), images, labels)
        assert mine > plain
    train(tiny_net(), tiny_data(), config(objective=LogitDecay(), defence=LAD))


class TestStrength:
    """s = L_LAD / L - 1, and its first order eta sum |a_n|^2 / L."""

    def epoch(self, defence, accumulate: int = 1, **changes):
        """One step without a learning rate: the record belongs to the weights at the beginning."""
        data = changes.pop("data", tiny_data(8))
        settings = config(lr=0.0, epochs=1, augment="none", defence=defence, accumulate=accumulate, **changes)
        return train(tiny_net(), data, settings).epochs[0]

    def batch(self):
        """The one batch of an epoch of 8 images, in the order of seed 0."""
        data = tiny_data(8)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        return to_float(data.train_images[order]), data.train_labels[order]

    @pytest.mark.parametrize("eta", [0.01, 2.0])
    def test_lad_s_rise_of_the_loss_is_recorded_with_its_first_order(self, eta):
        images, labels = self.batch()
        a = costates_by_hand(tiny_net(), images, labels)
        plain = F.cross_entropy(tiny_net().train()(images), labels).item()
        driven = lad_by_hand(tiny_net().train(), images, labels, eta).item()
        found = self.epoch(Layerwise("lie", eta))
        assert found.strength == pytest.approx(driven / plain - 1, rel=1e-3)
        nodes = [0.0, *(eta * node.square().sum().item() / plain for node in a[1:])]
        assert found.strength_nodes == pytest.approx(nodes, rel=1e-4)
        assert found.strength_first_order == pytest.approx(sum(nodes), rel=1e-4)
        assert found.eta == eta

    @pytest.mark.parametrize("scheme", ["lie", "strang", "strang-symmetric"])
    def test_the_first_order_is_the_derivative_of_the_rise(self, scheme):
        images, labels = batch(dtype=torch.float64)

        def passed(eta):
            return Layerwise(scheme, eta)(tiny_net().double().train(), images, labels)

        strength = passed(1e-4).strength
        rise = (strength.defended - strength.plain).item()
        assert strength.nodes.sum().item() == pytest.approx(rise, rel=1e-2)

    @pytest.mark.parametrize("scheme", ["lie", "strang"])
    def test_the_strength_of_a_bfloat16_network_needs_no_wide_copy_of_a_node(self, scheme):
        from odeadv.training._strength import first_order  # the sum is not public

        generator = torch.Generator().manual_seed(0)
        nodes = [torch.randn(600_000, generator=generator).bfloat16() for _ in range(3)]
        grid, largest = Grid((0.0, 1.0, 2.0), 1.0), 0

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                result = function(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                    largest = max(largest, result.numel())
                return result

        with Largest():
            found = first_order(nodes, grid, schemes.get(scheme), 1.0)
        exact = first_order([node.double() for node in nodes], grid, schemes.get(scheme), 1.0)
        assert found == pytest.approx(exact.float(), rel=1e-5)
        assert 0 < largest < 600_000

    def test_x_0_alone_has_all_of_the_strength(self):
        found = self.epoch(Layerwise("lie", 0.01, perturbation="input"))
        assert found.strength_nodes[0] == found.strength_first_order > 0
        assert found.strength == pytest.approx(found.strength_first_order, rel=0.05)

    def test_random_directions_state_the_strength_of_costates_of_their_norm_and_raise_less(self):
        lad, random = (self.epoch(Layerwise("lie", 0.1, perturbation=kind)) for kind in ("costate", "random"))
        assert random.strength_first_order == pytest.approx(lad.strength_first_order, rel=1e-3)
        assert abs(random.strength) < 0.5 * lad.strength

    def test_without_a_defence_the_strength_is_zero(self):
        for defence in (Undefended(), Layerwise("lie", 0.0)):
            found = self.epoch(defence)
            assert (found.strength, found.strength_first_order, found.strength_nodes) == (0.0, 0.0, ())

    def test_micro_batches_have_the_strength_of_the_whole_batch(self):
        images, labels = batch(8)
        net = ode_net(width=4, num_classes=3, steps=2, generator=torch.Generator().manual_seed(0))
        whole = Layerwise("strang", 0.5)(net, images, labels).strength
        parts = [Layerwise("strang", 0.5)(net, images[i : i + 2], labels[i : i + 2], share=0.25) for i in (0, 2, 4, 6)]
        nodes = sum(part.strength.nodes for part in parts) / 4
        assert torch.allclose(nodes, whole.nodes, rtol=1e-4)

    def test_recording_the_strength_adds_no_pass(self):
        net, images, labels = tiny_net().train(), *batch()
        calls = []
        net.blocks[0].conv1.register_forward_hook(lambda *_: calls.append(1))
        Layerwise("lie", 2.0)(net, images, labels)
        assert len(calls) == 2

    @pytest.mark.parametrize("objective", [Pgd(steps=1), Trades(steps=1)])
    def test_adversarial_objectives_record_the_strength_of_their_defended_pass(self, objective):
        found = self.epoch(Layerwise("lie", 0.01), objective=objective)
        assert found.strength == pytest.approx(found.strength_first_order, rel=0.05)
        assert found.strength > 0

    def test_an_objective_of_the_user_s_own_has_it_too(self):
        assert self.epoch(Layerwise("lie", 0.01), objective=LogitDecay()).strength > 0

    @pytest.mark.parametrize("defence", [Layerwise("strang", strength=0.05), Penalty(strength=0.05)])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_eta_is_chosen_for_a_strength_on_the_first_batches(self, defence, accumulate):
        found = self.epoch(defence, accumulate)
        assert found.strength_first_order == pytest.approx(0.05, rel=1e-4)
        same = self.epoch(defence.with_eta(found.eta), accumulate)
        assert replace(found, seconds=0.0) == replace(same, seconds=0.0)

    def test_a_chosen_eta_changes_nothing_else_of_a_run(self):
        nets = [tiny_net(noise=0.05) for _ in range(2)]
        chosen = train(nets[0], tiny_data(), config(defence=Layerwise("lie", strength=0.1))).epochs
        given = train(nets[1], tiny_data(), config(defence=Layerwise("lie", chosen[0].eta))).epochs
        assert [epoch.loss for epoch in chosen] == [epoch.loss for epoch in given]
        assert all(
            torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
        )

    def test_a_strength_needs_a_training_to_choose_eta_in(self):
        with pytest.raises(ValueError, match=r"^strength: got 0\.05 in a single pass, .*with_eta"):
            Layerwise(strength=0.05)(tiny_net(), *batch())
        with pytest.raises(ValueError, match=r"^warmup: got 1 in a single pass, .*with_eta"):
            Layerwise(warmup=1)(tiny_net(), *batch())

    def test_warm_up_raises_eta_step_by_step(self):
        etas = []

        @dataclass(frozen=True)
        class Spy(Layerwise, name="test-spy"):
            def __call__(self, *arguments, **keywords):
                etas.append(self.eta)
                return super().__call__(*arguments, **keywords)

        epochs = train(tiny_net(), tiny_data(), config(epochs=3, defence=Spy("lie", 2.0, warmup=2))).epochs
        assert etas == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]  # two steps per epoch
        assert [epoch.eta for epoch in epochs] == [1.0, 2.0, 2.0]

    def test_the_defaults_leave_the_names_of_runs_as_they_were(self):
        # The keys of odeadv 1.0, which records and checkpoints carry.
        assert key(TrainConfig(defence=Layerwise("strang"), objective=Pgd())) == "b7e3b9446b609d5f"


class TestPenalty:
    def by_hand(self, net, images, labels, eta):
        xs = [net.stem(images)]
        for block in net.blocks:
            xs.append(block(xs[-1]))
        loss = F.cross_entropy(net.head(xs[-1]), labels)
        nodes = torch.autograd.grad(loss, xs[1:], create_graph=True)
        return loss + 0.5 * eta * sum(node.square().sum() for node in nodes)

    def test_it_is_the_penalised_loss_and_its_gradient_goes_through_the_costate(self):
        images, labels = batch(dtype=torch.float64)
        nets = [tiny_net().double().train() for _ in range(2)]
        passed = Penalty(eta=2.0)(nets[0], images, labels)
        expected = self.by_hand(nets[1], images, labels, 2.0)
        assert passed.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        passed.loss.backward()
        expected.backward()
        for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-7, atol=1e-12), name
        plain = tiny_net().double().train()
        F.cross_entropy(plain(images), labels).backward()
        assert not torch.allclose(plain.stem.conv.weight.grad, nets[0].stem.conv.weight.grad, rtol=1e-3)
        for (name, a), b in zip(nets[0].named_buffers(), plain.buffers(), strict=True):
            assert torch.allclose(a, b), name  # statistics are updated once

    def test_the_recording_draws_the_masks_of_the_plain_pass(self):
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)]
        net = from_blocks(nn.Linear(4, 6), blocks, nn.Linear(6, 3)).double().train()
        images, labels = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
        torch.manual_seed(3)
        expected, state = self.by_hand(net, images, labels, 2.0), torch.get_rng_state()
        torch.manual_seed(3)
        passed = Penalty(eta=2.0)(net, images, labels)
        assert passed.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert torch.equal(torch.get_rng_state(), state)  # the recording leaves none behind

    def test_a_costate_that_is_recorded_later_is_that_of_the_solve(self):
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)]
        net = from_blocks(nn.Linear(4, 6), blocks, nn.Linear(6, 3)).double().train()
        images, labels = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
        torch.manual_seed(3)
        solution = solve(net.field(images, labels, eta=0.0), **net.solve_options)
        torch.rand(7)
        state = torch.get_rng_state()
        nodes = solution.costate.nodes
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(3)
        xs = [net.stem(images)]
        for block in net.blocks:
            xs.append(block(xs[-1]))
        expected = torch.autograd.grad(F.cross_entropy(net.head(xs[-1]), labels), xs)
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(nodes, expected, strict=True))

    def test_lad_is_the_penalty_to_first_order(self):
        """The reason for this control: the two gradients agree up to O(eta^2)."""
        images, labels = batch(dtype=torch.float64)
        eta = 1e-4
        gradients = []
        for defence in (Layerwise("lie", eta), Penalty(eta)):
            net, plain = tiny_net().double().train(), tiny_net().double().train()
            F.cross_entropy(plain(images), labels).backward()
            passed = defence(net, images, labels)
            passed.loss.backward()
            gradients.append(
                torch.cat(
                    [(a.grad - b.grad).flatten() for a, b in zip(net.parameters(), plain.parameters(), strict=True)]
                )
            )
        assert F.cosine_similarity(*gradients, dim=0) > 0.9999
        assert gradients[0].norm() == pytest.approx(gradients[1].norm().item(), rel=1e-2)

    def test_its_strength_is_that_of_lad(self):
        images, labels = batch()
        penalty, lad = (
            defence(tiny_net().train(), images, labels).strength for defence in (Penalty(0.5), Layerwise("lie", 0.5))
        )
        assert torch.allclose(penalty.nodes, lad.nodes, rtol=1e-4)
        assert penalty.defended.item() == pytest.approx((penalty.plain + penalty.nodes.sum()).item())

    @pytest.mark.parametrize("objective", [Natural(), Pgd(steps=1), Trades(steps=1)])
    def test_it_trains_with_every_objective(self, objective):
        found = train(tiny_net(), tiny_data(), config(objective=objective, defence=Penalty(2.0))).epochs
        assert all(epoch.strength > 0 for epoch in found)

    def test_micro_batches_have_the_gradient_of_the_whole(self):
        images, labels = batch(8)
        nets = [ode_net(width=4, num_classes=3, steps=2, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
        Penalty(20.0)(nets[0], images, labels).loss.backward()
        for i in (0, 4):
            (Penalty(20.0)(nets[1], images[i : i + 4], labels[i : i + 4], share=0.5).loss / 2).backward()
        # The square of the batch's costate does not mix images, so parts add up exactly.
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("augment", "flip", "pad"), [("crop-flip", True, 4), ("crop", False, 4), ("flip", True, 0), ("none", None, None)]
)
def test_augmentation_is_a_choice(augment, flip, pad, monkeypatch):
    """Training sees the batches that `Batches` makes with these arguments."""
    data = replace(tiny_data(8), flip=True)
    seen = []

    @dataclass(frozen=True)
    class Looking(Objective, name=f"test-looking-{augment}"):
        def __call__(self, step):
            seen.append(step.images.clone())
            return step.defended(step.images)

    train(tiny_net(), data, config(objective=Looking(), augment=augment, epochs=1))
    arguments = {"augment": False} if pad is None else {"augment": True, "flip": flip, "pad": pad}
    generator = torch.Generator().manual_seed(0)
    batches = Batches(
        data.train_images, data.train_labels, batch_size=8, shuffle=True, generator=generator, **arguments
    )
    assert all(torch.equal(a, b) for a, (b, _) in zip(seen, batches, strict=True))


def test_validation_attacks_with_the_eps_that_is_trained_on(monkeypatch):
    used = []
    real = attacks.ifgsm

    def spy(net, x, y, **arguments):
        used.append(arguments)
        return real(net, x, y, **arguments)

    monkeypatch.setattr(attacks, "ifgsm", spy)
    data = tiny_data()
    train(
        tiny_net(), data, config(objective=Pgd(eps=4 / 255, alpha=1 / 255, steps=1), epochs=1, milestones=()),
        validation=(data.test_images, data.test_labels),
    )  # fmt: skip
    assert used[-1] == {"eps": 4 / 255, "alpha": 1 / 255, "steps": 10}


def test_learning_rate_schedule_is_the_papers():
    paper = TrainConfig()
    assert [paper.learning_rate(epoch) for epoch in (0, 79, 80, 119, 120, 159)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(epochs=0), "^epochs: got 0"),
        (lambda: config(batch_size=0), "^batch_size: got 0"),
        (lambda: config(accumulate=3), "^accumulate: got 3, expected a divisor"),
        (lambda: config(lr=-1.0), "^lr: got -1"),
        (lambda: config(precision="fp8"), "^precision: got 'fp8'"),
        (lambda: Layerwise("strong"), "^scheme: got 'strong', expected one of"),
        (lambda: Layerwise("lie", float("nan")), "^eta: got nan"),
        (lambda: Layerwise("lie", -1.0), r"^eta: got -1"),
        (lambda: Layerwise("strang", perturbation="input"), "^scheme: got 'strang' with perturbation='input'"),
        (lambda: Layerwise("lie", sweeps=0), "^sweeps: got 0"),
        (lambda: Layerwise("lie", sweeps=1.5), r"^sweeps: got 1\.5, expected an integer"),
        (lambda: Layerwise("lie", ascent=2.5), r"^ascent: got 2\.5"),
        (lambda: Layerwise("lie", strength=0.0), "^strength: got 0, expected a finite number, above 0"),
        (lambda: Layerwise("lie", warmup=-1), "^warmup: got -1, expected an integer, at least 0"),
        (lambda: Penalty(-1.0), "^eta: got -1"),
        (lambda: config(augment="mirror"), "^augment: got 'mirror', expected one of 'crop-flip'"),
        (lambda: config(milestones=80), "^milestones: got 80, expected a list"),
        (lambda: config(seed=2**70), "^seed: got"),
        (lambda: Pgd(eps=-1.0), "^eps: got -1"),
        (lambda: Pgd(steps=0), "^steps: got 0"),
        (lambda: Trades(lam=0.0), "^lam: got 0"),
        (lambda: Trades(gamma=2.0), "^gamma: got 2"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size: got 64 for 20 training images"):
        train(tiny_net(), tiny_data(), config(batch_size=64))
    with pytest.raises(TypeError, match=r"^net: got Linear, expected"):
        train(torch.nn.Linear(2, 2), tiny_data(), config())
    with pytest.raises(TypeError, match=r"^objective: got 'pgd'"):
        config(objective="pgd")
    with pytest.raises(TypeError, match=r"^channels_last: got 'no'"):
        config(channels_last="no")
    with pytest.raises(TypeError, match=r"^data: got tuple, expected an instance of ImageDataset"):
        train(tiny_net(), (1, 2), config())
    with pytest.raises(TypeError, match=r"^config: got dict, expected an instance of TrainConfig"):
        train(tiny_net(), tiny_data(), {"epochs": 1})
    with pytest.raises(ValueError, match=r"^net: lacks a parameter with requires_grad"):
        train(tiny_net().requires_grad_(False), tiny_data(), config())
    with pytest.raises(TypeError, match=r"^net: has parameters of torch\.float16"):
        train(tiny_net().half(), tiny_data(), config())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), "^validation images: got dtype torch.float32"),
        (
            torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.int64),
            "^validation images: got shape",
        ),
        (
            torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            "^validation labels: got shape",
        ),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.full((4,), 99), "^validation labels: got labels from 99"),
    ],
)
def test_validation_images_that_do_not_fit_are_refused_before_the_first_epoch(images, labels, message):
    def on_step(*args):
        raise AssertionError("training has begun")

    with pytest.raises((TypeError, ValueError), match=message):
        train(tiny_net(), tiny_data(), config(), validation=(images, labels), on_step=on_step)
