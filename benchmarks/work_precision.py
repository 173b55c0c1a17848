"""Work-precision diagrams: every scheme, sub-step and costate on six problems, compared with the other solvers.

`linear` and `oscillator` are Eq. 7 with a(t) of one recording: x' = A x, and a driven Duffing oscillator, each with a
loss of the final state. The other solvers integrate the state forward, the adjoint equation backward, and then
everything forward again. `linear converged` and `oscillator converged` are the same with the costate of the trajectory
itself, compared with shooting and collocation. `three operators` is a non-linear, time-dependent sum of three operators
that do not commute, with exact flows, on 100 states. `network` is the first stage of a trained ResNet-20 of width 8, in
evaluation mode and float64, solved with smaller dt. The network was trained on digits for some seconds; its other
stages are the read-out. Fisher-KPP has a separate section. Errors are maxima over x(T), divided by the largest
component of x(T). The reference is a closed form for
the linear problem and a fine solution for the others. Evaluations count operators and vector-Jacobian products.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.integrate import DOP853
from torch import Tensor

import odeadv
from odeadv.fields import Piecewise

from . import _jax_resnet, orders
from ._expm import matrix_exp
from ._peers import (
    Adversarial,
    Ivp,
    diffrax_recorded,
    diffrax_split,
    has_diffrax,
    recorded,
    scipy_peers,
    shooting_peers,
    torch_peers,
    torchdiffeq_ivp,
)
from ._plots import panels, save
from ._precision import Answer, Candidate, cold_table, compiled, draw, fastest, measure, stepped, table
from ._timing import machine

ACCURACIES = [10.0**-k for k in range(2, 9)]
STEPS = (4, 8, 16, 32, 64)
KINDS = ("linear", "hermite", "exact")
ORDER_8 = odeadv.RungeKutta(
    "dop853", 8, tuple(DOP853.C.tolist()), tuple(map(tuple, DOP853.A.tolist())), tuple(DOP853.B.tolist())
)


class Problem(NamedTuple):
    """A problem: candidates, the reference solution, the methods that are drawn separately, and settings of the timing.

    A method is not refined further after a solve has taken the given number of seconds. The last entry is the number of
    rounds of timing.
    """

    candidates: list[Candidate]
    reference: Tensor
    curves: tuple[str, ...]
    longest: float = 0.05
    rounds: int = 5


def adversarial(
    field: odeadv.AdversarialField,
    x0: Tensor,
    span: tuple[float, float],
    schemes: Iterable[str],
    substeps: Iterable[str],
    steps: Sequence[int],
    **options: Any,
) -> list[Candidate]:
    """Return every scheme with every sub-step and costate; exact flows of f use a costate by Simpson's rule."""
    candidates = []
    for scheme in schemes:
        for substep in substeps:
            for kind in KINDS:
                if odeadv.schemes.get(scheme).costate not in (None, kind):
                    continue
                candidates += stepped(
                    f"{scheme}, {substep}, {kind}",
                    lambda n, s=scheme, r=substep, k=kind: odeadv.solve(
                        field, x0, span, scheme=s, steps=n, substep=r, costate=k, **options
                    ),
                    steps,
                )
    return candidates


def _unsplit(
    field: odeadv.AdversarialField, x0: Tensor, span: tuple[float, float], steps: Sequence[int], **options: Any
) -> list[Candidate]:
    """Return Runge-Kutta methods on the whole field."""
    candidates = []
    for method in ("euler", "midpoint", "heun", "rk4"):
        for kind in KINDS:
            candidates += stepped(
                f"un-split {method}, {kind}",
                lambda n, m=method, k=kind: odeadv.solve(field, x0, span, scheme=m, steps=n, costate=k, **options),
                steps,
            )
    return candidates


