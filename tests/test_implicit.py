"""Implicit sub-steps: order, stability, Newton's iteration, gradients and costates; linear operators."""

import math
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Y0, A, Q, measured_order, seeded
from scipy.fft import dctn
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

import odeadv
from odeadv.fields import Forcing
from odeadv.fields._linear import _cosine
from odeadv.splitting import get_substep
from odeadv.support.krylov import gmres

IMPLICIT = ("backward-euler", "crank-nicolson", "implicit-midpoint", "sdirk2", "sdirk4")
L_STABLE = ("backward-euler", "sdirk2", "sdirk4")
SPAN = (0.0, 1.0)
F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def coupled(t: Tensor, x: Tensor) -> Tensor:
    """Return a non-linear, time-dependent field of two unknowns on the last axis."""
    return torch.stack([-x[..., 0] * x[..., 1] + torch.cos(t), x[..., 0] ** 2 - 2 * x[..., 1]], -1)


def end(f, x0=None, scheme="sdirk2", steps=2, span=SPAN, **options) -> Tensor:
    return odeadv.solve(f, tensor(1.0, 0.5) if x0 is None else x0, span, scheme=scheme, steps=steps, **options).xs[-1]


@pytest.mark.parametrize("name", IMPLICIT)
def test_the_order_is_the_one_declared(name):
    assert name in odeadv.substep_names()
    method = get_substep(name)
    fine = end(coupled, scheme="rk4", steps=200)
    order = measured_order(lambda n: (end(coupled, scheme=name, steps=n) - fine).norm().item(), (8, 16))
    assert order == pytest.approx(method.order, abs=0.15)


@pytest.mark.parametrize("name", IMPLICIT)
def test_one_large_step_of_an_l_stable_method_forgets_a_stiff_transient(name):
    rate = 1e6
    x = end(lambda t, x: -rate * (x - torch.cos(t)) - torch.sin(t), tensor(2.0), scheme=name, steps=1)
    off = (x - math.cos(1.0)).abs().item()
    assert off < 1e-2 if name in L_STABLE else off > 0.5


def test_a_tableau_of_ones_own():
    theta = odeadv.DIRK("theta", 1, (0.0, 1.0), ((0.0,), (0.4, 0.6)), (0.4, 0.6))
    x = end(lambda t, x: -50 * x, tensor(1.0), None, steps=1, substep=theta)
    assert x.item() == pytest.approx(-19 / 31)
    with pytest.raises(ValueError, match=r"weights: got \(0.5, 0.6\) for 2 nodes"):
        odeadv.DIRK("a", 1, (0.0, 1.0), ((0.0,), (0.5, 0.5)), (0.5, 0.6))
    with pytest.raises(ValueError, match=r"matrix: got rows of lengths \[1, 1\], expected 1 to 2"):
        odeadv.DIRK("a", 1, (0.0, 1.0), ((0.0,), (1.0,)), (0.5, 0.5))
    with pytest.raises(ValueError, match="expected its node, 1"):
        odeadv.DIRK("a", 1, (0.0, 1.0), ((0.0,), (0.5, 0.6)), (0.5, 0.5))


# ---- the problems of the peers, small, against SciPy's Radau at 1e-10 ----


def robertson(t, y):
    a, b, c = y
    lost, made, joined = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return [-lost + made, lost - made - joined, joined]


def van_der_pol(t, y):
    return [y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]]


def heat(t, y):
    """Return 10 u_xx - u^3 with u = 0 at the ends, 24 points inside."""
    pad = np.pad if isinstance(y, np.ndarray) else torch.nn.functional.pad
    wide = pad(y, (1, 1))
    return 10 * 25**2 * (wide[2:] - 2 * y + wide[:-2]) - y**3


@pytest.mark.parametrize(
    ("f", "x0", "span", "steps", "most"),
    [
        (robertson, [1.0, 0.0, 0.0], (0.0, 4.0), 60, 2e-6),
        (van_der_pol, [2.0, 0.0], (0.0, 1.0), 20, 1e-9),
        (heat, list(np.sin(np.pi * np.arange(1, 25) / 25)), (0.0, 0.02), 12, 1e-5),
    ],
)
def test_stiff_problems_against_radau(f, x0, span, steps, most):
    radau = solve_ivp(f, span, x0, method="Radau", rtol=1e-10, atol=1e-13).y[:, -1]

    def torch_f(t, x):
        value = f(t, x)
        return torch.stack(value) if isinstance(value, list) else value

    for scheme in ("sdirk2", "sdirk4"):
        x = end(torch_f, torch.tensor(x0, dtype=F64), scheme, steps, span).numpy()
        assert np.max(np.abs(x - radau)) < (most if scheme == "sdirk4" else 500 * most) * np.max(np.abs(radau))


