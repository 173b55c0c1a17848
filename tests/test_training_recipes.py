"""Recipes of training: optimisers, schedules, averages, wrapped objectives, data of every form, and stopping."""

import json
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from PIL import Image
from test_training import LAD, LAD_SM, batch, config, costates_by_hand, lad_by_hand, loss_of, tiny_data, tiny_net
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from odeadv import attacks
from odeadv.data import Batches, make_transform, random_crop_flip, to_float
from odeadv.data._batches import Window, draw_moves
from odeadv.data.stream import as_inputs, moved, stacked
from odeadv.models import residual_mlp
from odeadv.support.files import read_tensors, write_tensors
from odeadv.support.plain import from_dict, key, to_dict
from odeadv.training import (
    Awp,
    Draws,
    Layerwise,
    Mart,
    Natural,
    Pgd,
    Trades,
    TrainConfig,
    TrainingStopped,
    Undefended,
    load_weights,
    make_fabric,
    train,
)
from odeadv.training._step import Step, StepModule

pytestmark = pytest.mark.filterwarnings("ignore:eta. .* is for the mean over batches of:UserWarning")

RECIPES = {
    "adamw, cosine with warm-up": {
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 1e-2},
        "schedule": {"name": "cosine", "warmup": 1},
    },
    "nesterov, one-cycle": {"optimizer": {"nesterov": True}, "schedule": {"name": "one-cycle"}},
    "decay of weights, clipping": {"decay": "weights", "clip": 0.5, "weight_decay": 1e-2},
    "label smoothing, average": {"label_smoothing": 0.1, "ema": 0.9},
    "early stopping": {"patience": 1, "lr": 0.0},
    "eta by strength, warmed up": {"defence": Layerwise("strang", strength=0.05, warmup=2)},
    "mart": {"objective": Mart(steps=1)},
    "awp of trades, with lad": {"objective": Awp(Trades(steps=1), 0.01), "defence": LAD},
    "pgd, folded, drawn on the device": {"objective": Pgd(steps=1), "fold": True, "draws": "device"},
    "rmsprop, steps": {"optimizer": {"name": "rmsprop", "lr": 1e-3}, "schedule": {"name": "steps", "gamma": 0.5}},
    "adam with amsgrad, polynomial": {
        "optimizer": {"name": "adam", "lr": 1e-3, "amsgrad": True},
        "schedule": {"name": "polynomial", "power": 2.0},
    },
}


TRANSFORMS = [
    {"name": "RandomCrop", "size": 8, "padding": 2},
    {"name": "RandomApply", "transforms": [{"name": "ColorJitter", "brightness": 0.5}], "p": 0.5},
]


class StopHereError(Exception):
    pass


def run(settings, folder=None, stop_at=(), data=None, net=tiny_net, **keywords):
    """Train; stop after the steps ``stop_at`` of all steps made, and go on in a new network each time."""
    steps = 0

    def on_step(*_):
        nonlocal steps
        steps += 1
        if steps in stop_at:
            raise StopHereError

    images = tiny_data()
    while True:
        trained = net()
        try:
            result = train(
                trained, data() if data else images, settings, validation=(images.test_images, images.test_labels),
                checkpoints=folder, checkpoint_every=0.0, on_step=on_step, **keywords,
            )  # fmt: skip
        except StopHereError:
            continue
        return trained, result


