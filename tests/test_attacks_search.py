"""Auto-PGD compared with a loop over single examples from the paper, and the rules of the Square attack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional

from odeadv.attacks import Tally, apgd, apgd_t, square
from odeadv.attacks._apgd import autoattack_checkpoints, checkpoints
from odeadv.attacks._square import Bumps, _window, pattern, share, side, tiled
from odeadv.attacks.balls import L2Ball


def wavy(scale: float = 3.0) -> nn.Sequential:
    """Return a network with few pixels and many bends: the loss settles only after the step size falls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4)).double()
        net[1].weight.data *= 3 * scale
    return net


def batch(net: nn.Module, n: int = 10) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 3, 2, 2, generator=seeded(1), dtype=torch.float64)
    with torch.no_grad():
        return images, net(images).argmax(1)


def apgd_of_one(
    net: nn.Module, clean: Tensor, label: Tensor, x0: Tensor, *, eps: float, steps: int, norm: str, rho: float = 0.75
) -> tuple[Tensor, list[float]]:
    """Algorithm 1 of Croce and Hein 2020 on one image. Return the image and its step sizes."""

    def f(x: Tensor) -> tuple[float, Tensor, bool]:
        x = x.clone().requires_grad_()
        logits = net(x[None])
        loss = functional.cross_entropy(logits, label[None])
        return loss.item(), torch.autograd.grad(loss, x)[0], bool(logits.argmax() != label)

    def project(x: Tensor) -> Tensor:
        if norm == "linf":
            return x.clamp(clean - eps, clean + eps).clamp(0, 1)
        offset = x - clean
        return (clean + offset * min(1.0, eps / max(offset.norm().item(), 1e-30))).clamp(0, 1)

    def step(x: Tensor, g: Tensor) -> Tensor:
        return project(x + eta * (g.sign() if norm == "linf" else g / g.norm()))

    w, p = [0], [0.0, 0.22]
    while p[-1] <= 1:
        w.append(math.ceil(round(p[-1] * steps, 9)))
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    eta, etas = 2 * eps, []
    xs, losses = [x0], [f(x0)[0]]
    x_max, f_max, eta_then, f_max_then = x0, losses[0], eta, losses[0]
    if f(x0)[2]:
        return x0, etas
    for k in range(steps):
        z = step(xs[k], f(xs[k])[1])
        following = z if k == 0 else project(xs[k] + 0.75 * (z - xs[k]) + 0.25 * (xs[k] - xs[k - 1]))
        xs.append(following)
        loss, _, fooled = f(following)
        losses.append(loss)
        if fooled:
            return following, etas
        if loss > f_max:
            x_max, f_max = following, loss
        if k + 1 in w:
            since = w[w.index(k + 1) - 1]
            rises = sum(losses[i + 1] > losses[i] for i in range(since, k + 1))
            first = rises < rho * (k + 1 - since)
            second = eta_then == eta and f_max_then == f_max
            eta_then, f_max_then = eta, f_max
            etas.append(eta)
            if first or second:
                eta /= 2
                xs[k + 1], losses[k + 1] = x_max, f_max
    return x_max, etas


