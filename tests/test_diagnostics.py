"""Every diagnostic against a closed form in float64, and on a small network against Jacobians written out."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import measured_order, small_resnet
from torch import Tensor

import odeadv
from benchmarks._expm import matrix_exp
from odeadv import diagnostics
from odeadv.diagnostics._second_order import terms_of
from odeadv.diagnostics._trajectory import posed, walk
from odeadv.models import PreActResNet

pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")


A = torch.tensor([[0.1, 1.0, 0.3], [-1.4, 0.2, 0.0], [0.5, -0.2, -0.6]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
X0 = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
LAMBDA, T = 0.4, 1.5


def half_square(x: Tensor) -> Tensor:
    return 0.5 * (x * x).sum()


def linear(eta: float, steps: int = 8) -> odeadv.AdversarialField:
    return odeadv.AdversarialField(lambda t, x: A @ x, half_square, eta, x0=X0, t_span=(0.0, 1.0), steps=steps)


def scalar(eta: float, steps: int, sign: float = 1.0) -> odeadv.AdversarialField:
    x0 = torch.tensor([1.3], dtype=torch.float64)
    return odeadv.AdversarialField(
        lambda t, x: LAMBDA * x, lambda x: sign * half_square(x), eta, x0=x0, t_span=(0.0, T), steps=steps
    )


def euler_nodes(steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """States and costates of the linear field by powers of I + hA."""
    step = EYE + A / steps
    states = [torch.linalg.matrix_power(step, n) @ X0 for n in range(steps + 1)]
    return states, [torch.linalg.matrix_power(step.T, steps - n) @ states[-1] for n in range(steps + 1)]


def norms(tensors: list[Tensor]) -> list[float]:
    return [float(x.detach().norm()) for x in tensors]


def small_net(**options: object) -> tuple[PreActResNet, Tensor, Tensor]:
    return small_resnet(depth=8, seed=1, width=2, num_classes=4, labels=(1, 3), size=8, **options)


def by_hand(net: PreActResNet, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States and costates of the network by back-propagation, outside the package."""
    states = [net.stem(images)]
    for block in net.blocks:
        states.append(block(states[-1]))
    loss = F.cross_entropy(net.head(states[-1]), labels)
    return states, list(torch.autograd.grad(loss, states))


def jacobian(f: object, x: Tensor) -> Tensor:
    full = torch.autograd.functional.jacobian(f, x.detach())
    return full.reshape(full[..., 0, 0, 0, 0].numel(), x.numel())