def assert_same(one, other):
    (net, result), (again, found) = one, other
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [replace(e, seconds=0.0) for e in result.epochs] == [replace(e, seconds=0.0) for e in found.epochs]
    assert result.best_epoch == found.best_epoch
    if result.best is not None:
        assert all(torch.equal(value, found.best[name]) for name, value in result.best.items())


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_an_interrupted_run_ends_with_the_same_bits(self, name, tmp_path):
        settings = config(epochs=3, **RECIPES[name])
        assert_same(run(settings), run(settings, tmp_path, (1, 3, 4)))

    @pytest.mark.parametrize("name", RECIPES)
    def test_a_recipe_survives_plain_data_and_has_a_key_of_its_own(self, name):
        settings = TrainConfig(**RECIPES[name])
        assert from_dict(TrainConfig, to_dict(settings)) == settings
        assert key(settings) != key(TrainConfig())

    def test_adamw_with_a_cosine_is_the_loop_by_hand(self):
        data = tiny_data(8)
        settings = config(
            epochs=4, augment="none", optimizer={"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
            schedule={"name": "cosine"},
        )  # fmt: skip
        trained = tiny_net()
        rates = [epoch.lr for epoch in train(trained, data, settings).epochs]
        net, generator = tiny_net().train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        expected = []
        for _ in range(4):
            order = torch.randperm(8, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(to_float(data.train_images[order])), data.train_labels[order]).backward()
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected)
        for a, b in zip(trained.parameters(), net.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_schedules(self):
        def rates(epochs=4, steps=5, **schedule):
            return TrainConfig(epochs=epochs, lr=1.0, schedule=schedule).learning_rates(steps)

        assert rates(name="constant") == [1.0] * 20
        assert rates(name="steps", milestones=[2], gamma=0.5) == [1.0] * 10 + [0.5] * 10
        assert rates(name="constant", warmup=1)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
        cosine = rates(name="cosine", warmup=1)
        assert len(cosine) == 20
        assert cosine[4:6] == [1.0, 1.0]
        assert cosine[5:] == sorted(cosine[5:], reverse=True)
        assert cosine[-1] < 0.02
        assert max(rates(name="one-cycle", pct_start=0.5)) == pytest.approx(1.0, rel=1e-6)
        assert TrainConfig(lr=0.1).learning_rates(2)[158:162] == pytest.approx([0.1, 0.1, 0.01, 0.01])

    def test_biases_and_norms_are_not_decayed_if_only_weights_are(self):
        nets = [tiny_net() for _ in range(2)]
        for net, decay in zip(nets, ("all", "weights"), strict=True):
            groups = config(decay=decay, weight_decay=0.5).make_optimizer(net).param_groups
            decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
            assert decayed == {id(p) for p in net.parameters() if decay == "all" or p.ndim > 1}
            assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))

    def test_fp16_scales_gradients_and_is_refused_on_a_cpu(self, tmp_path):
        settings = config(epochs=2, precision="fp16", clip=1.0)
        with pytest.raises(ValueError, match=r'^precision: got "fp16" on cpu, .* set "bf16" or "fp32"'):
            make_fabric(precision="fp16", accelerator="cpu")
        with pytest.raises(ValueError, match=r'^precision: got "fp16" on cpu'):
            train(tiny_net(), tiny_data(), settings, fabric=make_fabric(accelerator="cpu"))
        scales = []
        for folder, stops in ((None, ()), (tmp_path, (3, 5))):
            # The scale overflows in the first steps, which are left out, and is lowered until gradients are finite.
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
            engine = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
            scales.append((run(settings, folder, stops, fabric=engine), scaler.state_dict()))
        (whole, one), (resumed, other) = scales
        assert_same(whole, resumed)
        assert one == other
        assert one["scale"] < 2.0**40

    def test_clipping_bounds_the_step(self):
        data = tiny_data(8)
        moves = []
        for clip in (None, 1e-3):
            net = tiny_net()
            before = [p.detach().clone() for p in net.parameters()]
            train(net, data, config(epochs=1, clip=clip, weight_decay=0.0, lr=1.0))
            moves.append(torch.cat([(a - b).flatten() for a, b in zip(before, net.parameters(), strict=True)]).norm())
        assert moves[1].item() == pytest.approx(1e-3, rel=1e-3)
        assert moves[0] > 10 * moves[1]

    @pytest.mark.parametrize("defence", [Undefended(), LAD])
    def test_label_smoothing_is_in_the_loss_and_in_the_costate(self, defence):
        images, labels = batch()
        net = tiny_net().train()
        step = Step(net, images, labels, defence, Draws(0, 0, slice(0, 6), 6), label_smoothing=0.2)
        found = step.defended(images).loss

        def smooth(logits):
            return F.cross_entropy(logits, labels, label_smoothing=0.2)

        twin = tiny_net().train()
        xs = [twin.stem(images)]
        for block in twin.blocks:
            xs.append(block(xs[-1]))
        a = torch.autograd.grad(smooth(twin.head(xs[-1])), xs)
        x = (twin := tiny_net().train()).stem(images)
        for n, block in enumerate(twin.blocks):
            x = block(x) + (2.0 * a[n + 1] if defence is LAD else 0.0)
        assert found.item() == pytest.approx(smooth(twin.head(x)).item(), rel=1e-5)

    def test_the_average_is_the_weights_that_are_left_and_validated(self):
        states = []
        settings = config(epochs=2, ema=0.5, lr=0.01)

        net = tiny_net()
        start = {name: value.clone() for name, value in net.state_dict().items()}
        train(net, tiny_data(), settings, on_step=lambda *_: states.append(raw(net)))
        average = start
        for number, state in enumerate(states):
            decay = min(0.5, (1 + number) / (10 + number))
            average = {
                n: decay * v + (1 - decay) * state[n] if v.is_floating_point() else state[n] for n, v in average.items()
            }
        for name, value in net.state_dict().items():
            assert torch.allclose(value.double(), average[name].double(), rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(net.stem.conv.weight, states[-1]["stem.conv.weight"], rtol=1e-3)

    def test_patience_ends_a_run_that_gets_no_better(self):
        _, result = run(config(epochs=9, lr=0.0, patience=2))
        assert (result.best_epoch, len(result.epochs)) == (1, 3)
        with pytest.raises(ValueError, match=r"^patience: got 2 without validation"):
            train(tiny_net(), tiny_data(), config(patience=2))

    def test_the_paper_s_milestones_become_those_of_a_short_run(self):
        assert TrainConfig(epochs=3).milestones == (1, 2)
        assert TrainConfig(epochs=1).milestones == ()
        assert TrainConfig(epochs=130).milestones == (80, 120)
        with pytest.raises(ValueError, match=r"^milestones: got \(5,\) for 2 epochs"):
            TrainConfig(epochs=2, milestones=(5,))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": {"name": "adamv"}}, r"^optimizer: name: got 'adamv'.*did you mean 'adam"),
            ({"optimizer": {"name": "adamw", "beta": 1}}, r"^optimizer: got 'beta' for AdamW; did you mean 'betas'"),
            ({"optimizer": {"nesterov": True, "momentum": 0.0}}, "^optimizer: SGD: Nesterov momentum requires"),
            ({"optimizer": "adamw"}, "^optimizer: got 'adamw', expected a mapping"),
            ({"schedule": {"name": "cosin"}}, r"^schedule: name: got 'cosin'.*did you mean 'cosine'"),
            ({"schedule": {"name": "cosine", "t_max": 3}}, "^schedule: CosineAnnealingLR: .*t_max"),
            ({"schedule": {"name": "cosine", "warmup": 99}}, "^schedule: warmup: got 99"),
            ({"decay": "norms"}, "^decay: got 'norms'"),
            ({"clip": 0.0}, "^clip: got 0"),
            ({"augment": "twist"}, "^augment: got 'twist', expected one of 'crop-flip'"),
            ({"augment": {"name": "RandomCropp"}}, "^augment: got 'RandomCropp'.*did you mean 'RandomCrop'"),
            ({"augment": [{"name": "RandAugment", "ops": 2}]}, "^augment: RandAugment: .*'ops'"),
            ({"augment": []}, r"^augment: got \[\], expected a name, a transform or a list"),
            ({"augment": [{"n": 1}]}, r"^augment: got \{'n': 1\}, expected a mapping with a name"),
            ({"precision": "fp8"}, "^precision: got 'fp8'"),
            ({"label_smoothing": 2.0}, "^label_smoothing: got 2"),
            ({"ema": -1.0}, "^ema: got -1"),
            ({"patience": 0}, "^patience: got 0"),
            ({"objective": Pgd, "epochs": 1}, "^objective: got"),
        ],
    )
    def test_bad_recipes(self, changes, message):
        with pytest.raises((TypeError, ValueError), match=message):
            config(**changes)