class TestAutoPGD:
    def test_checkpoints(self) -> None:
        """p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
        assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
        assert checkpoints(50) == (11, 21, 29, 35, 40, 44, 47, 50)
        assert checkpoints(1) == (1,)
        for steps in range(1, 300):
            reviewed = checkpoints(steps)
            assert list(reviewed) == sorted(set(reviewed))
            assert 1 <= reviewed[0] <= reviewed[-1] <= steps

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize(("eps", "steps"), [(0.02, 40), (0.06, 40), (0.06, 7), (0.2, 25), (0.02, 1)])
    def test_against_the_algorithm_on_one_image(self, norm: str, eps: float, steps: int) -> None:
        net = wavy()
        images, labels = batch(net)
        start = (images + eps * (2 * torch.rand(images.shape, generator=seeded(2), dtype=images.dtype) - 1)).clamp(0, 1)
        if norm == "l2":
            start = images + (start - images) / 8
        given: dict[str, Any] = {"eps": eps, "steps": steps, "norm": norm}
        expected = [apgd_of_one(net, *one, **given) for one in zip(images, labels, start, strict=True)]
        actual = apgd(net, images, labels, start=start, generator=None, **given)
        torch.testing.assert_close(actual, torch.stack([x for x, _ in expected]), rtol=0, atol=1e-7)
        if steps == 40 and eps == 0.02:
            last = [etas[-1] for _, etas in expected if etas]
            assert min(last) < 2 * eps / 8  # the step sizes did fall, and not all of them alike
            assert norm == "linf" or len(set(last)) > 1

    def test_returns_the_worst_it_has_seen(self) -> None:
        net = wavy()
        images, labels = batch(net)
        seen: list[Tensor] = []

        def noted(z: Tensor, y: Tensor) -> Tensor:
            losses = functional.cross_entropy(z, y, reduction="none")
            seen.append(losses.detach())
            return losses

        attacked = apgd(net, images, labels, eps=0.005, steps=30, loss=noted, generator=seeded())
        assert (net(attacked).argmax(1) == labels).all()
        with torch.no_grad():
            final = functional.cross_entropy(net(attacked), labels, reduction="none")
        assert len(seen) == 31
        torch.testing.assert_close(final, torch.stack(seen).amax(0))

    def test_cost_and_that_fooled_examples_leave(self) -> None:
        net = wavy()
        images, labels = batch(net)
        tally = Tally()
        apgd(net, images, labels, eps=0.005, steps=30, generator=seeded(), tally=tally)
        assert tally.queries.tolist() == [31] * 10
        assert tally.gradients.tolist() == [30] * 10
        attacked = apgd(net, images, labels, eps=0.1, steps=30, generator=seeded(), tally=tally)
        fooled = net(attacked).argmax(1) != labels
        assert 0 < fooled.sum() < 10
        reviewed = {w + 1 for w in checkpoints(30)} | {31}
        assert set(tally.queries.tolist()) <= reviewed
        assert (tally.queries[~fooled] == 31).all()
        assert tally.queries[fooled].min() < 31

    def test_beats_signed_steps_of_fixed_size(self) -> None:
        from odeadv.attacks import ifgsm

        net = wavy()
        images, labels = batch(net, 200)
        plain = ifgsm(net, images, labels, eps=0.05, alpha=0.0125, steps=20)
        auto = apgd(net, images, labels, eps=0.05, steps=20, generator=seeded())
        right = [(net(x).argmax(1) == labels).sum() for x in (plain, auto)]
        assert right[1] <= right[0] < 200

    def test_refuses(self) -> None:
        net = wavy()
        images, labels = batch(net)
        with pytest.raises(ValueError, match=r"^rho: got 1.5, expected a finite number, at least 0, at most 1"):
            apgd(net, images, labels, eps=0.1, rho=1.5, generator=seeded())
        with pytest.raises(ValueError, match=r"^variant: got 'torch', expected one of 'paper', 'autoattack'"):
            apgd(net, images, labels, eps=0.1, variant="torch")


class TestTargetedAutoPGD:
    def test_targets_are_the_most_likely_wrong_classes_in_turn(self) -> None:
        net = wavy()
        images, labels = batch(net)
        seen: list[Tensor] = []

        def noted(z: Tensor, y: Tensor) -> Tensor:
            seen.append(y)
            return functional.cross_entropy(z, y, reduction="none")

        apgd_t(net, images, labels, eps=1e-4, steps=2, targets=2, loss=noted, generator=seeded())
        ranked = net(images).argsort(1, descending=True)
        assert torch.equal(ranked[:, 0], labels)
        assert torch.equal(seen[0], labels)  # the clean images
        assert [int((ranked == y[:, None]).int().argmax(1).unique()) for y in seen[1:]] == [1, 1, 1, 2, 2, 2]

    def test_any_wrong_class_ends_an_example(self) -> None:
        net = wavy()
        images, labels = batch(net)
        labels[0] = (labels[0] + 1) % 4  # wrong without an attack
        tally = Tally()
        attacked = apgd_t(net, images, labels, eps=0.3, steps=20, generator=seeded(), tally=tally)
        assert torch.equal(attacked[0], images[0])
        assert tally.queries[0] == 1
        fooled = net(attacked).argmax(1) != labels
        assert fooled[0]
        assert fooled.sum() > 5
        assert tally.queries.max() <= 1 + 3 * 21  # four classes have three targets, although the default is nine

    def test_is_at_least_as_strong_as_each_target_alone(self) -> None:
        net = wavy()
        images, labels = batch(net, 60)
        shared: dict[str, Any] = {"eps": 0.03, "steps": 20, "start": "clean"}
        together = net(apgd_t(net, images, labels, **shared)).argmax(1) == labels
        ranked = net(images).argsort(1, descending=True)
        for rank in (1, 2, 3):
            alone = apgd(net, images, labels, target=ranked[:, rank], loss="dlr", variant="autoattack", **shared)
            assert not (together & (net(alone).argmax(1) != labels)).any()
        assert 0 < together.sum() < 60

    def test_checkpoints_of_autoattack(self) -> None:
        """The periods of its code: int(0.22 n), shortened by int(0.03 n), at least int(0.06 n)."""
        assert autoattack_checkpoints(100) == checkpoints(100)
        assert autoattack_checkpoints(20) == (4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
        assert autoattack_checkpoints(1) == (1,)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"targets": 0}, "targets: got 0, expected an integer, at least 1"),
            ({"loss": "kl"}, "loss: got 'kl', expected 'dlr'"),
            ({"net": nn.Sequential(nn.Flatten(), nn.Linear(12, 3).double())}, "loss: 'dlr' got 3 classes, expected at"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        images, labels = batch(wavy())
        given: dict[str, Any] = {"net": wavy(), "eps": 0.1} | change
        net = given.pop("net")
        wrong = (net(images).argmax(1) + 1) % 3  # then no image is attacked, but the arguments are refused all the same
        for truth in (labels % 3, wrong):
            with pytest.raises(ValueError, match=f"^{message}"):
                apgd_t(net, images, truth, **given)

    def test_three_classes_with_the_margin(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
        images, _ = batch(wavy())
        labels = net(images).argmax(1)
        attacked = apgd_t(net, images, labels, eps=0.5, steps=10, loss="margin")
        assert (net(attacked).argmax(1) != labels).any()


class Spy(nn.Module):
    """Record the images. The logits come from NumPy, so they cannot be differentiated."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.from_numpy(self.inner(x).detach().numpy())