# ---- Newton's iteration ----


@pytest.mark.parametrize("scheme", IMPLICIT)
def test_gmres_and_dense_jacobians_give_the_same(scheme):
    x0 = torch.rand(3, 2, generator=seeded(), dtype=F64)
    made = {}
    for newton in (odeadv.Newton(), odeadv.Newton(jacobian="krylov"), odeadv.Newton(samples=0)):
        made[newton] = odeadv.solve(odeadv.Operator(coupled, solve=newton), x0, SPAN, scheme=scheme, steps=2)
    dense, krylov, batched = made.values()
    for sol in (krylov, batched):
        torch.testing.assert_close(sol.xs[-1], dense.xs[-1], rtol=1e-11, atol=1e-12)
    assert (
        dense.stats.solves == krylov.stats.solves == 2 * (5 if scheme == "sdirk4" else 2 if scheme == "sdirk2" else 1)
    )
    assert krylov.stats.jvps > 0 == dense.stats.jvps
    assert batched.stats.vjps < dense.stats.vjps  # two products per Jacobian instead of six, and one to test samples
    turned = odeadv.Operator(lambda t, x: coupled(t, x.mT).mT, solve=odeadv.Newton(samples=-1))
    found = odeadv.solve(turned, x0.mT[None].clone(), SPAN, scheme=scheme, steps=2)
    torch.testing.assert_close(found.xs[-1][0].mT, dense.xs[-1], rtol=1e-11, atol=1e-12)


def test_samples_that_depend_on_one_another_are_noticed():
    mixing = odeadv.Operator(lambda t, x: -x * x.mean(), solve=odeadv.Newton(samples=0))
    with pytest.raises(ValueError, match="samples: got axes of samples that depend on one another"):
        end(mixing, torch.ones(3, 2, dtype=F64))


def test_a_preconditioner_saves_products():
    n = 40
    k = -1e3 * torch.arange(n, dtype=F64) ** 2

    def f(t, x):
        return k * x - x**3

    def precondition(t, c, y, r):
        return r / (1 - c * k)

    stats = [
        odeadv.solve(odeadv.Operator(f, solve=newton), torch.ones(n, dtype=F64), SPAN, scheme="sdirk2", steps=2).stats
        for newton in (
            odeadv.Newton(jacobian="krylov"),
            odeadv.Newton(jacobian="krylov", precondition=precondition),
        )
    ]
    assert stats[1].jvps < stats[0].jvps / 3


def test_a_complex_state():
    field = odeadv.Operator(lambda t, x: 1j * x.abs() ** 2 * x)
    x0 = torch.tensor([0.6 + 0.8j, 0.5j], dtype=torch.complex128)
    x = end(field, x0, "implicit-midpoint", steps=8)
    assert torch.allclose(x.abs(), x0.abs(), atol=1e-11)  # the midpoint rule keeps quadratic invariants
    assert end(field, x0.to(torch.complex64), "sdirk2").dtype == torch.complex64


def test_an_equation_without_a_solution_is_a_status():
    def explode(t, x):
        return x**2 + 1

    with pytest.raises(odeadv.SolveError, match=r"Newton's iteration failed in an implicit sub-step.*take more steps"):
        end(explode, tensor(1.0), "backward-euler", steps=1)
    for options in ({"scheme": "backward-euler"}, {"scheme": "lie", "substep": "backward-euler"}):
        field = odeadv.SplitField(a=explode, b=lambda t, x: -x) if "substep" in options else explode
        sol = odeadv.solve(field, tensor(3.0), SPAN, steps=2, throw=False, **options)
        assert sol.status is odeadv.Status.NEWTON_FAILED
        assert sol.xs[-1].isnan().all()
    field = odeadv.AdversarialField(explode, lambda x: x.sum(), eta=0.1)
    with pytest.raises(odeadv.SolveError, match="Newton's iteration"):
        odeadv.solve(field, tensor(1.0), SPAN, steps=1, scheme="lie", substep="backward-euler")
    # Newton's iteration is not blamed for the failure of another operator; adaptive steps are rejected.
    field = odeadv.SplitField(a=lambda t, x: x * math.inf, b=lambda t, x: -x)
    sol = odeadv.solve(
        field, tensor(1.0), SPAN, steps=2, scheme="lie", substep={"a": "euler", "b": "sdirk2"}, throw=False
    )
    assert sol.status is odeadv.Status.NON_FINITE
    adaptive = odeadv.Adaptive(rtol=1e-3, first=0.7)
    found = odeadv.solve(explode, tensor(0.0), SPAN, scheme="sdirk2", dt=adaptive)
    assert found.stats.rejected > 0
    assert found.xs[-1].item() == pytest.approx(math.tan(1.0), rel=1e-2)


