"""Fields, states and times that solvers and diagnostics once took for something else. Each test is of one mistake."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchdiffeq
from helpers import seeded
from torch import Tensor, nn

import odeadv
from odeadv.data import ImageDataset
from odeadv.diagnostics import energy, hamiltonian, second_order
from odeadv.fields import Jump, Piecewise
from odeadv.models import preact_resnet
from odeadv.training import Draws, Layerwise, Step, Trades, TrainConfig, Undefended, train


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


ONE = torch.ones(1, dtype=torch.float64)


class TestSaveTimes:
    """A time that is small compared with the span is not its beginning."""

    @pytest.mark.parametrize("steps", [{"dt": "adaptive"}, {"steps": 200}])
    @pytest.mark.parametrize("end", [50.0, 1e5])
    def test_logarithmic(self, steps: dict[str, object], end: float) -> None:
        times = [1e-4, 1e-3, 1e-2, 5e-2, 0.5, 1.0, 5.0]
        field = odeadv.SplitField(
            f=odeadv.Operator(decay, flow=lambda t, h, x: x * torch.exp(-h)), g=lambda t, x: torch.zeros_like(x)
        )
        sol = odeadv.solve(
            field, ONE, (0.0, end), scheme="strang", substep={"f": "exact", "g": "midpoint"}, save_at=times, **steps
        )
        assert sol.ts.tolist() == times
        assert torch.allclose(sol.xs[:, 0], torch.tensor([math.exp(-t) for t in times], dtype=torch.float64), rtol=1e-9)

    def test_next_to_the_ends(self) -> None:
        sol = odeadv.solve(decay, ONE, (0.0, 1e4), steps=100_000, scheme="rk4", save_at=[0.008, 9999.95])
        assert sol.ts.tolist() == [0.008, 9999.95]
        assert math.isclose(sol.xs[0].item(), math.exp(-0.008), rel_tol=1e-6)

    @pytest.mark.parametrize("span", [(0.0, 3.0), (3.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.1, 0.7)])
    def test_rounded_to_float32_are_nodes(self, span: tuple[float, float]) -> None:
        times = torch.linspace(*span, 31)
        sol = odeadv.solve(decay, ONE, span, steps=30, scheme="rk4", save_at=times)
        every = odeadv.solve(decay, ONE, span, steps=30, scheme="rk4", save_at="steps")
        assert torch.equal(sol.ts, every.ts)
        assert torch.equal(sol.xs, every.xs)


def linear(n: int = 4) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(n, n).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded())


def squares(x: Tensor) -> Tensor:
    return x.square().sum()


class TestNoise:
    """Diagnostics compare evaluations of f: all at a layer must draw the same noise and meet the same buffers."""

    def test_an_autonomous_field_has_no_time_derivative(self) -> None:
        part, drop = linear(), nn.Dropout(0.1)
        field = odeadv.AdversarialField(lambda t, x: drop(torch.tanh(part(x))), squares, 0.1)
        assert second_order(field, normal(8, 4), (0.0, 1.0), steps=4).time == [0.0] * 4

    def test_nor_has_one_whose_buffers_change(self) -> None:
        part = nn.utils.parametrizations.spectral_norm(linear())
        with torch.no_grad():
            part.parametrizations.weight.original.add_(normal(4, 4))  # the diagnostic must find its singular vectors
        field = odeadv.AdversarialField(lambda t, x: torch.tanh(part(x)), squares, 0.1)
        assert second_order(field, normal(8, 4), (0.0, 1.0), steps=4).time == [0.0] * 4

    def test_a_time_derivative_is_still_found(self) -> None:
        part, drop = linear(), nn.Dropout(0.1)
        field = odeadv.AdversarialField(lambda t, x: drop(torch.tanh(part(x))) + float(t.detach()) ** 2, squares, 0.1)
        found = second_order(field, normal(8, 4), (0.0, 1.0), steps=4)
        expected = [2 * t * math.sqrt(32) for t in (0.0, 0.25, 0.5, 0.75)]
        assert found.time == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_layers_of_a_network_draw_their_own(self) -> None:
        net = preact_resnet(depth=14, width=4, noise=0.1)
        images, labels = torch.rand(2, 3, 8, 8, generator=seeded()), torch.tensor([1, 2])
        found = second_order(net.field(images, labels, 1.0), **net.solve_options)
        assert found.time == [0.0] * len(found.time)
        places = torch.get_rng_state()
        found = second_order(net.field(images, labels, 1.0), **net.solve_options)
        assert torch.equal(torch.get_rng_state(), places)

    def test_the_hamiltonian_is_of_one_f_at_both_ends(self) -> None:
        """With f(t, x) = c + noise and a constant costate, H does not change within a layer."""
        drop = nn.Dropout(0.5)
        field = odeadv.AdversarialField(lambda t, x: drop(torch.ones_like(x)), lambda x: x.sum(), 0.3)
        found = hamiltonian(field, normal(8, 4), (0.0, 1.0), steps=4)
        assert found.layer_drift == pytest.approx([0.0] * 4, abs=1e-12)
        assert len(set(found.values)) > 1

    def test_the_hamiltonian_sees_the_time_at_the_end_of_a_layer(self) -> None:
        """f = t and a constant costate a = 1: H rises by h a layer."""
        field = odeadv.AdversarialField(lambda t, x: t * torch.ones_like(x), lambda x: x.sum(), 0.3)
        found = hamiltonian(field, ONE, (0.0, 1.0), steps=4)
        assert found.layer_drift == pytest.approx([0.25] * 4)


class TestOtherSolvers:
    def module(self, field: odeadv.AdversarialField, part: nn.Module) -> nn.Module:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.part = part

            def forward(self, t: Tensor, x: Tensor) -> Tensor:
                return field(t, x)

        return Wrapped()

    def test_driven_fields_have_the_gradients_of_odeint(self) -> None:
        part = linear()
        field = odeadv.AdversarialField(lambda t, x: torch.tanh(part(x)), squares, 0.5, modules=(part,))
        times = torch.tensor([0.0, 1.0], dtype=torch.float64)
        gradients = []
        for solver in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
            ends = []
            for k in (1, 2):
                along = odeadv.driven(field, k * normal(4), (0.0, 1.0), steps=20)
                module = self.module(along, part)
                ends.append(solver(module, k * normal(4), times, rtol=1e-9, atol=1e-9)[-1])
            gradients.append(torch.autograd.grad(ends[0].square().sum(), part.weight)[0])
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_a_costate_far_outside_its_span_is_warned_of() -> None:
    field = odeadv.driven(odeadv.AdversarialField(decay, squares, 0.1), normal(4), (0.0, 1.0), steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torchdiffeq.odeint(field, normal(4), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="far outside the span of the costate, 0 to 1"):
        torchdiffeq.odeint(field, normal(4), torch.tensor([0.0, 4.0], dtype=torch.float64))


class TestInPlace:
    """A field that writes to its state is refused wherever it runs, and the user's tensor stays what it is."""

    FIELDS = pytest.mark.parametrize(
        "f", [lambda t, x: torch.relu_(x), lambda t, x: x.mul_(-1.0)], ids=["relu", "multiplied"]
    )
    MODES = pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])

    @FIELDS
    @MODES
    @pytest.mark.parametrize("scheme", ["euler", "rk4", "strang"])
    def test_solve(self, f: Callable[..., Tensor], mode: Callable[..., object], scheme: str) -> None:
        x0 = normal(3)
        before = x0.clone()
        field = odeadv.SplitField(f=f, g=decay) if scheme == "strang" else f
        with mode(), pytest.raises(ValueError, match="modifies the state in place"):
            odeadv.solve(field, x0, (0.0, 1.0), steps=4, scheme=scheme)
        assert torch.equal(x0, before)

    @FIELDS
    @pytest.mark.parametrize("transform", ["vmap", "grad", "both"])
    def test_transforms(self, f: Callable[..., Tensor], transform: str) -> None:
        def loss(x: Tensor) -> Tensor:
            return odeadv.solve(f, x, (0.0, 1.0), steps=4, scheme="rk4").xs[-1].sum()

        function = loss if transform == "vmap" else torch.func.grad(loss)
        function = function if transform == "grad" else torch.func.vmap(function)
        with pytest.raises(ValueError, match="modifies the state in place"):
            function(normal(2, 3))

    @FIELDS
    @MODES
    def test_compiled_solvers(self, f: Callable[..., Tensor], mode: Callable[..., object]) -> None:
        x0 = normal(3)
        before = x0.clone()
        solver = odeadv.compile_solver(f, dt=0.25, scheme="rk4", backend="eager")
        with mode(), pytest.raises(ValueError, match="modifies the state in place"):
            solver(x0, (0.0, 1.0))
        assert torch.equal(x0, before)

    def test_inference_mode_gives_the_same(self) -> None:
        x0 = normal(3)
        plain = odeadv.solve(decay, x0, (0.0, 1.0), steps=4, scheme="rk4").xs
        with torch.inference_mode():
            inside = odeadv.solve(decay, x0.clone(), (0.0, 1.0), steps=4, scheme="rk4").xs
        assert torch.equal(plain, inside)