def square_model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(384, 4)).double()


class TestSquare:
    EPS = 0.05

    def images(self, n: int = 1) -> Tensor:
        return 0.25 + 0.5 * torch.rand(n, 3, 10, 10, generator=seeded(1), dtype=torch.float64)

    def test_sides(self) -> None:
        """p halves at queries 10, 50, 200, ... of 10,000: Section 3 and Appendix of the paper."""

        def of(query: int, queries: int, p: float, shape: tuple[int, int]) -> int:
            return side(share(query, queries=queries, p=p), shape)

        sides = [of(k, 10_000, 0.8, (32, 32)) for k in (1, 10, 11, 51, 201, 501, 1001, 2001, 9000)]
        assert sides == [round(math.sqrt(0.8 / 2**h) * 32) for h in (0, 0, 1, 2, 3, 4, 5, 6, 9)]
        assert of(6, 5000, 0.8, (32, 32)) == sides[2]  # the schedule is rescaled
        assert of(9999, 10_000, 0.01, (4, 4)) == 1
        assert of(1, 10, 1.0, (2, 50)) == 2

    def test_every_query_differs_from_the_best_so_far_by_one_square_of_the_corners(self) -> None:
        inner = square_model()
        images, eps = self.images(), self.EPS
        labels = inner(images).argmax(1)
        spy, losses = Spy(inner), []
        tally = Tally()
        result = square(spy, images, labels, eps=0.001, queries=60, generator=seeded(), tally=tally)
        assert len(spy.seen) == 60 == tally.queries.item()
        assert tally.gradients.item() == 0

        def margin(x: Tensor) -> float:
            z = inner(x)[0]
            return (max(v for j, v in enumerate(z.tolist()) if j != labels.item()) - z[labels.item()]).item()

        offsets = (spy.seen[0] - images)[0]
        torch.testing.assert_close(offsets.abs(), torch.full_like(offsets, 0.001))
        assert (offsets.sign() == offsets.sign()[:, :1]).all()  # vertical stripes
        best, highest = spy.seen[0], margin(spy.seen[0])
        for number, query in enumerate(spy.seen[1:], start=1):
            changed = (query != best)[0].any(0)
            size = side(share(number, queries=60, p=0.8), (10, 10))
            rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
            if len(rows):
                assert rows.max() - rows.min() < size
                assert columns.max() - columns.min() < size
            torch.testing.assert_close((query - images).abs(), torch.full_like(images, 0.001))
            losses.append(margin(query))
            if losses[-1] > highest:
                best, highest = query, losses[-1]
        assert torch.equal(result, best)
        assert highest == max(margin(spy.seen[0]), *losses)
        assert eps > 0.001

    @pytest.mark.parametrize("size", [1, 3, 10])
    def test_windows_reach_every_place_alike(self, size: int) -> None:
        windows = _window(4000, 10, size, seeded())
        first = windows.int().argmax(1)
        assert (windows.sum(1) == size).all()
        assert all(row[start : start + size].all() for row, start in zip(windows, first.tolist(), strict=True))
        share = first.bincount(minlength=10)[: 11 - size] / 4000
        torch.testing.assert_close(share, torch.full((11 - size,), 1 / (11 - size)), rtol=0, atol=0.02)

    def test_fools_and_stops_asking(self) -> None:
        inner = square_model()
        images = self.images(12)
        labels = inner(images).argmax(1)
        right = []
        for queries in (1, 10, 100):
            tally = Tally()
            attacked = square(
                Spy(inner), images, labels, eps=self.EPS, queries=queries, generator=seeded(), tally=tally
            )
            fooled = inner(attacked).argmax(1) != labels
            right.append((~fooled).sum().item())
            assert (tally.queries[~fooled] == queries).all()
            if queries == 100:
                assert fooled.any()
                assert (tally.queries[fooled] < queries).all()
        assert right[0] > right[-1]

    def test_an_example_does_not_depend_on_which_others_are_fooled(self) -> None:
        inner = square_model()
        images = self.images(4)
        labels = inner(images).argmax(1)
        shared: dict[str, Any] = {"eps": 0.01, "queries": 30}
        honest = square(inner, images, labels, generator=seeded(), **shared)
        misled = labels.clone()
        misled[1:] = (labels[1:] + 1) % 4  # fooled by their first query
        assert torch.equal(square(inner, images, misled, generator=seeded(), **shared)[0], honest[0])

    def test_targeted(self) -> None:
        inner = square_model()
        images = self.images(4)
        labels = inner(images).argmax(1)
        target = (labels + 1) % 4
        attacked = square(inner, images, labels, target=target, eps=0.4, queries=300, generator=seeded())
        assert (inner(attacked).argmax(1) == target).float().mean() >= 0.75

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"p": 0}, "p: got 0, expected a finite number, above 0, at most 1"),
            ({"p": 1.5}, r"p: got 1\.5, expected a finite number, above 0, at most 1"),
            ({"queries": 0}, "queries: got 0, expected an integer, at least 1"),
            ({"images": torch.rand(2, 12)}, r"images: got shape \(2, 12\), expected \(n, channels, height, width\)"),
            ({"generator": torch.default_generator}, "generator: got torch's global one"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        given: dict[str, Any] = {"eps": 0.1, "generator": seeded(), "images": self.images(2)} | change
        with pytest.raises(ValueError, match=f"^{message}"):
            square(square_model(), given.pop("images"), torch.tensor([0, 1]), **given)


class TestSquareInL2:
    """Algorithm 3 of Andriushchenko et al. 2020."""

    EPS = 0.4

    def images(self, n: int = 5) -> Tensor:
        return 0.3 + 0.4 * torch.rand(n, 3, 11, 9, generator=seeded(3), dtype=torch.float64)

    def test_bump_is_the_one_of_the_paper(self) -> None:
        by_hand = torch.tensor([[0.25, -0.25, -0.25], [1.25, -0.25, -1.25], [0.25, -0.25, -0.25]])
        torch.testing.assert_close(pattern(3), by_hand.double() / by_hand.double().norm())
        for size in range(1, 12):
            assert pattern(size).norm() == pytest.approx(1.0)
            pattern(size).zero_()
            assert pattern(size).any()  # each call returns a new tensor: a cached one would keep its mode and device

    def test_first_query_has_bumps_in_tiles(self) -> None:
        images = self.images()
        offset = tiled(images, seeded(), eps=self.EPS) - images
        assert torch.allclose(offset.flatten(1).norm(dim=1), torch.tensor(self.EPS).double())
        covered = (offset.abs() > 0).any(dim=1).all(dim=0)  # tiles of side 1 cover everything
        assert covered.all()
        wide = 0.5 * torch.ones(1, 1, 32, 32, dtype=torch.float64)
        offset = tiled(wide, seeded(), eps=1.0) - wide
        assert (offset[0, 0, 0] == 0).all()
        tile = offset[0, 0, 1:7, 1:7] * 5  # 25 tiles of equal length
        found = [sign * bump for sign in (1, -1) for bump in (pattern(6), pattern(6).T)]
        assert any(torch.allclose(tile, bump) for bump in found)

    @pytest.mark.parametrize("share_of_pixels", [0.03, 0.3, 0.9])
    def test_proposals_move_the_length_of_two_windows_into_one(self, share_of_pixels: float) -> None:
        images = self.images()
        ball = L2Ball(images, self.EPS)
        bumps = Bumps(ball, seeded(4))
        noise = torch.randn(images.shape, generator=seeded(5), dtype=images.dtype)
        used = 0.8
        best = images + used * self.EPS * noise / noise.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        index = torch.tensor([0, 2, 3])
        size = bumps.side(share_of_pixels)
        assert size % 2 == 1
        offset = (bumps.proposed(best[index], share_of_pixels, index) - images[index]).flatten(1).norm(dim=1)
        torch.testing.assert_close(offset, torch.full_like(offset, self.EPS))
        moved = bumps.proposed(best[index], share_of_pixels, index)
        for before, after, clean in zip(best[index], moved, images[index], strict=True):
            gone = (after == clean).all(dim=0)  # the second window without the first
            same = (after == before).all(dim=0)
            window = ~gone & ~same
            rows, columns = window.any(dim=1).nonzero().flatten(), window.any(dim=0).nonzero().flatten()
            assert len(rows) == len(columns) == size
            assert window[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert gone.sum() <= size**2
            for channel in range(3):
                old = (before - clean)[channel][window].reshape(size, size)
                new = (after - clean)[channel][window].reshape(size, size)
                acted = (before - clean)[channel][gone | window].square().sum()
                available = (acted + (1 - used**2) * self.EPS**2 / 3).sqrt()
                ways = [old / old.norm() + sign * bump for sign in (1, -1) for bump in (pattern(size), pattern(size).T)]
                assert any(torch.allclose(new, available * way / way.norm()) for way in ways)

    def test_more_queries_break_more_within_the_ball(self) -> None:
        inner = square_model().double()
        images = torch.rand(60, *TestSquare().images(1).shape[1:], generator=seeded(6), dtype=torch.float64)
        labels = inner(images).argmax(1)
        right = []
        for queries in (1, 20, 200):
            attacked = square(inner, images, labels, eps=0.3, norm="l2", queries=queries, generator=seeded())
            assert (attacked - images).flatten(1).norm(dim=1).max() <= 0.3
            assert attacked.min() >= 0
            assert attacked.max() <= 1
            right.append(int((inner(attacked).argmax(1) == labels).sum()))
        assert right[0] > right[1] > right[2]

    def test_an_example_does_not_depend_on_which_others_are_fooled(self) -> None:
        inner = square_model()
        images = TestSquare().images(4)
        labels = inner(images).argmax(1)
        shared: dict[str, Any] = {"eps": 0.05, "norm": "l2", "queries": 30}
        honest = square(inner, images, labels, generator=seeded(), **shared)
        misled = labels.clone()
        misled[1:] = (labels[1:] + 1) % 4
        assert torch.equal(square(inner, images, misled, generator=seeded(), **shared)[0], honest[0])

    def test_tiny_images(self) -> None:
        for shape in ((2, 1, 1, 1), (2, 3, 2, 2), (2, 1, 4, 1)):
            images = torch.rand(shape, generator=seeded())
            net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 2))
            attacked = square(net, images, torch.tensor([0, 1]), eps=0.2, norm="l2", queries=9, generator=seeded())
            assert (attacked - images).flatten(1).norm(dim=1).max() <= 0.2