def test_states_of_16_bits():
    x = odeadv.solve(lambda t, x: -100 * x**3, torch.ones(2, dtype=torch.bfloat16), SPAN, scheme="sdirk2", steps=8)
    assert x.xs.dtype == torch.bfloat16
    assert x.xs[-1][0].item() == pytest.approx(201**-0.5, rel=0.1)


def test_newton_refuses_what_it_does_not_know():
    for options, message in (
        ({"jacobian": "sparse"}, "jacobian: got 'sparse'"),
        ({"rtol": 0}, "rtol: got 0"),
        ({"most": 0}, "most: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            odeadv.Newton(**options)
    with pytest.raises(TypeError, match="precondition: got int"):
        odeadv.Newton(precondition=3)
    with pytest.raises(TypeError, match=r"solve: got str, expected a callable solve\(t, c, b\) or a Newton"):
        odeadv.Operator(coupled, solve="lu")
    with pytest.raises(ValueError, match=r"substep: an implicit sub-step decides by .* torch.func.vmap"):
        torch.func.vmap(lambda x: end(coupled, x))(torch.ones(2, 2, dtype=F64))
    operator = odeadv.Operator(coupled, solve=odeadv.Newton(jacobian="krylov"))
    with pytest.raises(ValueError, match=r"jacobian: got 'krylov' inside a torch\.func transform"):
        torch.func.grad(lambda x: end(operator, x).sum())(tensor(1.0, 0.5))

    with pytest.raises(
        ValueError, match="'sdirk2' solves operator 'f' by Newton's iteration, which cannot be compiled"
    ):
        odeadv.compile_solver(coupled, dt=0.1, scheme="sdirk2")


# ---- gradients and costates ----

NEWTONS = (odeadv.Newton(), odeadv.Newton(jacobian="krylov"), odeadv.Newton(samples=0))


def parametrised(w: Tensor, newton: odeadv.Newton) -> odeadv.Operator:
    return odeadv.Operator(
        lambda t, x: torch.stack(
            [-w[0] * x[..., 0] * x[..., 1] + torch.cos(t), w[1] * x[..., 0] ** 2 - 2 * x[..., 1]], -1
        ),
        solve=newton,
    )


@pytest.mark.parametrize("newton", NEWTONS, ids=["dense", "krylov", "batched"])
@pytest.mark.parametrize("scheme", ["crank-nicolson", "sdirk2"])
def test_first_and_second_derivatives(newton, scheme):
    x0 = tensor(1.0, 0.5).expand(2 if newton.axes else 1, 2).clone().requires_grad_()
    w = tensor(1.3, 0.4).requires_grad_()

    def solve(x, w):
        return end(parametrised(w, newton), x, scheme, steps=1)

    # GMRES takes products whose last bit depends on where tensors lie in memory (seen with torch 2.4).
    assert torch.autograd.gradcheck(solve, (x0, w), fast_mode=True, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(solve, (x0, w), fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize("newton", NEWTONS[:2], ids=["dense", "krylov"])
def test_third_derivatives_are_refused_and_forward_mode_is_right(newton):
    x0, w = tensor(1.0, 0.5).requires_grad_(), tensor(1.3, 0.4).requires_grad_()

    def solve(x, w):
        return end(parametrised(w, newton), x, steps=1)

    (first,) = torch.autograd.grad(solve(x0, w).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x0, create_graph=True)
    for wanted in (x0, w):
        with pytest.raises(ValueError, match=r"^substep: got a third derivative through Newton's iteration"):
            torch.autograd.grad(second.sum(), wanted, retain_graph=True)
    by_x, by_w = torch.autograd.functional.jacobian(solve, (x0, w))
    dx, dw = tensor(1.0, 2.0), tensor(-0.5, 0.3)
    with dual_level():
        tangent = unpack_dual(solve(make_dual(x0.detach(), dx), make_dual(w.detach(), dw))).tangent
    torch.testing.assert_close(tangent, by_x @ dx + by_w @ dw)


def test_derivatives_by_torch_func():
    def solve(x):
        return end(parametrised(tensor(1.3, 0.4), odeadv.Newton()), x)

    x0 = tensor(1.0, 0.5)
    by_autograd = torch.autograd.functional.jacobian(solve, x0)
    torch.testing.assert_close(torch.func.jacrev(solve)(x0), by_autograd)
    hessian = torch.autograd.functional.hessian(lambda x: solve(x).sum(), x0)
    twice = torch.func.jacrev(torch.func.jacrev(lambda x: solve(x).sum()))
    torch.testing.assert_close(twice(x0), hessian)
    with pytest.raises(ValueError, match="got a third derivative"):
        torch.func.jacrev(twice)(x0)


def test_a_field_that_is_a_gradient_itself():
    """Such a field calls torch.autograd.grad, so it runs neither under no_grad nor in a torch.func transform."""

    def descent(t, x):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((y**4).sum(), y, create_graph=True)
        return -slope

    x0 = tensor(1.0, 2.0).requires_grad_()
    closed = lambda t, x: -4 * x**3  # noqa: E731
    torch.testing.assert_close(end(descent, x0, "sdirk4"), end(closed, x0, "sdirk4"))
    assert torch.autograd.gradcheck(lambda x: end(descent, x), x0)


@pytest.mark.parametrize(
    "operator",
    [
        odeadv.Operator.linear(A),
        odeadv.Operator(lambda t, x: x @ A.T),
        odeadv.Operator(lambda t, x: x @ A.T, solve=odeadv.Newton(jacobian="krylov")),
    ],
    ids=["direct", "dense", "krylov"],
)
def test_the_costate_of_backward_euler_is_its_discrete_adjoint(operator):
    """x_n+1 = M x_n and a_n = M^T a_n+1 with M = (1 - h A)^-1."""
    field = odeadv.AdversarialField(operator, lambda x: 0.5 * x @ Q @ x, eta=0.2)
    sol = odeadv.solve(field, Y0, SPAN, scheme="lie", steps=4, substep={"f": "backward-euler"})
    m = torch.linalg.inv(torch.eye(3, dtype=F64) - 0.25 * A)
    a = Q @ torch.linalg.matrix_power(m, 4) @ Y0
    x = Y0
    for n in range(4, -1, -1):
        torch.testing.assert_close(sol.costate.nodes[n], a, rtol=1e-10, atol=1e-12)
        a = m.T @ a
    for n in range(4):
        x = m @ x + 0.25 * 0.2 * sol.costate.nodes[n + 1]
    torch.testing.assert_close(sol.xs[-1], x, rtol=1e-10, atol=1e-12)


class Theta:
    """An implicit sub-step as the documentation describes one: it uses the names of the page only."""

    name, order = "theta", 1

    def advance(self, operator, clock, h, x, cost):
        b = x + 0.4 * h * operator.velocity(clock.at(0.0), x, cost)
        return operator.implicit(clock.at(1.0), 0.6 * h, b, cost)


@pytest.mark.parametrize("operator", [odeadv.Operator.linear(A), odeadv.Operator(lambda t, x: x @ A.T)])
def test_an_implicit_substep_of_ones_own(operator):
    field = odeadv.AdversarialField(operator, lambda x: 0.5 * x @ Q @ x, eta=0.2)
    tableau = odeadv.DIRK("theta", 1, (0.0, 1.0), ((0.0,), (0.4, 0.6)), (0.4, 0.6))
    own, known = (odeadv.solve(field, Y0, SPAN, scheme="lie", steps=4, substep=s) for s in (Theta(), tableau))
    torch.testing.assert_close(own.xs[-1], known.xs[-1])
    torch.testing.assert_close(own.costate.nodes[0], known.costate.nodes[0])


def test_the_costate_of_heat():
    """For each frequency, a step of sdirk2 multiplies by its stability function, and so does its adjoint."""
    k = -100 * torch.arange(6, dtype=F64) ** 2
    goal = torch.rand(6, generator=seeded(), dtype=F64)
    field = odeadv.AdversarialField(odeadv.Operator.diagonal(k), lambda x: x @ goal, eta=0.0)
    g, z = 1 - math.sqrt(0.5), 0.25 * k
    factor = (1 + (1 - 2 * g) * z) / (1 - g * z) ** 2
    sol = odeadv.solve(field, torch.ones(6, dtype=F64), SPAN, scheme="lie", steps=4, substep={"f": "sdirk2"})
    for n in range(5):
        torch.testing.assert_close(sol.costate.nodes[n], goal * factor ** (4 - n))
    exact = odeadv.solve(field, torch.ones(6, dtype=F64), SPAN, scheme="lie", steps=4, substep={"f": "exact"})
    torch.testing.assert_close(exact.costate(0.0), goal * torch.exp(k))


def test_checkpoints_evaluate_nothing_more_in_the_forward_pass():
    x0, w = tensor(1.0, 0.5).requires_grad_(), tensor(1.3, 0.4).requires_grad_()
    for newton in NEWTONS[:2]:
        found = []
        for checkpoints in (None, 2):
            options = {"scheme": "sdirk2", "steps": 2, "checkpoints": checkpoints}
            sol = odeadv.solve(parametrised(w, newton), x0, SPAN, **options)
            found.append((sol.stats.evaluations["f"], *torch.autograd.grad(sol.xs[-1].sum(), (x0, w))))
        plain, again = found
        assert plain[0] == again[0]
        torch.testing.assert_close(again[1:], plain[1:], rtol=1e-10, atol=1e-12)  # GMRES: last bits may differ


def test_forcings_do_not_hide_a_direct_solver():
    """Un-split, f + eta a(t) is solved by the solver of f."""
    field = odeadv.AdversarialField(odeadv.Operator.linear(A), lambda x: 0.5 * x @ Q @ x, eta=0.2)
    sol = odeadv.solve(field, Y0, SPAN, scheme="implicit-midpoint", steps=8)
    slow = odeadv.AdversarialField(lambda t, x: x @ A.T, lambda x: 0.5 * x @ Q @ x, eta=0.2)
    again = odeadv.solve(slow, Y0, SPAN, scheme="implicit-midpoint", steps=8)
    torch.testing.assert_close(sol.xs[-1], again.xs[-1], rtol=1e-10, atol=1e-12)
    assert sol.stats.solves == again.stats.solves == 16
    assert sol.stats.iterations == 0 < again.stats.iterations
    quadrature = end(Forcing(lambda t: torch.full((1,), t**3, dtype=F64)), tensor(0.0), "sdirk4", steps=1)
    assert quadrature.item() == pytest.approx(0.25)


def test_the_example_of_a_stiff_equation():
    solve = runpy.run_path(str(Path(odeadv.__file__).parents[1] / "examples" / "stiff.py"), run_name="not main")[
        "solve"
    ]
    exact, direct = ({"diffusion": method, "reaction": "rk4"} for method in ("exact", "sdirk2"))
    fine = solve(32, scheme="strang", substep=exact).xs[-1]
    assert (solve(16, scheme="strang", substep=direct).xs[-1] - fine).abs().max() < 5e-3
    assert solve(16, scheme="rk4").status is odeadv.Status.NON_FINITE


# ---- what an operator knows ----


def test_an_operator_known_by_its_flow_needs_no_right_hand_side():
    decay = odeadv.Operator(flow=lambda t, dt, x: x * torch.exp(-dt))
    assert decay.abilities == {"flow"}
    growth = lambda t, x: 0.5 * x  # noqa: E731
    field = odeadv.SplitField(decay=decay, growth=growth)
    known = odeadv.SplitField(
        decay=odeadv.Operator(lambda t, x: -x, flow=lambda t, dt, x: x * torch.exp(-dt)), growth=growth
    )
    options = {"steps": 4, "scheme": "strang"}
    same = odeadv.solve(known, tensor(1.0), SPAN, substep={"decay": "exact"}, **options).xs[-1]
    assert torch.equal(odeadv.solve(field, tensor(1.0), SPAN, **options).xs[-1], same)
    assert end(decay, tensor(1.0), scheme=None).item() == pytest.approx(math.exp(-1))
    whole = "right-hand side of operator 'decay' is not known"
    for call, message in (
        (
            lambda: odeadv.solve(field, tensor(1.0), SPAN, substep="rk4", **options),
            "'rk4' is asked for operator 'decay'",
        ),
        (lambda: odeadv.solve(field, tensor(1.0), SPAN, substep="sdirk2", **options), "expected|give .* 'exact'"),
        (
            lambda: odeadv.solve(field, tensor(1.0), SPAN, scheme="rk4", steps=2),
            f"scheme: 'rk4' does not split.*{whole}",
        ),
        (lambda: field(torch.tensor(0.0), tensor(1.0)), "f: got an operator that is known by its flow or solve alone"),
        (
            lambda: odeadv.solve(
                odeadv.AdversarialField(decay, torch.sum, 0.1), tensor(1.0), SPAN, steps=2, costate="hermite"
            ),
            "costate: got 'hermite' for a field whose right-hand side is not known",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"f: got nothing, expected a callable f\(t, x\), flow=, or a callable solve="):
        odeadv.Operator()


def test_an_operator_known_by_its_solve():
    """The resolvent of the absolute value shrinks: a proximal map."""
    shrink = odeadv.Operator(solve=lambda t, c, b: b.sign() * (b.abs() - c).clamp(min=0.0))
    assert end(shrink, tensor(1.0, -0.3), "backward-euler").tolist() == pytest.approx([0.0, 0.0])
    assert end(shrink, tensor(2.0, -0.3), "backward-euler").tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="'crank-nicolson' is asked for operator 'f', whose right-hand side"):
        end(shrink, scheme="crank-nicolson")


@pytest.mark.parametrize(
    ("solve", "message"),
    [
        (lambda t, c, b: b.mul_(2), "solve: modifies the state in place"),
        (lambda t, c, b: b[:1], "solve: returned shape"),
        (lambda t, c, b: b.detach(), "solve: returned a tensor without a gradient"),
    ],
)
def test_a_solver_that_does_not_fit(solve, message):
    with pytest.raises(ValueError, match=message):
        end(odeadv.Operator(coupled, solve=solve), tensor(1.0, 2.0).requires_grad_() * 1.0)


# ---- linear operators ----

K = torch.fft.fftfreq(8, 1 / 8, dtype=F64)
CASES = {
    "matrix": (odeadv.Operator.linear(A), (2, 3)),
    "matrix per sample": (odeadv.Operator.linear(torch.stack([A, Q, -A])), (3, 3)),
    "fft": (odeadv.Operator.diagonal(-(K**2) + 0.3j * K, transform="fft"), (2, 8)),
    "two axes": (odeadv.Operator.diagonal(-(K[:, None] ** 2) - K[:5] ** 2 * 0, transform="fft", dims=2), (8, 5)),
    "dct, two species": (
        odeadv.Operator.diagonal(-(torch.arange(7, dtype=F64) ** 2) * tensor(1, 0.5)[:, None], transform="dct", dims=1),
        (2, 7),
    ),
    "no transform": (odeadv.Operator.diagonal(-torch.arange(3, dtype=F64)), (2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_right_hand_side_flow_and_solve_agree(name):
    operator, shape = CASES[name]
    x, t, c = torch.randn(shape, generator=seeded(), dtype=F64), torch.tensor(0.0), torch.tensor(0.1, dtype=F64)
    y = operator.solver(t, c, x)
    torch.testing.assert_close(y - c * operator(t, y), x)
    slope = (operator.flow(t, 1e-5 * c, x) - operator.flow(t, -1e-5 * c, x)) / (2e-5 * c)
    torch.testing.assert_close(slope, operator(t, x), rtol=1e-7, atol=1e-7)
    whole = operator.flow(t, c, operator.flow(t, 2 * c, x))
    torch.testing.assert_close(whole, operator.flow(t, 3 * c, x))
    assert whole.dtype == F64
    narrow = operator.solver(t, c.float(), x.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), y, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x: operator.flow(t, c, operator.solver(t, c, x)), x.requires_grad_(), fast_mode=True
    )
    half = odeadv.solve(operator, x.detach().bfloat16(), SPAN, scheme="sdirk2", steps=2).xs
    assert half.dtype == torch.bfloat16


def test_symbols_and_matrices_that_need_a_gradient():
    def through(make, value, x):
        def solve(value):
            first = odeadv.solve(make(value), x, SPAN, substep="exact", steps=1).xs[-1]
            return end(make(value), first, "backward-euler", steps=1)

        return torch.autograd.gradcheck(solve, value.requires_grad_(), fast_mode=True)

    assert through(odeadv.Operator.linear, A.clone(), Y0)
    x = torch.randn(2, 4, generator=seeded(), dtype=F64)
    for transform in ("dct", "fft"):
        k = -(torch.fft.fftfreq(4, 1 / 4, dtype=F64) ** 2)
        even = lambda d, k=k, kind=transform: odeadv.Operator.diagonal(d * k, transform=kind)  # noqa: E731
        assert through(even, tensor(0.3), x)


def test_values_that_are_kept_follow_the_matrix():
    a = -torch.eye(2, dtype=F64)
    operator = odeadv.Operator.linear(a)
    for k in (1.0, 2.0):
        a.copy_(-k * torch.eye(2))
        assert odeadv.solve(operator, tensor(1.0, 1.0), SPAN, substep="exact", steps=1).xs[-1][0] == pytest.approx(
            math.exp(-k)
        )
        assert end(operator, scheme="backward-euler", steps=1, x0=tensor(1.0, 1.0))[0] == pytest.approx(1 / (1 + k))
    for n in range(1, 50):  # more step sizes than are kept
        end(operator, scheme="backward-euler", steps=n)
    assert pickle.loads(pickle.dumps(operator)).flow is not None


def test_the_cosine_transform_is_that_of_scipy():
    for shape, axes in (((7,), (-1,)), ((2, 6, 5), (-2, -1))):
        x = torch.randn(shape, generator=seeded(), dtype=F64)
        found = _cosine(x, axes, forward=True)
        torch.testing.assert_close(found, torch.from_numpy(dctn(x.numpy(), axes=axes)))
        torch.testing.assert_close(_cosine(found, axes, forward=False), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: odeadv.Operator.linear([[1.0]]), "A: got list, expected a tensor"),
        (lambda: odeadv.Operator.linear(torch.ones(2, 3)), r"A: got shape \(2, 3\), expected a square matrix"),
        (lambda: odeadv.Operator.linear(torch.eye(2) * math.nan), "A: got .* NaN or infinite entries"),
        (lambda: odeadv.Operator.linear(torch.eye(2).to_sparse()), "A: got torch.sparse_coo .* Operator"),
        (lambda: end(odeadv.Operator.linear(torch.eye(3))), "expected a matrix for the last axis"),
        (lambda: end(odeadv.Operator.linear(torch.eye(2) * 1j)), "A: got torch.complex64 for a state of torch.float64"),
        (lambda: odeadv.Operator.diagonal(torch.ones(3), transform="fst"), "transform: got 'fst'"),
        (lambda: odeadv.Operator.diagonal(torch.ones(3), dims=2), r"dims: got 2 for a symbol of shape \(3,\)"),
        (
            lambda: odeadv.Operator.diagonal(torch.ones(2, 3), transform="dct"),
            r"dims: missing for a symbol of shape \(2, 3\)",
        ),
        (lambda: end(odeadv.Operator.diagonal(torch.ones(3), transform="fft")), "expected the grid of the last 1 axes"),
        (lambda: end(odeadv.Operator.diagonal(torch.rand(4), transform="fft"), torch.ones(4)), "conjugate-symmetric"),
    ],
)
def test_linear_operators_that_do_not_fit(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ---- GMRES ----


def test_gmres_solves_restarts_and_gives_up():
    a = torch.eye(30, dtype=F64) + 0.3 * torch.randn(30, 30, generator=seeded(), dtype=F64)
    b = torch.randn(30, generator=seeded(1), dtype=F64)
    x, solved, products = gmres(lambda v: a @ v, b, rtol=1e-12)
    assert solved
    assert products <= 32
    torch.testing.assert_close(a @ x, b, rtol=1e-10, atol=1e-10)
    x, solved, _ = gmres(lambda v: a @ v, b, rtol=1e-6, restart=12, most=2000)
    assert solved == bool((a @ x - b).norm() <= 2e-6 * b.norm())
    assert not gmres(lambda v: a @ v, b, rtol=1e-12, restart=5, most=10)[1]
    x, solved, _ = gmres(lambda v: a @ v, b, rtol=1e-12, enough=0.9, restart=5, most=10)
    assert solved
    assert (a @ x - b).norm() <= 0.9 * b.norm()
    assert not gmres(lambda v: 0 * v, b, rtol=1e-6)[1]
    assert gmres(lambda v: a @ v, 0 * b, rtol=1e-6)[1]