def _compiled(
    field: odeadv.AdversarialField, x0: Tensor, span: tuple[float, float], steps: Sequence[int], quick: bool
) -> list[Candidate]:
    """Return compiled solves of a second-order splitting and of a Runge-Kutta method; a quick run has none."""
    if quick:
        return []
    splitting = {"scheme": "strang", "substep": "midpoint"}
    unsplit = {"scheme": "rk4", "costate": "hermite"}
    return [
        *compiled(field, x0, span, "strang, midpoint, linear", steps, **splitting),
        *compiled(field, x0, span, "un-split rk4, hermite", steps, **unsplit),
    ]


def _sizes(quick: bool) -> tuple[Iterable[str], Sequence[int], Sequence[int] | None]:
    """Return schemes, numbers of steps, and the exponents of the peers' tolerances."""
    return (("lie", "strang"), (2, 4), (3,)) if quick else (odeadv.schemes.names(), STEPS, None)


# ---- linear ----

LINEAR_CURVES = (
    "lie, euler, linear",
    "strang, euler, linear",
    "strang-symmetric, midpoint, linear",
    "strang, midpoint, linear",
    "un-split rk4, hermite",
)


def _linear() -> tuple[odeadv.AdversarialField, Adversarial]:
    field = odeadv.AdversarialField(
        odeadv.Operator(lambda t, x: orders.A @ x, flow=lambda t, dt, x: matrix_exp(dt * orders.A) @ x),
        lambda x: 0.5 * x @ (orders.Q @ x),
        orders.ETA,
    )
    peer = Adversarial(
        lambda k: lambda t, x: orders.A @ x, lambda x: orders.Q @ x, orders.X0, orders.ETA, (0.0, orders.END)
    )
    return field, peer


def linear(quick: bool) -> Problem:
    field, peer = _linear()
    schemes, steps, exponents = _sizes(quick)
    span = (0.0, orders.END)
    candidates = adversarial(field, orders.X0, span, schemes, ("exact", "rk4", "heun", "midpoint", "euler"), steps)
    candidates += _unsplit(field, orders.X0, span, steps)
    candidates += _compiled(field, orders.X0, span, steps, quick)
    candidates += torch_peers(lambda ivp: recorded(ivp, peer), exponents)
    if has_diffrax():
        import jax.numpy as jnp

        a, q = orders.A.numpy(), orders.Q.numpy()
        candidates += diffrax_recorded(
            [lambda t, x: jnp.asarray(a) @ x], lambda x: jnp.asarray(q) @ x, orders.X0, span, orders.ETA, exponents
        )
    return Problem(candidates, orders.closed_form()[0], LINEAR_CURVES)


def linear_converged_form() -> Tensor:
    """Return x(T) with the costate of the trajectory itself: [x; a]' = [[A, eta], [0, -A^T]] [x; a], a(T) = Q x(T)."""
    a, q, eye = orders.A, orders.Q, torch.eye(3, dtype=orders.A.dtype)
    block = torch.cat([torch.cat([a, orders.ETA * eye], 1), torch.cat([0 * a, -a.T], 1)])
    m = matrix_exp(orders.END * block)
    a0 = torch.linalg.solve(m[3:, 3:] - q @ m[:3, 3:], q @ m[:3, :3] @ orders.X0)
    return m[:3, :3] @ orders.X0 + m[:3, 3:] @ a0


def _converging(
    field: odeadv.AdversarialField, x0: Tensor, span: tuple[float, float], quick: bool, substeps: Iterable[str]
) -> list[Candidate]:
    candidates = []
    for digits in (4, 8):
        until = {"sweeps": odeadv.Converge(rtol=10.0**-digits)}
        own = _unsplit(field, x0, span, (2, 4) if quick else STEPS, **until)
        own += adversarial(
            field, x0, span, ("strang", "strang-symmetric"), substeps, (2, 4) if quick else STEPS, **until
        )
        candidates += [
            Candidate(c.solver, f"{c.method}, sweeps to 1e-{digits}", c.setting, c.solve)
            for c in own
            if not quick or "midpoint" in c.method
        ]
    # Add Newton's method, and Anderson acceleration that begins on coarse grids. A loose tolerance is enough, because
    # the result is better than the last measured change.
    for name, settings in (("newton", {"method": "newton"}), ("nested sweeps", {"nested": True})):
        for digits in (4, 6, 8):
            until = odeadv.Converge(rtol=10.0**-digits, **settings)
            candidates += stepped(
                f"un-split rk4, hermite, {name} to 1e-{digits}",
                lambda n, until=until: odeadv.solve(
                    field, x0, span, scheme="rk4", steps=n, costate="hermite", sweeps=until
                ),
                (4,) if quick else (*STEPS, 96),
            )
    for name, scheme in (("rk4", "rk4"), ("order 8", ORDER_8)):
        candidates += stepped(
            f"{name}, collocation to 1e-8",
            lambda n, scheme=scheme: odeadv.solve(
                field, x0, span, scheme=scheme, steps=n, costate="collocation", sweeps=odeadv.Converge(rtol=1e-8)
            ),
            (4,) if quick else (1, 2, *STEPS),
        )
    return candidates