def raw(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


class TestObjectives:
    def attacked(self, images, labels, steps=2):
        eps, alpha = 8 / 255, 2 / 255
        noise = Draws(5, 0, slice(0, 6), 6).uniform(images)
        start = (images + eps * (2 * noise - 1)).clamp(images - eps, images + eps).clamp(0, 1)
        return attacks.ifgsm(tiny_net(), images, labels, eps=eps, alpha=alpha, steps=steps, start=start)

    @pytest.mark.parametrize("defended", [False, True])
    def test_mart_is_the_loss_of_the_paper(self, defended):
        images, labels = batch()
        x = self.attacked(images, labels)
        net = tiny_net().train()

        def boosted(logits):
            p = logits.softmax(1)
            wrong = torch.stack([row[torch.arange(3) != y].max() for row, y in zip(p, labels, strict=True)])
            return (-p.gather(1, labels[:, None])[:, 0].log() - (1.0001 - wrong).log()).mean()

        p, q = net(images).softmax(1), net(x).softmax(1)
        kl = (p * (p.log() - q.log())).sum(1)
        weighted = (kl * (1 - p.gather(1, labels[:, None])[:, 0])).mean()
        robust = boosted(net(x))
        if defended:
            twin = tiny_net().train()
            xs = [twin.stem(x)]
            for block in twin.blocks:
                xs.append(block(xs[-1]))
            a = torch.autograd.grad(boosted(twin.head(xs[-1])), xs)
            state = (twin := tiny_net().train()).stem(x)
            for n, block in enumerate(twin.blocks):
                state = block(state) + 2.0 * a[n + 1]
            robust = boosted(twin.head(state))
        found = loss_of(
            Mart(steps=2, lam=3.0), LAD if defended else Undefended(), tiny_net().train(), images, labels, seed=5
        )
        assert found.item() == pytest.approx((robust + 3.0 * weighted).item(), rel=1e-4)

    @pytest.mark.parametrize("defended", [False, True])
    def test_awp_is_the_gradient_at_weights_one_step_up_the_loss(self, defended):
        images, labels = batch()
        x = self.attacked(images, labels)
        gamma = 0.02

        def loss(net):
            if not defended:
                return F.cross_entropy(net(x), labels)
            return lad_by_hand(net, x, labels, 2.0, costates_by_hand(net, x, labels))

        by_hand = tiny_net().train()
        up = torch.autograd.grad(loss(by_hand), list(by_hand.parameters()))
        moved = tiny_net().train()
        with torch.no_grad():
            for weight, gradient in zip(moved.parameters(), up, strict=True):
                if weight.ndim > 1:
                    weight += gamma * weight.norm() / gradient.norm() * gradient
        expected = loss(moved)
        expected.backward()

        net = tiny_net().train()
        before = raw(net)
        module = StepModule(net, Awp(Pgd(steps=2), gamma), LAD if defended else Undefended())
        found, _ = module(images, labels, Draws(5, 0, slice(0, 6), 6), 1.0)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        found.backward()
        module.undo()
        for (name, a), b in zip(net.named_parameters(), moved.parameters(), strict=True):
            assert torch.equal(a, before[name]), name
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
        assert {int(m) for n, m in net.named_buffers() if "num_batches" in n} == {1}

    def test_awp_validates_and_is_named_like_its_base(self):
        assert Awp(Trades()).adversarial
        assert not Awp(Natural()).adversarial
        assert Awp(Pgd(eps=4 / 255)).eps == 4 / 255
        with pytest.raises(TypeError, match=r"^base: got"):
            Awp(Awp())

    def test_weights_are_put_back_if_a_step_fails(self):
        net = tiny_net()
        before = raw(net)
        with pytest.raises(RuntimeError, match=r"stop_above|the loss is"):
            train(net, tiny_data(), config(objective=Awp(Natural(), 0.5), stop_above=1e-3))
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


class Noisy(Dataset):
    """A data set whose samples are random transforms that draw from torch's global generator."""

    def __init__(self, n=20):
        data = tiny_data(n)
        self.x, self.y = to_float(data.train_images), data.train_labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.rand(3, 8, 8), int(self.y[index])


class Endless(IterableDataset):
    def __iter__(self):
        return ((image, 0) for image in IMAGES)


class Counted(Endless):
    def __len__(self):
        return 8


class Named(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return IMAGES[index], "cat"


IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TestData:
    def test_a_data_set_trains_as_images_in_memory_do(self):
        data = tiny_data()
        nets = [tiny_net() for _ in range(2)]
        settings = config(epochs=1, augment="none", lr=0.0)
        loaded = TensorDataset(to_float(data.train_images), data.train_labels)
        # Another order, the same images: of a whole batch the loss is the same.
        results = [
            train(net, d, replace(settings, batch_size=20, defence=LAD))
            for net, d in zip(nets, (data, loaded), strict=True)
        ]
        assert results[0].epochs[0].loss == pytest.approx(results[1].epochs[0].loss, rel=1e-5)
        assert results[0].epochs[0].strength == pytest.approx(results[1].epochs[0].strength, rel=1e-4)

    @pytest.mark.parametrize("augment", ["none", "crop-flip", TRANSFORMS])
    @pytest.mark.parametrize("kind", ["dataset", "loader", "loader with a generator"])
    def test_runs_resume_to_the_bit(self, kind, augment, tmp_path):
        def data():
            if kind == "dataset":
                return Noisy()
            generator = torch.Generator() if kind.endswith("generator") else None
            return DataLoader(Noisy(), batch_size=8, shuffle=True, generator=generator)

        settings = config(epochs=3, augment=augment)
        assert_same(run(settings, data=data), run(settings, tmp_path, (1, 2, 4), data=data))

    def test_transforms_of_torchvision_are_applied_to_each_image_and_survive_plain_data(self):
        settings = config(epochs=1, augment=TRANSFORMS, precision="bf16")
        assert settings.augment == tuple(TRANSFORMS)
        plain = json.loads(json.dumps(to_dict(settings)))
        assert from_dict(TrainConfig, plain) == settings
        assert key(settings) == key(from_dict(TrainConfig, plain)) != key(config(epochs=1, precision="bf16"))
        assert config(augment=TRANSFORMS[0]).augment == (TRANSFORMS[0],)
        images, global_state = tiny_data().train_images, torch.get_rng_state()

        def batches(seed, **other):
            generator, transform = torch.Generator().manual_seed(seed), make_transform(TRANSFORMS)
            given = {"generator": generator, "transform": transform, "batch_size": 10, **other}
            return [
                x for x, _ in Batches(images[:1].expand(20, -1, -1, -1), torch.zeros(20, dtype=torch.int64), **given)
            ]

        one, two = batches(0)
        assert (one.shape, one.dtype) == ((10, 3, 8, 8), torch.float32)
        assert len({image.numpy().tobytes() for image in torch.cat([one, two])}) > 10  # of the same image
        assert all(map(torch.equal, batches(0), (one, two)))
        assert not torch.equal(batches(1)[0], one)
        assert torch.equal(torch.get_rng_state(), global_state)
        (first, rest), _ = (batches(0, transform=make_transform([{"name": "Identity"}]))), None
        assert torch.equal(first, to_float(images[:1]).expand(10, -1, -1, -1))
        assert rest.is_contiguous(memory_format=torch.channels_last)
        data = tiny_data()
        assert_same(run(settings, data=lambda: data), run(settings, data=lambda: data))

    def test_every_epoch_has_an_order_of_its_own_and_the_global_state_is_left_alone(self):
        seen = []

        class Watching(Noisy):
            def __getitem__(self, index):
                seen.append(index)
                return super().__getitem__(index)

        torch.manual_seed(3)
        before = torch.get_rng_state()
        train(tiny_net(), Watching(8), config(epochs=2, augment="none"))
        assert torch.equal(before, torch.get_rng_state())
        assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
        assert seen[:8] != seen[8:]

    def test_crops_and_flips_of_a_data_set_are_those_of_images_in_memory(self):
        data = tiny_data(8)
        expected = random_crop_flip(data.train_images, pad=2, generator=torch.Generator().manual_seed(1))
        moves = draw_moves(8, Window(8, 8, 2, True), torch.Generator().manual_seed(1))
        assert torch.equal(moved(to_float(data.train_images), moves, 2), to_float(expected))

    def test_pixels_are_read_with_channels_first_or_last(self):
        pixels = torch.randint(0, 256, (2, 8, 9, 3), dtype=torch.uint8)
        expected = pixels.permute(0, 3, 1, 2) / 255
        assert torch.equal(as_inputs(pixels), expected)
        assert torch.equal(as_inputs(pixels.permute(0, 3, 1, 2)), expected)
        assert as_inputs(pixels[..., 0]).shape == (2, 1, 8, 9)
        assert torch.equal(as_inputs(torch.arange(6).view(2, 3)), torch.arange(6).view(2, 3))

    def test_images_of_pillow_are_read_as_pixels(self):
        data = tiny_data(8)

        class Pictures(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                return Image.fromarray(data.train_images[index].numpy()), int(data.train_labels[index])

        images, labels = stacked([Pictures()[index] for index in range(8)])
        assert torch.equal(as_inputs(images), to_float(data.train_images))
        assert torch.equal(labels, data.train_labels)
        assert len(train(tiny_net(), Pictures(), config(augment="flip")).epochs) == 2

    @pytest.mark.parametrize(
        ("data", "changes", "message"),
        [
            (
                lambda: DataLoader(Noisy(), batch_size=4),
                {},
                r"^data: got a DataLoader with batch_size=4, expected batch",
            ),
            (lambda: Noisy(4), {}, "^data: got 4 samples, expected at least batch_size=8"),
            (lambda: TensorDataset(torch.zeros(8)), {}, "^data: a sample is .*, expected a pair"),
            (
                lambda: TensorDataset(torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64)),
                {"augment": "crop-flip"},
                "^augment: got inputs",
            ),
            (lambda: TensorDataset(IMAGES, torch.full((8,), 0.7)), {}, "^data: got targets of torch.float32 and"),
            (
                lambda: DataLoader(TensorDataset(IMAGES, torch.full((8, 3), 1 / 3)), batch_size=8),
                {},
                r"^data: got targets of .* shape \(3,\), expected class numbers; for soft labels, .*Layerwise",
            ),
            (lambda: Named(), {}, "^data: got targets such as 'cat', expected class"),
            (lambda: Endless(), {}, "^data: got Endless without a length, .* add __len__, or write a loop"),
            (lambda: Counted(), {}, "^data: got Counted, an IterableDataset, expected one in a DataLoader"),
        ],
    )
    def test_what_does_not_fit_is_named(self, data, changes, message):
        with pytest.raises((TypeError, ValueError), match=message):
            train(tiny_net(), data(), config(**{"augment": "none", **changes}))

    def test_an_iterable_data_set_with_a_length_is_read_by_its_loader(self):
        loader = DataLoader(Counted(), batch_size=8)
        assert len(train(tiny_net(), loader, config(augment="none")).epochs) == 2

    def test_labels_in_a_column_are_class_numbers(self):
        column = TensorDataset(IMAGES, torch.arange(8)[:, None] % 3)
        flat = TensorDataset(IMAGES, torch.arange(8) % 3)
        losses = [train(tiny_net(), each, config(augment="none")).epochs[-1].loss for each in (column, flat)]
        assert losses[0] == losses[1]

    def test_inputs_of_another_size_keep_the_error_that_names_them(self):
        net = residual_mlp(1, 4, num_classes=3, image_size=16)
        with pytest.raises(ValueError, match=r"^images: got .*8"):
            train(net, TensorDataset(IMAGES, torch.arange(8) % 3), config(augment="none"))

    def test_a_data_set_can_be_validated_on(self):
        result = train(tiny_net(), Noisy(), config(augment="none"), validation=Noisy(6))
        assert set(result.epochs[0].validation) == {"clean"}


class TestStopping:
    @pytest.mark.parametrize(
        ("number", "error"), [(signal.SIGTERM, TrainingStopped), (signal.SIGINT, KeyboardInterrupt)]
    )
    def test_a_signal_saves_and_stops(self, number, error, tmp_path):
        settings = config(epochs=3, objective=Pgd(steps=1), defence=LAD_SM)
        whole = tiny_net()
        train(whole, tiny_data(), settings)

        def on_step(epoch, step, steps):
            if (epoch, step) == (2, 1):
                os.kill(os.getpid(), number)

        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(error, match=r"stopped in epoch 2, after step 1; saved in .*step-00000003") as stopped:
            train(tiny_net(), tiny_data(), settings, checkpoints=tmp_path, checkpoint_every=1e9, on_step=on_step)
        assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        if error is TrainingStopped:
            assert isinstance(stopped.value, SystemExit)  # so a program ends with its code
            assert stopped.value.code == 143
        resumed = tiny_net()
        train(resumed, tiny_data(), settings, checkpoints=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    def test_a_signal_in_the_last_step_of_an_epoch_stops_after_the_epoch(self, tmp_path):
        settings = config(epochs=3, defence=LAD_SM)
        whole = tiny_net()
        train(whole, tiny_data(), settings)

        def on_step(epoch, step, steps):
            if (epoch, step) == (2, steps):
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(TrainingStopped, match=r"stopped after epoch 2; saved in .*step-00000004"):
            train(tiny_net(), tiny_data(), settings, checkpoints=tmp_path, checkpoint_every=1e9, on_step=on_step)
        resumed = tiny_net()
        train(resumed, tiny_data(), settings, checkpoints=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    def test_what_killed_writes_leave_behind_is_removed(self, tmp_path):
        partial = tmp_path / ".tmp-step-00000004-abc.safetensors"
        partial.write_bytes(b"half")
        train(tiny_net(), tiny_data(), config(), checkpoints=tmp_path)
        assert not partial.exists()


class TestGoingOn:
    def test_more_epochs_extend_a_finished_run(self, tmp_path):
        whole = tiny_net()
        expected = train(whole, tiny_data(), config(epochs=4))
        train(tiny_net(), tiny_data(), config(epochs=2), checkpoints=tmp_path)
        extended = tiny_net()
        found = train(extended, tiny_data(), config(epochs=4), checkpoints=tmp_path)
        assert_same((whole, expected), (extended, found))
        with pytest.raises(ValueError, match=r"^epochs: got 3, but the checkpoint has 4"):
            train(tiny_net(), tiny_data(), config(epochs=3), checkpoints=tmp_path)

    def test_a_run_whose_learning_rates_would_have_been_others_is_not_extended(self, tmp_path):
        train(tiny_net(), tiny_data(), config(epochs=2, schedule={"name": "cosine"}), checkpoints=tmp_path)
        with pytest.raises(ValueError, match=r"learning rates"):
            train(tiny_net(), tiny_data(), config(epochs=4, schedule={"name": "cosine"}), checkpoints=tmp_path)

    @pytest.mark.parametrize("ema", [0.0, 0.9])
    def test_a_checkpoint_is_a_start(self, ema, tmp_path):
        first = tiny_net()
        train(first, tiny_data(), config(epochs=1, ema=ema), checkpoints=tmp_path)
        (path,) = tmp_path.glob("*.safetensors")
        net = tiny_net(3)
        load_weights(net, path)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), net.parameters(), strict=True))
        nets = [tiny_net(3), first]
        for each, init in zip(nets, (path, None), strict=True):
            train(each, tiny_data(), config(epochs=1, seed=9), init=init)
        assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))

    def test_weights_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match=r"^init: the weights do not fit the network"):
            train(tiny_net(), tiny_data(), config(), init={"stem": torch.zeros(1)})

    def test_a_run_from_other_weights_does_not_go_on(self, tmp_path):
        train(tiny_net(), tiny_data(), config(), checkpoints=tmp_path, init=tiny_net(1).state_dict())
        with pytest.raises(ValueError, match=r"another run, which differs in init"):
            train(tiny_net(), tiny_data(), config(), checkpoints=tmp_path, init=tiny_net(2).state_dict())