class TestTransforms:
    def test_of_networks_whose_states_change_shape(self) -> None:
        net = preact_resnet(depth=8, width=4).double().eval()
        images, labels = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=seeded()), torch.tensor([1, 2])

        def loss(x: Tensor) -> Tensor:
            return odeadv.solve(net.field(x, labels, 50.0), scheme="lie", **net.solve_options).loss

        leaf = images.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        assert torch.allclose(torch.func.grad(loss)(images), expected, rtol=1e-9, atol=1e-12)
        undefended = odeadv.solve(net.field(images, labels, 0.0), scheme="lie", **net.solve_options).loss
        assert loss(images) > undefended

    def test_compiled_solvers_within_vmap(self) -> None:
        solver = odeadv.compile_solver(decay, dt=0.25, scheme="rk4", backend="eager")
        states = normal(5, 3)
        found = torch.func.vmap(lambda x: solver(x, (0.0, 1.0)).xs[-1])(states)
        assert torch.allclose(found, odeadv.solve(decay, states, (0.0, 1.0), dt=0.25, scheme="rk4").xs[-1])


def test_the_energy_of_a_mixture_is_not_that_of_all_its_tables() -> None:
    part = linear()
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(part(x)), squares, 1e-3)
    names = ("lie", "strang", "averaged-lie", "averaged-strang", "extrapolated-strang4")
    found = energy(field, normal(8, 4), (0.0, 1.0), steps=64, schemes=names, substep="rk4")
    assert found.spent == pytest.approx([found.energy] * len(names), rel=5e-3)
    assert found.loss_per_energy == pytest.approx([2.0] * len(names), rel=1e-2)