CONVERGED_CURVES = (
    "un-split rk4, hermite, sweeps to 1e-8",
    "strang, midpoint, linear, sweeps to 1e-8",
    "un-split rk4, hermite, newton to 1e-4",
    "un-split rk4, hermite, nested sweeps to 1e-4",
    "order 8, collocation to 1e-8",
)


def linear_converged(quick: bool) -> Problem:
    field, peer = _linear()
    span = (0.0, orders.END)
    exponents = (3,) if quick else range(3, 11)
    candidates = _converging(field, orders.X0, span, quick, ("exact", "rk4", "midpoint"))
    candidates += shooting_peers(peer, exponents)
    a, q = orders.A.numpy(), orders.Q.numpy()
    candidates += scipy_peers(
        lambda t, x: a @ x, lambda t, x, p: a.T @ p, lambda x: q @ x, orders.X0.numpy(), span, orders.ETA, exponents
    )
    return Problem(candidates, linear_converged_form(), CONVERGED_CURVES, longest=0.5)


# ---- a driven Duffing oscillator ----

DAMPING, FORCE, RATE = 0.2, 0.4, 1.3
SPAN, ETA = (0.0, 2.0), 0.03
START = torch.tensor([0.6, -0.3], dtype=torch.float64)


def duffing(t: Tensor, x: Tensor) -> Tensor:
    """Return x'' = x - x^3 - damping x' + force cos(rate t) as a system."""
    q, p = x
    return torch.stack([p, q - q**3 - DAMPING * p + FORCE * torch.cos(RATE * t)])


def _oscillator() -> tuple[odeadv.AdversarialField, Adversarial]:
    field = odeadv.AdversarialField(duffing, lambda x: 0.5 * (x * x).sum(), ETA)
    return field, Adversarial(lambda k: duffing, lambda x: x, START, ETA, SPAN)


def oscillator(quick: bool) -> Problem:
    field, peer = _oscillator()
    schemes, steps, exponents = _sizes(quick)
    candidates = adversarial(field, START, SPAN, schemes, ("rk4", "heun", "midpoint", "euler"), steps)
    candidates += _unsplit(field, START, SPAN, steps)
    candidates += _compiled(field, START, SPAN, steps, quick)
    candidates += torch_peers(lambda ivp: recorded(ivp, peer), exponents)
    if has_diffrax():
        import jax.numpy as jnp

        def f(t: Any, x: Any) -> Any:
            return jnp.stack([x[1], x[0] - x[0] ** 3 - DAMPING * x[1] + FORCE * jnp.cos(RATE * t)])

        candidates += diffrax_recorded([f], lambda x: x, START, SPAN, ETA, exponents)
    reference, _ = recorded(torchdiffeq_ivp("dopri8", 1e-13), peer)
    return Problem(candidates, reference, LINEAR_CURVES)