class TestPerturbation:
    def test_closed_form(self):
        states, costates = euler_nodes(8)
        result = diagnostics.perturbation(linear(-0.3))
        after = [x + A @ x for x in states[:-1]]
        assert result.ratios == pytest.approx(
            [a / b for a, b in zip(norms(after), norms(costates), strict=False)], rel=1e-12
        )
        assert result.ratio == result.ratios[0]
        assert result.ts == [n / 8 for n in range(9)]
        assert result.state_norms == pytest.approx(norms(states), rel=1e-12)
        assert result.costate_norms == pytest.approx(norms(costates), rel=1e-12)
        shares = [0.3 * b / a for a, b in zip(norms(states), norms(costates), strict=True)]
        assert result.relative == pytest.approx(shares, rel=1e-12)
        moves = [float((b - a).norm() / a.norm()) for a, b in pairwise(states)]
        assert result.moves == pytest.approx(moves, rel=1e-12)
        assert result.loss == pytest.approx(float(half_square(states[-1])), rel=1e-12)

    def test_eta_only_scales_the_relative_size(self):
        strong, none = diagnostics.perturbation(linear(2.0)), diagnostics.perturbation(linear(0.0))
        assert strong.ratios == none.ratios
        assert strong.costate_norms == none.costate_norms
        assert none.relative == [0.0] * 9

    def test_transforms_do_not_act(self):
        field = linear(0.3)
        zero = field.transformed(lambda nodes: [torch.zeros_like(node) for node in nodes])
        assert diagnostics.perturbation(zero) == diagnostics.perturbation(field)

    def test_one_recording_is_all_it_costs(self):
        calls = 0

        def f(t: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.sin(x)

        field = odeadv.AdversarialField(f, half_square, 0.1)
        diagnostics.perturbation(field, X0, (0.0, 5.0), dt=1.0)
        assert calls == 5

    def test_a_step_that_is_no_unit_of_euler_evaluates_f(self):
        field = odeadv.AdversarialField(lambda t, x: A @ x, half_square, 0.1)
        result = diagnostics.perturbation(field, X0, (0.0, 2.0), dt=1.0, substep="rk4")
        step = matrix_exp(torch.zeros_like(A))
        for k in range(4, 0, -1):
            step = EYE + A @ step / k  # the stability polynomial of RK4
        a0 = torch.linalg.matrix_power(step.T, 2) @ torch.linalg.matrix_power(step, 2) @ X0
        assert result.ratio == pytest.approx(float((X0 + A @ X0).norm() / a0.norm()), rel=1e-12)

    @pytest.mark.parametrize("training", [True, False])
    def test_network(self, training: bool):
        net, images, labels = small_net()
        net.train(training)
        result = diagnostics.perturbation(net.field(images, labels, 20.0))
        states, costates = by_hand(net, images, labels)
        assert result.ratios == pytest.approx(
            [x / a for x, a in zip(norms(states[1:]), norms(costates), strict=False)], rel=1e-12
        )
        kept = [x.shape == y.shape for x, y in pairwise(states)]
        assert not all(kept)
        assert [not math.isnan(move) for move in result.moves] == kept

    def test_no_costate_is_an_infinite_ratio_and_null_in_json(self):
        field = odeadv.AdversarialField(lambda t, x: A @ x, lambda x: 0.0 * half_square(x), 0.1)
        result = diagnostics.perturbation(field, X0, (0.0, 1.0), steps=2)
        assert result.ratio == math.inf
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ratio"] is None

    def test_complex_state(self):
        z0 = torch.tensor([1.0 + 1.0j, 0.5j], dtype=torch.complex128)
        field = odeadv.AdversarialField(lambda t, z: 1j * z, lambda z: 0.5 * z.abs().square().sum(), 0.1)
        result = diagnostics.perturbation(field, z0, (0.0, 1.0), steps=1)
        growth = abs(1 + 1j)
        assert result.ratio == pytest.approx(growth / growth**2, rel=1e-12)


class TestSecondOrder:
    def test_linear(self):
        states, costates = euler_nodes(8)
        result = diagnostics.second_order(linear(0.3))
        drift = norms([A @ A @ x for x in states[:-1]])
        antisymmetric = norms([0.3 * (A - A.T) @ a for a in costates[:-1]])
        assert result.drift == pytest.approx(drift, rel=1e-12)
        assert result.plain == pytest.approx(drift, rel=1e-12)
        assert result.time == [0.0] * 8
        assert result.antisymmetric == pytest.approx(antisymmetric, rel=1e-12)
        whole = [A @ A @ x + 0.3 * (A - A.T) @ a for x, a in zip(states[:-1], costates[:-1], strict=True)]
        assert result.acceleration == pytest.approx(norms(whole), rel=1e-12)
        shares = [a / b for a, b in zip(antisymmetric, drift, strict=True)]
        assert result.antisymmetric_share == pytest.approx(shares, rel=1e-12)
        assert result.initial_velocity == pytest.approx(float((A @ X0).norm()), rel=1e-12)
        assert result.perturbed_initial_velocity == pytest.approx(float((A @ X0 + 0.3 * costates[0]).norm()), rel=1e-12)

    def test_a_symmetric_field_has_no_antisymmetric_term(self):
        field = odeadv.AdversarialField(lambda t, x: (A + A.T) @ x, half_square, 0.5)
        result = diagnostics.second_order(field, X0, (0.0, 1.0), steps=4)
        assert max(result.antisymmetric_share) < 1e-15

    @pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
    def test_time_dependence(self):
        def f(t: Tensor, x: Tensor) -> Tensor:
            return torch.cos(3.0 * t) * (A @ x) + t * t

        def clockless(t: Tensor, x: Tensor) -> Tensor:
            return math.cos(3.0 * float(t)) * (A @ x) + float(t) ** 2

        options = {"x0": X0, "t_span": (0.0, 1.0), "steps": 4}
        result, other = (
            diagnostics.second_order(odeadv.AdversarialField(g, half_square, 0.1), **options) for g in (f, clockless)
        )
        x, expected = X0, []
        for n in range(4):
            t = n / 4
            expected.append(float((-3.0 * math.sin(3.0 * t) * (A @ x) + 2.0 * t).norm()))
            x = x + 0.25 * (math.cos(3.0 * t) * (A @ x) + t * t)
        assert result.time == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert other.time == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert other.drift == pytest.approx(result.drift, rel=1e-12)

    def test_it_is_the_second_derivative_of_a_solved_trajectory(self):
        """Theorem 3.3 itself: differences of x(t) of the true equation, whose costate belongs to its own trajectory."""

        def f(t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(A @ x) + torch.cos(t) * x.flip(0)

        steps, h = 200, 1.0 / 200
        field = odeadv.AdversarialField(f, half_square, 0.05)
        options = {"substep": "rk4", "scheme": "strang-symmetric", "sweeps": "converge"}
        path = walk(posed(field, X0, (0.0, 1.0), steps=steps), **options)
        assert path.perturbed
        layers = list(path.layers())
        for n in (1, 50, 120, 199):
            difference = (path.states[n + 1] - 2.0 * path.states[n] + path.states[n - 1]) / h**2
            terms = terms_of(path, layers[n])
            assert float((difference - terms.acceleration).norm()) < 5e-4
            assert float((difference - terms.drift - terms.time).norm()) > 2e-2  # the term is seen
        velocity = (path.states[1] - path.states[0]) / h - 0.5 * h * terms_of(path, layers[0]).acceleration
        result = diagnostics.second_order(field, X0, (0.0, 1.0), steps=steps, **options)
        assert result.perturbed_initial_velocity == pytest.approx(float(velocity.norm()), abs=1e-4)
        assert abs(result.initial_velocity - result.perturbed_initial_velocity) > 1e-2

    def test_of_a_complex_state_the_transpose_is_the_adjoint(self):
        generator = torch.Generator().manual_seed(0)
        matrix = 0.5 * torch.randn(3, 3, dtype=torch.complex128, generator=generator)
        z = torch.randn(3, dtype=torch.complex128, generator=generator)
        field = odeadv.AdversarialField(
            lambda t, x: torch.exp(1j * t) * (matrix @ x), lambda x: 0.5 * x.abs().square().sum(), 0.1
        )
        result = diagnostics.second_order(field, z, (0.0, 1.0), steps=1)
        end = z + matrix @ z
        a = end + matrix.mH @ end
        assert result.antisymmetric == pytest.approx([float((0.1 * (matrix - matrix.mH) @ a).norm())], rel=1e-12)
        assert result.time == pytest.approx([float((matrix @ z).norm())], rel=1e-12)
        assert result.drift == pytest.approx([float((matrix @ matrix @ z).norm())], rel=1e-12)

    @pytest.mark.parametrize("training", [True, False])
    def test_network_against_explicit_jacobians(self, training: bool):
        net, images, labels = small_net()
        net.train(training)
        eta = 20.0
        result = diagnostics.second_order(net.field(images, labels, eta))
        states, costates = by_hand(net, images, labels)
        assert result.layers == [0]  # the other two blocks of depth 8 are jumps
        x, a = states[0].detach().reshape(-1), costates[0].reshape(-1)
        J = jacobian(net.blocks[0].residual, states[0])
        f = net.blocks[0].residual(states[0]).detach().reshape(-1)
        assert result.drift == pytest.approx([float((J @ f).norm())], rel=1e-10)
        assert result.antisymmetric == pytest.approx([float((eta * (J - J.T) @ a).norm())], rel=1e-10)
        assert result.acceleration == pytest.approx([float((J @ f + eta * (J - J.T) @ a).norm())], rel=1e-10)
        assert result.initial_change == pytest.approx(eta * float(a.norm() / f.norm()), rel=1e-10)
        assert x.numel() == len(J)


class TestCostate:
    def test_of_one_number_the_geometric_mean_is_exact_and_the_arithmetic_a_cosh(self):
        steps, h = 5, T / 5
        result = diagnostics.costate_residual(scalar(0.1, steps), substep="torchdiffeq:dopri5")
        assert result.layers == list(range(steps))
        assert max(result.geometric) < 1e-6
        half = 0.5 * LAMBDA * h
        assert result.arithmetic == pytest.approx([math.cosh(half) - 1.0] * steps, rel=1e-3)
        assert result.arithmetic_length == pytest.approx([math.cosh(half)] * steps, rel=1e-6)
        assert result.residual == pytest.approx([abs(1.0 - math.tanh(half) / half)] * steps, rel=1e-3)
        # a_{n+1} (1 + lambda h / 2 * (value of the costate at 3/4, by interpolation)) against exp(lambda h / 2)
        exact = 1.0 + half * (0.25 * math.exp(2.0 * half) + 0.75)
        assert result.exact == pytest.approx([abs(exact / math.exp(half) - 1.0)] * steps, rel=1e-3)
        assert result.undefined == [0.0] * steps

    def test_linear(self):
        steps, h = 6, 1.0 / 6
        result = diagnostics.costate_residual(linear(0.1, steps))
        _, a = euler_nodes(steps)
        for n in range(steps):
            reference = matrix_exp(0.5 * h * A.T) @ a[n + 1]
            mean = 0.5 * (a[n] + a[n + 1])
            product = a[n] * a[n + 1]
            geometric = torch.where(product > 0, a[n].sign() * product.abs().sqrt(), 0.0)
            size = float(reference.norm())
            assert result.arithmetic[n] == pytest.approx(float((mean - reference).norm()) / size, rel=1e-4)
            assert result.geometric[n] == pytest.approx(float((geometric - reference).norm()) / size, rel=1e-4)
            assert result.geometric_length[n] == pytest.approx(float(geometric.norm()) / size, rel=1e-5)
            residual = (a[n + 1] - a[n]) / h + A.T @ mean
            assert result.residual[n] == pytest.approx(float(residual.norm() / (A.T @ mean).norm()), rel=1e-9)
            assert result.undefined[n] == pytest.approx(float((product < 0).double().mean()))

    def test_errors_of_the_midpoints_fall_at_their_orders(self):
        def f(t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(A @ x) * torch.exp(-t)

        field = odeadv.AdversarialField(f, half_square, 0.1)

        def error(kind: str, steps: int) -> float:
            result = diagnostics.costate_residual(field, X0, (0.0, 1.0), steps=steps, substep="rk4")
            return getattr(result, kind)[steps // 2]

        assert measured_order(lambda n: error("arithmetic", n), (8, 16, 32)) == pytest.approx(2.0, abs=0.15)
        assert measured_order(lambda n: error("exact", n), (8, 16, 32)) > 2.8
        assert measured_order(lambda n: error("residual", n), (8, 16, 32)) == pytest.approx(2.0, abs=0.25)

    def test_exact_is_what_the_solver_uses(self):
        net, images, labels = small_net()
        field = net.eval().field(images, labels, 1.0)
        result = diagnostics.costate_residual(field)
        solution = odeadv.solve(field, scheme="strang-midpoint")
        mean = odeadv.solve(field, scheme="strang").costate(0.5)
        gap = float((solution.costate(0.5) - mean).norm())
        size = float(mean.norm()) / result.arithmetic_length[0]
        assert gap <= (result.arithmetic[0] + result.exact[0]) * size * (1 + 1e-12)
        assert gap >= abs(result.arithmetic[0] - result.exact[0]) * size * (1 - 1e-12)


class TestContraction:
    def reach(self, steps: int) -> float:
        """I of Lie with Euler: h times the squares of the responses to a unit of forcing."""
        h = T / steps
        return h * sum((1.0 + h * LAMBDA) ** (2 * (steps - n)) for n in range(1, steps + 1))

    def test_closed_form_of_the_discrete_sweep(self):
        result = diagnostics.contraction(scalar(0.3, 7), scheme="lie")
        assert result.factor == pytest.approx(0.3 * self.reach(7), rel=1e-6)
        assert result.eigenvalue == pytest.approx(result.factor, rel=1e-3)
        assert result.reach == pytest.approx(self.reach(7), rel=1e-6)
        assert result.converged
        # Phi is affine with this slope here: Phi(u) - u = slope * u, Phi(u) = (1 + slope) u for the recording u.
        assert result.change == pytest.approx(result.factor / (1.0 + result.factor), rel=1e-6)

    def test_limit_of_fine_steps(self):
        whole = (math.exp(2.0 * LAMBDA * T) - 1.0) / (2.0 * LAMBDA)
        result = diagnostics.contraction(scalar(1.0, 64), scheme="strang-symmetric", substep="rk4")
        assert result.factor == pytest.approx(whole, rel=1e-3)

    def test_sign_and_zero(self):
        concave = diagnostics.contraction(scalar(0.3, 7, sign=-1.0), scheme="lie")
        assert concave.eigenvalue == pytest.approx(-0.3 * self.reach(7), rel=1e-3)
        none = diagnostics.contraction(scalar(0.0, 7), scheme="lie")
        assert none.factor == none.change == 0.0
        assert none.reach == pytest.approx(self.reach(7), rel=1e-6)

    def test_it_is_the_rate_of_plain_sweeps(self):
        def f(t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(A @ x)

        for eta, converges in ((0.05, True), (0.9, False)):
            field = odeadv.AdversarialField(f, lambda x: half_square(x - 3.0), eta)
            options = {"x0": X0, "t_span": (0.0, 1.5), "steps": 12}
            result = diagnostics.contraction(field, rtol=1e-4, most=200, **options)
            assert (result.factor < 1.0) is converges
            plain = odeadv.Converge(memory=0, most=200, rtol=1e-12)
            solution = odeadv.solve(field, sweeps=plain, throw=False, **options)
            residuals = solution.stats.residuals
            assert (solution.status is odeadv.Status.SUCCESS) is converges
            if converges:
                rate = (residuals[-1] / residuals[-5]) ** 0.25
                assert rate == pytest.approx(result.factor, rel=0.1)

    def test_largest_eigenvalue_of_the_explicit_hessian(self):
        """With Lie and Euler the sweep's derivative is the Hessian of the loss in the forcing, node by node."""
        steps, h = 4, 0.25

        def f(x: Tensor) -> Tensor:
            return torch.tanh(A @ x)

        def loss(forcing: Tensor) -> Tensor:
            x = X0
            for u in forcing.reshape(steps, 3):
                x = x + h * f(x) + h * u
            return half_square(x)

        eta = 0.2
        field = odeadv.AdversarialField(lambda t, x: f(x), half_square, eta, x0=X0, t_span=(0.0, 1.0), steps=steps)
        recorded = odeadv.solve(field, scheme="lie").costate
        u = torch.cat([recorded((n + 1) * h) for n in range(steps)])
        hessian = torch.autograd.functional.hessian(loss, eta * u) / h
        expected = float(torch.linalg.eigvalsh(hessian).abs().max())
        result = diagnostics.contraction(field, scheme="lie", rtol=1e-5, most=500)
        assert result.reach == pytest.approx(expected, rel=1e-6)


class TestEnergy:
    def test_hamiltonian_is_constant_on_the_true_solution(self):
        exact = {"scheme": "strang-symmetric", "substep": "midpoint", "sweeps": odeadv.Converge(rtol=1e-12)}

        def f(t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(A @ x)

        field = odeadv.AdversarialField(f, half_square, 0.1)

        def drift(steps: int) -> float:
            return diagnostics.hamiltonian(field, X0, (0.0, 1.0), steps=steps, **exact).drift

        assert measured_order(drift, (8, 16, 32)) == pytest.approx(2.0, abs=0.15)
        once = diagnostics.hamiltonian(field, X0, (0.0, 1.0), steps=64, **(exact | {"sweeps": 1}))
        assert once.drift > 10 * drift(64)

    def test_hamiltonian_values(self):
        solution = odeadv.solve(linear(0.2), scheme="lie", save_at="steps")
        expected = []
        for t, x in zip(solution.ts.tolist(), solution.xs, strict=True):
            a = solution.costate(t)
            expected.append(float(a @ A @ x + 0.1 * a @ a))
        result = diagnostics.hamiltonian(linear(0.2), solution=solution)
        assert result.values == pytest.approx(expected[:-1], rel=1e-12)
        assert result.ends == pytest.approx(expected[1:], rel=1e-12)
        assert result.drift == pytest.approx(max(abs(h - expected[0]) for h in expected), rel=1e-9)
        assert diagnostics.hamiltonian(linear(0.2), scheme="lie") == result

    def test_hamiltonian_of_pieces_is_compared_within_them(self):
        net, images, labels = small_net()
        result = diagnostics.hamiltonian(net.eval().field(images, labels, 5.0), scheme="lie")
        solution = odeadv.solve(net.field(images, labels, 5.0), scheme="lie", save_at="steps")
        levels = []
        for t in (0, 1):
            x, a = solution.xs[t], solution.costate(float(t))
            levels.append(float((a * net.blocks[0].residual(x)).sum() + 2.5 * (a * a).sum()))
        assert result.layers == [0]
        assert [*result.values, *result.ends] == pytest.approx(levels, rel=1e-12)
        assert result.drift == pytest.approx(abs(levels[1] - levels[0]), rel=1e-9)

    def test_energy_of_each_scheme(self):
        steps, eta = 6, 0.2
        h, r = T / steps, 1.0 + LAMBDA * T / steps
        a = [1.3 * r**steps * r ** (steps - n) for n in range(steps + 1)]
        result = diagnostics.energy(scalar(eta, steps), schemes=("lie", "strang", "strang-symmetric"))
        lie = 0.5 * eta * h * sum(v**2 for v in a[1:])
        strang = 0.25 * eta * h * sum(b**2 + (0.5 * (b + c)) ** 2 for b, c in pairwise(a))
        both = 0.25 * eta * h * sum(b**2 + c**2 for b, c in pairwise(a))
        assert result.spent == pytest.approx([lie, strang, both], rel=1e-12)
        assert result.energy == pytest.approx(both, rel=1e-12)
        assert result.plain_loss == pytest.approx(0.5 * (1.3 * r**steps) ** 2, rel=1e-12)
        x = 1.3 * r**steps + eta * h * sum(v * r ** (steps - n) for n, v in enumerate(a[1:], start=1))
        assert result.losses[0] == pytest.approx(0.5 * x * x, rel=1e-12)
        for name, loss in zip(result.schemes, result.losses, strict=True):
            assert float(odeadv.solve(scalar(eta, steps), scheme=name).loss) == pytest.approx(loss, rel=1e-14)
        assert result.loss_per_energy[0] == pytest.approx(result.loss_rise[0] / lie, rel=1e-12)

    def test_a_weak_perturbation_buys_twice_its_energy(self):
        result = diagnostics.energy(linear(1e-6), steps=2)
        assert result.loss_per_energy[0] == pytest.approx(2.0, rel=1e-4)
        assert result.loss_per_energy[3] == pytest.approx(2.0, abs=0.5)

    def test_only_the_solve_is_metered_with_several_sweeps(self):
        once = diagnostics.energy(linear(0.05), schemes=["lie"], sweeps=1)
        thrice = diagnostics.energy(linear(0.05), schemes=["lie"], sweeps=3)
        assert thrice.spent[0] == pytest.approx(once.spent[0], rel=0.5)
        solution = odeadv.solve(linear(0.05), scheme="lie", sweeps=3)
        nodes = [solution.costate((n + 1) / 8) for n in range(8)]
        assert thrice.spent[0] == pytest.approx(0.025 / 8 * sum(float(a @ a) for a in nodes), rel=1e-12)

    def test_without_a_perturbation_there_is_none(self):
        with pytest.raises(ValueError, match="eta = 0"):
            diagnostics.energy(linear(0.0))


class TestGrowth:
    def test_lipschitz_of_a_matrix(self):
        result = diagnostics.lipschitz(linear(0.3), rtol=1e-3, most=1000)
        layer = float(torch.linalg.matrix_norm(EYE + A / 8, 2))
        assert result.velocity == pytest.approx([float(torch.linalg.matrix_norm(A, 2))] * 8, rel=1e-4)
        assert result.layer == pytest.approx([layer] * 8, rel=1e-4)
        assert result.bound == pytest.approx(layer**8, rel=1e-3)
        assert all(result.converged)

    @pytest.mark.filterwarnings("error")
    def test_one_operator_is_followed_without_a_warning(self):
        assert all(ratio > 0 for ratio in diagnostics.growth(linear(0.3), direction=X0).ratios)

    def test_what_has_not_converged_says_so(self):
        rough = diagnostics.lipschitz(linear(0.3), rtol=1e-6, most=2)
        assert not any(rough.converged)
        assert max(rough.velocity) <= float(torch.linalg.matrix_norm(A, 2)) * (1 + 1e-12)

    @pytest.mark.parametrize("training", [True, False])
    def test_lipschitz_of_a_network(self, training: bool):
        net, images, labels = small_net()
        net.train(training)
        result = diagnostics.lipschitz(net.field(images, labels), rtol=1e-4, most=3000)
        states, _ = by_hand(net, images, labels)
        maps = [jacobian(block, x) for block, x in zip(net.blocks, states, strict=False)]
        inner = jacobian(net.blocks[0].residual, states[0])
        assert result.layer == pytest.approx([float(torch.linalg.matrix_norm(J, 2)) for J in maps], rel=1e-3)
        assert result.velocity[0] == pytest.approx(float(torch.linalg.matrix_norm(inner, 2)), rel=1e-3)
        assert [math.isnan(v) for v in result.velocity] == [False, True, True]

    def test_growth_of_a_direction_and_of_a_difference(self):
        v = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
        step = EYE + A / 8
        expected = [float((torch.linalg.matrix_power(step, n) @ v).norm() / v.norm()) for n in range(9)]
        for options in ({"direction": v}, {"start": X0 + v}):
            result = diagnostics.growth(linear(0.3), **options)
            assert result.ratios == pytest.approx(expected, rel=1e-12)
            assert result.linear is ("direction" in options)
        states, _ = euler_nodes(8)
        scales = [float(X0.norm() / x.norm()) for x in states]
        assert result.relative == pytest.approx([e * s for e, s in zip(expected, scales, strict=True)], rel=1e-12)
        assert result.size == pytest.approx(float(v.norm()))

    def test_growth_of_a_split_field(self):
        B = 0.3 * A.T
        field = odeadv.SplitField(one=lambda t, x: A @ x, two=lambda t, x: B @ x)
        result = diagnostics.growth(field, X0, (0.0, 1.0), steps=4, direction=X0, scheme="lie")
        step = (EYE + B / 4) @ (EYE + A / 4)
        assert result.ratios[1] == pytest.approx(float((step @ X0).norm() / X0.norm()), rel=1e-12)

    def test_growth_of_a_network(self):
        net, images, labels = small_net()
        field = net.eval().field(images, labels)
        states, _ = by_hand(net, images, labels)
        v = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        result = diagnostics.growth(field, direction=v)
        moved = v.reshape(-1)
        for block, x, ratio in zip(net.blocks, states, result.ratios[1:], strict=False):
            moved = jacobian(block, x) @ moved
            assert ratio == pytest.approx(float(moved.norm() / v.norm()), rel=1e-10)
        near = diagnostics.growth(field, start=states[0].detach() + 1e-7 * v)
        assert near.ratios == pytest.approx(result.ratios, rel=1e-4)


class TestTrace:
    def test_round_trip(self):
        trace = diagnostics.Trace()
        trace.add(0, diagnostics.perturbation(linear(0.1)))
        trace.add(1, math.inf)
        trace.add(2.5, 3e5)
        values = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
        back = diagnostics.Trace.from_dict(values)
        assert back.to_dict() == trace.to_dict()
        assert back.ratios == trace.ratios
        assert back.at == [0.0, 1.0, 2.5]
        assert len(back) == 3

    def test_errors(self):
        trace = diagnostics.Trace(unit="step")
        trace.add(3, 1e5)
        with pytest.raises(ValueError, match=r"^at: got 2 after 3, expected an increasing step"):
            trace.add(2, 1e5)
        with pytest.raises(ValueError, match=r"^values: got lists of lengths .* of one length"):
            diagnostics.Trace.from_dict({"at": [1.0], "ratios": [], "losses": [], "layers": []})

    def test_figure_2(self):
        trace = diagnostics.Trace()
        for epoch, ratio in enumerate((2e6, 4e5, 1.5e5)):
            trace.add(epoch, ratio)
        (axes,) = trace.plot().axes
        (line,) = axes.get_lines()
        assert list(line.get_ydata()) == [2e6, 4e5, 1.5e5]
        assert axes.get_yscale() == "log"
        (band,) = axes.patches
        box = band.get_extents().transformed(axes.transData.inverted())
        assert (box.y0, box.y1) == pytest.approx((1e5, 2e6))


@pytest.mark.parametrize(
    "name",
    [
        "perturbation",
        "second_order",
        "costate_residual",
        "contraction",
        "hamiltonian",
        "energy",
        "lipschitz",
        "growth",
    ],
)
def test_nothing_is_left_behind(name: str):
    net, images, labels = small_net(noise=0.1)
    net.train()
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    identities = {key: (id(value), value._version) for key, value in net.named_buffers()}
    random = torch.get_rng_state()
    measure = getattr(diagnostics, name)
    first = measure(net.field(images, labels, 3.0))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {key: (id(value), value._version) for key, value in net.named_buffers()} == identities
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.requires_grad and bool((p.grad == 0.5).all()) for p in net.parameters())
    assert all(module.training for module in net.modules())
    assert measure(net.field(images, labels, 3.0)).to_dict() == first.to_dict()
    with torch.inference_mode():
        assert measure(net.field(images, labels, 3.0)).to_dict() == first.to_dict()
    json.dumps(first.to_dict(), allow_nan=False)
    assert all(isinstance(key, str) for key in first.summary())
    assert first.plot().axes[0].get_lines()


def test_plots_share_axes():
    first, second = diagnostics.lipschitz(linear(0.1)), diagnostics.lipschitz(linear(0.1, 4))
    figure = first.plot(label="one")
    assert second.plot(figure.axes[0], label="two") is figure
    assert len(figure.axes[0].get_lines()) == 2
    assert len(figure.axes[0].get_legend().get_texts()) == 2


def test_diagnose(tmp_path):
    net, images, labels = small_net()
    other, _, _ = small_net()
    fields = {"plain": net.field(images, labels, 3.0), "twin": other.field(images, labels, 3.0)}
    start = {"plain": net.stem(images + 0.01)}
    result = diagnostics.diagnose(fields, tmp_path / "page", start=start, title="Two networks", about="On two images.")
    written = sorted(path.name for path in (tmp_path / "page").iterdir())
    names = ["contraction", "costate_residual", "energy", "growth", "hamiltonian", "lipschitz", "perturbation"]
    names.append("second_order")
    assert written == sorted([*(f"{name}.png" for name in names), "diagnostics.json", "diagnostics.md"])
    values = json.loads((tmp_path / "page" / "diagnostics.json").read_text(encoding="utf-8"))
    assert values == json.loads(json.dumps(result.to_dict()))
    assert sorted(values["fields"]["twin"]) == names
    assert result.results["plain"]["perturbation"] == diagnostics.perturbation(fields["plain"])
    assert result.results["plain"]["second_order"] == diagnostics.second_order(fields["plain"])
    assert result.results["plain"]["lipschitz"].to_dict() == diagnostics.lipschitz(fields["plain"]).to_dict()
    assert result.results["plain"]["energy"] == diagnostics.energy(fields["plain"])
    assert not result.results["plain"]["growth"].linear
    assert result.results["twin"]["growth"].linear
    page = result.page.read_text(encoding="utf-8")
    assert page.startswith("# Two networks\n\nOn two images.\n")
    assert "| quantity | plain | twin |" in page
    assert all(f"]({name}.png)" in page for name in names)


def test_a_diagnosis_is_written_again_from_its_json(tmp_path):
    """Also where a field lacks a diagnostic: the energy of eta = 0 is not defined."""
    first = diagnostics.diagnose({"net": linear(0.1), "plain": linear(0.0)}, tmp_path / "a", title="T", about="A.")
    again = diagnostics.Diagnosis.from_dict(
        json.loads((tmp_path / "a" / "diagnostics.json").read_text()), tmp_path / "b"
    )
    again.write()
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert again.page == tmp_path / "b" / "diagnostics.md"
    assert (again.title, again.about) == (first.title, first.about)
    for damaged in ({}, {**first.to_dict(), "fields": {"net": {"unknown": {}}}}, {**first.to_dict(), "fields": []}):
        with pytest.raises(ValueError, match=r"^data: got no diagnosis .* expected what Diagnosis.to_dict returns"):
            diagnostics.Diagnosis.from_dict(damaged, tmp_path)


def test_diagnose_a_field_without_a_loss(tmp_path):
    result = diagnostics.diagnose(lambda t, x: A @ x, tmp_path, X0, (0.0, 1.0), steps=4)
    assert list(result.results[""]) == ["lipschitz", "growth"]


def test_diagnose_a_transformed_field(tmp_path):
    field = linear(0.1).transformed(lambda nodes: [2.0 * node for node in nodes])
    result = diagnostics.diagnose(field, tmp_path).results[""]
    assert result["energy"].schemes == ["lie", "strang", "strang-symmetric"]
    assert result["energy"].spent[0] == pytest.approx(4.0 * diagnostics.energy(linear(0.1)).spent[0], rel=1e-12)


def test_diagnose_goes_on_where_one_solve_fails(tmp_path):
    field = odeadv.AdversarialField(lambda t, x: x**3, lambda x: (x**4).sum(), 1e6)
    result = diagnostics.diagnose(field, tmp_path, torch.full((2,), 0.9, dtype=torch.float64), (0.0, 1.0), steps=8)
    assert set(result.failures[""]) == {"contraction", "hamiltonian", "energy"}
    assert {"perturbation", "second_order", "lipschitz", "growth"} <= set(result.results[""])
    assert "## Not measured" in result.page.read_text(encoding="utf-8")


def test_errors_come_first(tmp_path):
    with pytest.raises(TypeError, match=r"^field: got function, expected an AdversarialField: perturbation needs"):
        diagnostics.perturbation(lambda t, x: x)
    with pytest.raises(ValueError, match=r"^x0: not given"):
        diagnostics.perturbation(odeadv.AdversarialField(lambda t, x: x, half_square, 0.1, t_span=(0, 1), steps=2))
    with pytest.raises(odeadv.SolveError):
        diagnostics.perturbation(
            odeadv.AdversarialField(lambda t, x: x**3, half_square, 0.1), 1e200 * X0, (0, 1), steps=4
        )
    with pytest.raises(ValueError, match=r"^direction, start: got both"):
        diagnostics.growth(linear(0.1), direction=X0, start=X0)
    with pytest.raises(ValueError, match=r"^direction: got torch.float64 of shape \(2,\), expected torch.float64"):
        diagnostics.growth(linear(0.1), direction=X0[:2])
    with pytest.raises(ValueError, match=r"^start: got the initial state itself"):
        diagnostics.growth(linear(0.1), start=X0)
    with pytest.raises(ValueError, match=r"^rtol: got 2"):
        diagnostics.contraction(linear(0.1), rtol=2)
    with pytest.raises(ValueError, match=r"^most: got 0"):
        diagnostics.lipschitz(linear(0.1), most=0)
    with pytest.raises(ValueError, match=r"^solution: got one with x0"):
        diagnostics.hamiltonian(linear(0.1), solution=odeadv.solve(linear(0.1), save_at="steps"), steps=3)
    with pytest.raises(ValueError, match=r"^solution: got 2 states of 9"):
        diagnostics.hamiltonian(linear(0.1), solution=odeadv.solve(linear(0.1)))
    with pytest.raises(ValueError, match=r"^start: got one for 'b'"):
        diagnostics.diagnose({"a": linear(0.1)}, tmp_path / "none", start={"b": X0})
    assert not (tmp_path / "none").exists()


def test_the_programs_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(program, names)
    assert len(names["trace"]) == 3
    assert names["page"].page.exists()
    assert "energy" in names["page"].results["with the defence"]
    exported = set(re.findall(r"`([a-z_]+|Trace)`", page.split("| reading |")[1].split("\n\n")[0]))
    functions = {name for name in diagnostics.__all__ if name.islower()} - {"diagnose"}
    assert exported == functions | {"Trace"}


# ---- faults that once passed unnoticed ----


def test_contraction_of_a_field_with_kinks_is_measured_where_the_hessian_sees_nothing():
    """f = W2 relu(W1 x), linear loss: piecewise linear, so the Hessian is 0, and sweeps still do not settle."""
    generator, n = torch.Generator().manual_seed(0), 200
    first, second = (torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 for _ in range(2))
    weights, x0 = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    found = {}
    for name, act in (("relu", torch.relu), ("tanh", torch.tanh)):
        field = odeadv.AdversarialField(
            lambda t, x, act=act: second @ act(first @ x),
            lambda x: weights @ x,
            eta=0.3,
            x0=x0,
            t_span=(0, 1),
            steps=10,
        )
        options = {"scheme": "lie"}
        found[name] = diagnostics.contraction(field, **options)
        nodes = [torch.cat([*odeadv.solve(field, sweeps=k, **options).costate.nodes]) for k in (1, 2, 3)]
        shrunk = (nodes[2] - nodes[1]).norm() / (nodes[1] - nodes[0]).norm()
        assert found[name].measured == pytest.approx(float(shrunk), rel=1e-9)
    assert found["relu"].factor == 0.0
    assert found["relu"].measured > 0.05
    assert found["tanh"].measured == pytest.approx(found["tanh"].factor, rel=0.5)


@pytest.mark.parametrize(("d", "outlier"), [(3000, 1.3), (3000, -1.3), (50, 1.05)])
def test_a_start_within_many_equal_eigenvalues_is_not_taken_for_the_largest(d, outlier):
    curvature = torch.ones(d, dtype=torch.float64)
    curvature[0] = outlier
    field = odeadv.AdversarialField(lambda t, x: 0 * x, lambda x: 0.5 * (curvature * x * x).sum(), eta=0.9)
    x0 = torch.ones(d, dtype=torch.float64)
    found = diagnostics.contraction(field, x0, (0.0, 1.0), steps=4, scheme="lie", most=400)
    assert found.factor == pytest.approx(0.9 * abs(outlier), rel=0.02)
    assert found.eigenvalue == pytest.approx(0.9 * outlier, rel=0.02)


def test_a_single_sensitive_component_among_many_is_found():
    rate = torch.full((200_000,), -0.1)
    rate[0] = 1.0
    found = diagnostics.lipschitz(lambda t, x: rate * x, torch.ones(200_000), (0.0, 1.0), steps=1)
    assert found.layer == [pytest.approx(2.0, rel=0.02)]
    assert found.summary()["layers whose estimate has not converged"] == 0.0
    short = diagnostics.lipschitz(lambda t, x: rate * x, torch.ones(200_000), (0.0, 1.0), steps=1, most=2)
    assert short.summary()["layers whose estimate has not converged"] == 1.0


def test_time_in_a_tensor_and_in_a_number_at_once():
    """Autograd has one of the two only: f_t = 3 cos(3 t) A x + b."""
    b = torch.tensor([0.4, -0.3], dtype=torch.float64)
    matrix = torch.tensor([[0.1, 0.9], [-0.7, 0.2]], dtype=torch.float64)
    field = odeadv.AdversarialField(
        lambda t, x: math.sin(3 * float(t)) * (matrix @ x) + t * b, lambda x: 0.5 * (x**2).sum(), eta=0.1
    )
    x0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
    found = diagnostics.second_order(field, x0, (0.0, 1.0), steps=4)
    assert found.time[0] == pytest.approx(float((3 * matrix @ x0 + b).norm()), rel=1e-7)