def test_checkpoints_of_the_version_before_are_read(tmp_path):
    """The parts that odeadv wrote before strength, averages and recipes: nothing of the newer ones is needed."""
    settings = config(epochs=3, defence=LAD)
    whole, expected = run(settings)
    with pytest.raises(RuntimeError):
        train(
            tiny_net(), tiny_data(), settings, checkpoints=tmp_path,
            validation=(tiny_data().test_images, tiny_data().test_labels), on_epoch=fail,
        )  # fmt: skip
    (path,) = tmp_path.glob("*.safetensors")
    tensors, info = read_tensors(path)
    old = {"epoch", "loss", "accuracy", "lr", "seconds", "ratio", "relative", "validation"}
    info["epochs"] = [{name: value for name, value in epoch.items() if name in old} for epoch in info["epochs"]]
    del info["eta"]
    write_tensors(path, {n: t for n, t in tensors.items() if "strength" not in n}, info)
    again, found = run(settings, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [e.loss for e in expected.epochs] == [e.loss for e in found.epochs]
    assert asdict(found.epochs[1])["strength"] > 0
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    for changed, message in (({"losses": 1.0}, "has unknown losses"), ({"loss": ...}, "lacks loss")):
        epochs = [{n: v for n, v in ({**epoch, **changed}).items() if v is not ...} for epoch in info["epochs"]]
        write_tensors(path, tensors, {**info, "epochs": epochs})
        with pytest.raises(ValueError, match=rf"{path.name}: EpochResult {message}; another version"):
            run(settings, tmp_path)
    write_tensors(path, {n: t for n, t in tensors.items() if n != "order"}, info)
    with pytest.raises(ValueError, match=rf"{path.name}: lacks order; it was not"):
        run(settings, tmp_path)


def fail(result):
    raise RuntimeError