def oscillator_converged(quick: bool) -> Problem:
    import numpy

    field, peer = _oscillator()
    exponents = (3,) if quick else range(3, 11)

    def f(t: Any, x: Any) -> Any:
        return numpy.stack([x[1], x[0] - x[0] ** 3 - DAMPING * x[1] + FORCE * numpy.cos(RATE * t)])

    def product(t: Any, x: Any, a: Any) -> Any:
        return numpy.stack([(1 - 3 * x[0] ** 2) * a[1], a[0] - DAMPING * a[1]])

    candidates = _converging(field, START, SPAN, quick, ("rk4", "midpoint"))
    candidates += shooting_peers(peer, exponents)
    candidates += scipy_peers(f, product, lambda x: x, START.numpy(), SPAN, ETA, exponents)
    (fine,) = scipy_peers(f, product, lambda x: x, START.numpy(), SPAN, ETA, (13,))
    return Problem(candidates, fine.solve()[0], CONVERGED_CURVES, longest=0.5)


# ---- three operators that do not commute ----

TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def _rotation_flow(t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    angle = dt + 0.5 * ((t + dt) ** 2 - t**2)
    return torch.cos(angle) * x + torch.sin(angle) * (x @ TURN.T)


OPERATORS = {
    "rotation": odeadv.Operator(lambda t, x: (1 + t) * (x @ TURN.T), flow=_rotation_flow),
    "square": odeadv.Operator(
        lambda t, x: 0.3 * torch.cos(t) * x * x,
        flow=lambda t, dt, x: x / (1 - 0.3 * (torch.sin(t + dt) - torch.sin(t)) * x),
    ),
    "decay": odeadv.Operator(
        lambda t, x: -(1 + torch.sin(t)) * x, flow=lambda t, dt, x: x * torch.exp(torch.cos(t + dt) - torch.cos(t) - dt)
    ),
}


def three_operators(quick: bool) -> Problem:
    x0 = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = odeadv.SplitField(**OPERATORS)
    _, steps, exponents = _sizes(quick)
    candidates: list[Candidate] = []
    for scheme in ("lie", "strang") if quick else odeadv.schemes.names(3):
        for substep in ("exact", "rk4", "heun", "midpoint", "euler"):
            candidates += stepped(
                f"{scheme}, {substep}",
                lambda n, s=scheme, r=substep: odeadv.solve(field, x0, (0.0, 1.0), scheme=s, steps=n, substep=r),
                steps,
            )
    for method in ("midpoint", "heun", "rk4"):
        candidates += stepped(
            f"un-split {method}", lambda n, m=method: odeadv.solve(field, x0, (0.0, 1.0), scheme=m, steps=n), steps
        )

    if not quick:
        candidates += compiled(field, x0, (0.0, 1.0), "strang, exact", steps, scheme="strang", substep="exact")

    def solve(ivp: Ivp) -> Answer:
        state, count = ivp(field, x0, 0.0, 1.0)
        return state, 3 * count

    candidates += torch_peers(solve, exponents)
    if has_diffrax():
        import jax.numpy as jnp

        candidates += diffrax_split(
            lambda t, x, args: (1 + t) * jnp.stack([x[:, 1], -x[:, 0]], 1) + 0.3 * jnp.cos(t) * x * x,
            lambda t, x, args: -(1 + jnp.sin(t)) * x,
            x0,
            (0.0, 1.0),
            3,
            exponents,
        )
    reference, _ = torchdiffeq_ivp("dopri8", 1e-13)(field, x0, 0.0, 1.0)
    return Problem(candidates, reference, ("lie, exact", "strang, exact", "strang, euler", "yoshida4, exact"))


# ---- the first stage of a trained network ----


def trained(quick: bool) -> tuple[odeadv.models.PreActResNet, Tensor, Tensor]:
    """Return a ResNet-20 of width 8 after some epochs on the digits, in float64, and a few 16x16 images."""
    from odeadv.data import load, to_float

    def small(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(to_float(images), 2)

    digits = load("digits")
    generator = torch.Generator().manual_seed(0)
    net = odeadv.models.preact_resnet(20, 8, generator=generator).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = small(digits.train_images), digits.train_labels.long()
    for _ in range(1 if quick else 4):
        for chosen in torch.randperm(len(images), generator=generator).split(64)[: 2 if quick else None]:
            optimizer.zero_grad()
            loss = odeadv.solve(net.field(images[chosen], labels[chosen])).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
    net.eval().requires_grad_(False).double()
    return net, small(digits.test_images[:4]).double(), digits.test_labels[:4].long()


def first_stage(net: odeadv.models.PreActResNet, images: Tensor, labels: Tensor, eta: float) -> odeadv.AdversarialField:
    """Return the blocks before the first jump as an ODE whose read-out is the rest of the network."""
    whole = net.field(images, labels, eta)
    count = int(whole.f.jumps[0][0])

    def rest(x: Tensor) -> Tensor:
        for block in net.blocks[count:]:
            x = block(x)
        return net.head(x)

    with torch.no_grad():
        x0 = net.stem(images)
    return odeadv.AdversarialField(
        Piecewise(whole.f.pieces[:count], range(count + 1)), whole.loss, eta, readout=rest,
        x0=x0, t_span=(0.0, float(count)),
    )  # fmt: skip


def network(quick: bool) -> Problem:
    net, images, labels = trained(quick)
    field = first_stage(net, images, labels, 50.0 * len(images) / 128)
    x0, span = field.problem.x0, field.problem.t_span
    assert isinstance(x0, Tensor)
    assert span is not None
    count = int(span[1])
    schemes, _, _ = _sizes(quick)
    steps = [count * k for k in ((1, 2) if quick else (1, 2, 4, 8, 16))]
    candidates = adversarial(field, x0, span, schemes, ("rk4", "heun", "midpoint", "euler"), steps)
    candidates += _unsplit(field, x0, span, steps)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(field.evaluate(x)[1], x)[0]

    def piece(k: int) -> Callable[[Tensor, Tensor], Tensor]:
        return field.f.pieces[k]

    edges, exponents = tuple(float(k) for k in range(count + 1)), (2,) if quick else range(2, 6)
    peer = Adversarial(piece, gradient, x0, field.eta, edges)
    candidates += torch_peers(lambda ivp: recorded(ivp, peer), exponents)
    if has_diffrax():
        pieces = [_jax_resnet.velocity(block) for block in net.blocks[:count]]
        end = _jax_resnet.loss_gradient(net, count, labels)
        candidates += diffrax_recorded(pieces, end, x0, edges, field.eta, exponents)
    fine = odeadv.solve(field, scheme="rk4", steps=count * (4 if quick else 64), costate="hermite", checkpoints=count)
    return Problem(candidates, fine.xs[-1], LINEAR_CURVES, longest=0.3, rounds=3)


PROBLEMS: dict[str, Callable[[bool], Problem]] = {
    "linear": linear,
    "linear converged": linear_converged,
    "oscillator": oscillator,
    "oscillator converged": oscillator_converged,
    "three operators": three_operators,
    "network": network,
}


def run(quick: bool = False) -> dict[str, object]:
    measured = {}
    for name, make in PROBLEMS.items():
        problem = make(quick)
        data, _ = measure(
            problem.candidates,
            problem.reference,
            rounds=1 if quick else problem.rounds,
            longest=problem.longest,
            always=problem.curves,
        )
        accuracies = [0.1, *ACCURACIES[:4]] if name == "network" else ACCURACIES
        measured[name] = {**data, "fastest": fastest(data["points"], accuracies), "curves": list(problem.curves)}
    return {"machine": machine(), "problems": measured}


def render(data: dict) -> str:
    parts = []
    for name, problem in data["problems"].items():
        points = problem["points"]
        parts += [f"### Time to reach an accuracy: {name}", "", table(points, problem["fastest"]), *cold_table(points)]
        counts = {}
        for point in points.values():
            counts[point["solver"]] = counts.get(point["solver"], 0) + 1
        parts += ["", f"Measured: {', '.join(f'{solver} at {n} settings' for solver, n in counts.items())}.", ""]
    return "\n".join(parts).rstrip()


def plot(data: dict, path: Path) -> None:
    problems = data["problems"]
    figure, axes = panels(len(problems), 2)
    for row, (name, problem) in zip(axes, problems.items(), strict=True):
        draw(row, name, problem["points"], problem["curves"])
    save(figure, path)