class Tracked:
    def __init__(self) -> None:
        self.norm = nn.BatchNorm1d(3).double()

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return self.norm(x)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.norm(x)


LISTED = [nn.BatchNorm1d(3).double()]


class TestModulesAreFound:
    """A recording leaves the statistics of a batch norm alone, wherever a field keeps it."""

    def updates(self, f: Callable[..., Tensor], norm: nn.BatchNorm1d) -> int:
        norm.reset_running_stats()
        field = odeadv.AdversarialField(f, squares, 0.1)
        odeadv.solve(field, normal(8, 3), (0.0, 1.0), steps=1, scheme="lie")
        assert norm.num_batches_tracked is not None
        return int(norm.num_batches_tracked)

    def test_in_a_list_named_globally(self) -> None:
        assert self.updates(lambda t, x: LISTED[0](x), LISTED[0]) == 1

    def test_in_containers_of_a_closure(self) -> None:
        norm = nn.BatchNorm1d(3).double()
        held = {"a": [(norm,)]}
        assert self.updates(lambda t, x: held["a"][0][0](x), norm) == 1

    @pytest.mark.parametrize("kind", ["method", "callable", "closure"])
    def test_in_an_object(self, kind: str) -> None:
        tracked = Tracked()
        f = {"method": tracked.f, "callable": tracked, "closure": lambda t, x: tracked.norm(x)}[kind]
        assert self.updates(f, tracked.norm) == 1


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 6])
def test_segments_are_run_again_with_the_buffers_of_their_beginning(checkpoints: int) -> None:
    part = nn.utils.parametrizations.spectral_norm(linear(16))
    with torch.no_grad():
        part.parametrizations.weight.original.add_(normal(16, 16))
    field = odeadv.AdversarialField(lambda t, x: torch.tanh(part(x)), squares, 0.1)
    kept = {name: value.clone() for name, value in part.state_dict().items()}
    found = []
    for count in (None, checkpoints):
        part.load_state_dict(kept)
        found.append(odeadv.solve(field, normal(8, 16), (0.0, 1.0), steps=6, checkpoints=count))
    assert torch.equal(found[0].xs, found[1].xs)
    for one, other in zip(found[0].costate.nodes, found[1].costate.nodes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("a", [0.1, 0.3, 0.7, 1.1])
def test_a_jump_at_time_zero_that_the_grid_meets_up_to_rounding(a: float, n: int) -> None:
    h = a / n
    f = Piecewise([odeadv.Operator(decay), Jump(lambda x: 2 * x), odeadv.Operator(decay)], [-a, 0.0, h, 2 * h])
    sol = odeadv.solve(f, ONE, (-a, 2 * h), steps=n + 2, scheme="rk4")
    assert math.isclose(sol.xs[-1].item(), 2 * math.exp(-a - h), rel_tol=0.1)


class TestTraining:
    def data(self) -> ImageDataset:
        images = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=seeded())
        labels = torch.randint(0, 10, (40,), generator=seeded())
        return ImageDataset("noise", "test", images, labels, images, labels, 10, flip=False)

    def trained(self, folder: Path, *, validation: bool = False, **options: object) -> None:
        data = self.data()
        config = TrainConfig(epochs=1, batch_size=20, milestones=())
        pair = (data.test_images[:4], data.test_labels[:4]) if validation else None
        net = preact_resnet(depth=8, **{"width": 4, "generator": seeded(), **options})
        train(net, data, config, checkpoints=folder, validation=pair)

    @pytest.mark.parametrize(
        ("other", "part"),
        [
            ({"noise": 0.1}, "net.config.noise"),
            ({"mean": (0.1, 0.2, 0.3)}, "net.config.mean"),
            ({"width": 8}, "net.config.width, net.tensors"),
            ({"validation": True}, "validation"),
        ],
    )
    def test_checkpoints_of_another_network_are_refused(
        self, tmp_path: Path, other: dict[str, object], part: str
    ) -> None:
        self.trained(tmp_path)
        self.trained(tmp_path)
        with pytest.raises(ValueError, match=f"checkpoint of another run.*{part}"):
            self.trained(tmp_path, **other)

    @pytest.mark.parametrize("defended", [False, True])
    def test_the_ratio_of_trades_is_of_attacked_images(self, defended: bool) -> None:
        net = preact_resnet(depth=8, width=4, generator=seeded())
        images, labels = torch.rand(4, 3, 8, 8, generator=seeded()), torch.arange(4)
        defence = Layerwise(eta=1.0) if defended else Undefended()
        step = Step(net, images, labels, defence, Draws(0, 0, slice(0, 4), 4))
        seen = Trades(steps=2)(step).images
        assert seen is not None
        assert 0.0 < float((seen - images).abs().max()) <= 8 / 255 + 1e-6
