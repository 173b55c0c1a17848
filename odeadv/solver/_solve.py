"""`solve`: record the costate if there is one, and run the composition over the steps. `driven`: only record it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from odeadv.costate import Converge
from odeadv.fields import AdversarialField, Operator, VectorField
from odeadv.fields.operator import VectorFunction
from odeadv.solver._run import SolveRun
from odeadv.solver._solution import Solution, SolveError
from odeadv.solver._structure import State, read_structure
from odeadv.solver.request import Nodes, SaveAt, StepSize, read_request
from odeadv.splitting import CostateKind, Status
from odeadv.splitting.method import SchemeLike, SubSteps
from odeadv.support.isolation import outside_inference_mode


def solve(
    field: VectorField | Operator | VectorFunction,
    x0: State | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    scheme: SchemeLike | None = None,
    dt: StepSize | None = None,
    steps: Nodes | None = None,
    clip_last: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    save_at: SaveAt = None,
    dense: bool = False,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | Literal["converge"] | Converge | None = None,
    ascent: int | None = None,
    checkpoints: int | None = None,
    differentiate_costate: bool = False,
    time_dtype: torch.dtype | None = None,
    within_span: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve dx/dt = field(t, x) by operator splitting.

    The defaults reproduce the paper on an `AdversarialField`: Euler sub-steps, one recording on the unperturbed
    trajectory, linear costate. ``scheme="lie"`` is then Eq. 5 (LAD) and ``scheme="strang"`` Eq. 8 (LAD-SM).
    Gradients reach parameters and ``x0`` through the solve.

    Args:
        field: an `AdversarialField`, a `SplitField`, an `Operator` or a callable ``f(t, x)``. f is given ``t`` as a 0-d
            tensor of the real dtype of the state (at least float32).
        x0: initial state, any shape, floating or complex, any device; the field's own if not given. Steps of a state of
            16 bits are added up in float32, except those of a network's blocks. Or a tuple, list, dict or named tuple
            of tensors of one dtype, also nested: then functions of the state are given the structure and return it
            (None for a derivative that is zero), and ``xs``, ``output``, ``sol(t)`` and the costate have it.
        t_span: ``(t0, t1)``, in either direction; the field's own if not given. Its times may be 0-d tensors that
            require gradients, and so may ``dt``: the steps then scale with the span, see docs/solver.md.
        scheme: a name of `odeadv.schemes` or a `Scheme`, by default ``"strang"``; or a sub-step or its name, which
            then advances the whole field without splitting it. A field with one operator is never split.
        dt: step size. It must divide the span, and it is positive or has the sign of a span that runs backward. Or
            ``"adaptive"`` (or an `Adaptive`): steps that meet the tolerances are found first. The solve then runs on
            them, so gradients and saved times are those of fixed steps. The costate of an `AdversarialField` is
            recorded on finer steps until it meets the tolerances too. A sequence has the sizes of all steps, which sum
            to the length of the span.
        steps: number of steps, instead of ``dt``; or a sequence of the times at which steps begin and end.
        clip_last: let ``dt`` not divide the span, and make the last step shorter.
        rtol: relative tolerance of an adaptive step, 1e-4 by default.
        atol: absolute tolerance of an adaptive step, 1e-6 by default.
        save_at: None saves the two ends, ``"steps"`` every step, a sequence of times those times. A time within a step
            is interpolated by a cubic Hermite polynomial from two more evaluations of the field. If the order is above
            four, or a sub-step is not an explicit Runge-Kutta method, the step is taken again up to that time.
        dense: keep the states of all steps, so that ``sol(t)`` gives the state at any time, see `Solution.__call__`.
        substep: how each operator is advanced: a name (`odeadv.substep_names`, or a method of torchdiffeq), a `SubStep`
            such as `RungeKutta`, `DIRK`, `Nested` or `TorchDiffEq`, or a dict of them by operator. The default is
            Euler's method for an `AdversarialField`, and for a network, a `Residual` block or another `Piecewise` field
            without a scheme. For all other fields it is the cheapest of Euler, midpoint and RK4 that has the scheme's
            order (RK4 above order four, with a warning): midpoint if no scheme is given. So an `AdversarialField` with
            eta = 0 equals ``solve(f, ..., scheme="euler")`` bit for bit.
        costate: a(t) between recorded nodes: ``"linear"`` (Theorem 3.2, order 2), ``"exact"`` (Eq. 9 integrated back
            from the next node, order 3) or ``"hermite"`` (cubic with slopes from Eq. 9, order 4). The default is the
            scheme's own, or linear; with adaptive steps it is cubic, unless f is advanced by its exact flow or by an
            implicit method.
        sweeps: number of recordings, each on the trajectory that the previous recording drives (Picard iteration); 1 is
            the paper's two-stage method. ``"converge"`` (or a `Converge`) sweeps until the costate is that of the
            trajectory it drives, with Anderson acceleration.
        ascent: number of recordings, each on the trajectory that the sum of all previous recordings drives (Eq. 3).
            ``sweeps`` and ``ascent`` need a field with a loss.
        checkpoints: number of segments of the solve and of each recording. The autograd graph of one segment is kept at
            a time, and the backward pass runs each segment again: memory for one segment and the states between
            segments, and the same gradients bit for bit. About the square root of the number of steps needs the least.
        differentiate_costate: let gradients pass through the costate too, instead of treating it as a constant.
        time_dtype: dtype of the times that f is given, instead of the state's.
        within_span: refuse schemes that evaluate f outside ``t_span``, see `Scheme.reach`.
        throw: raise if the solve fails; otherwise see ``status`` of the solution.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before f is evaluated; for results of f and of
            the loss that do not fit, when they are returned.
        SolveError: if the solve fails (see `Status`) and ``throw`` is set.

    Warns:
        AccuracyWarning: if a sub-step or the costate has a lower order than the scheme; if a scheme is given for a
            field with one operator; if a user's scheme does not have its declared order; if a scheme runs an operator
            backward that is declared irreversible; if steps are so small that f is evaluated at wrong times, or that
            the state does not move.

    Example:
        >>> field = odeadv.AdversarialField(lambda t, x: -0.5 * x, lambda x: 0.5 * (x**2).sum(), eta=0.1)
        >>> sol = odeadv.solve(field, torch.tensor([1.0, -2.0]), (0.0, 1.0), scheme="strang", dt=0.1)
        >>> sol.xs[-1], sol.costate(0.5), sol.loss
        (tensor([ 0.6357, -1.2714]), tensor([ 0.4633, -0.9266]), tensor(1.0103))
        >>> sol.order, sol.stats.steps
        (1, 10)
    """
    with outside_inference_mode():
        x0, flat = read_structure(field, x0, dt, rtol, atol)
        if flat is not None:
            field, x0, dt, rtol, atol = flat.field, flat.x0, flat.dt, flat.rtol, flat.atol
        request = read_request(
            field,
            x0,
            t_span,
            scheme=scheme,
            dt=dt,
            steps=steps,
            clip_last=clip_last,
            rtol=rtol,
            atol=atol,
            substep=substep,
            costate=costate,
            sweeps=sweeps,
            ascent=ascent,
            checkpoints=checkpoints,
            differentiate_costate=differentiate_costate,
            time_dtype=time_dtype,
            within_span=within_span,
            save_at=save_at,
            dense=dense,
        )
        solution = SolveRun(request).solution()
        if flat is not None:
            solution = flat.restored(solution)
    if throw and solution.status not in (Status.SUCCESS, Status.UNKNOWN):
        raise SolveError(solution)
    return solution


def driven(
    field: AdversarialField,
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    scheme: SchemeLike | None = None,
    dt: StepSize | None = None,
    steps: Nodes | None = None,
    clip_last: bool = False,
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    substep: SubSteps | None = None,
    costate: CostateKind | None = None,
    sweeps: int | Literal["converge"] | Converge | None = None,
    ascent: int | None = None,
    checkpoints: int | None = None,
    differentiate_costate: bool = False,
    time_dtype: torch.dtype | None = None,
    within_span: bool = False,
) -> VectorField:
    """Record the costate of ``field`` on its problem, and return the plain field f + eta * a(t), for any ODE solver.

    Nothing but the recordings is computed. They belong to this ``x0`` and ``t_span`` and to the weights of this moment.
    The returned field is a function of (t, x), differentiable in both, so it can be evaluated in any order and in a
    backward pass (``odeint_adjoint``).

    Args:
        field: an `AdversarialField`.
        x0: initial state of the recorded trajectories, to which the costate then belongs.
        t_span: their time span. Values beyond it, where adaptive solvers step, are extrapolated.
        scheme: see `solve`. The first recording runs along f alone, so the scheme matters from the second one on.
        dt: step size, see `solve`.
        steps: see `solve`.
        clip_last: see `solve`.
        rtol: see `solve`.
        atol: see `solve`.
        substep: see `solve`; with one recording, only the sub-step of f matters.
        costate: a(t) between the recorded nodes, see `solve`.
        sweeps: see `solve`.
        ascent: see `solve`.
        checkpoints: see `solve`.
        differentiate_costate: see `solve`.
        time_dtype: see `solve`.
        within_span: see `solve`.

    Returns:
        A `VectorField`; f alone if eta is 0.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name, before f is evaluated; for results of f and of
            the loss that do not fit, when they are returned.
        SolveError: if a recording fails.

    Example:
        >>> import torchdiffeq
        >>> field = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.1)
        >>> x0 = torch.ones(2)
        >>> plain = odeadv.driven(field, x0, (0.0, 1.0), steps=100)
        >>> torchdiffeq.odeint(plain, x0, torch.tensor([0.0, 1.0])).shape
        torch.Size([2, 2])
    """
    if not isinstance(field, AdversarialField):
        raise TypeError(
            f"field: got {type(field).__name__}, expected an AdversarialField; other fields need no driving"
        )
    with outside_inference_mode():
        request = read_request(
            field,
            x0,
            t_span,
            scheme=scheme,
            dt=dt,
            steps=steps,
            clip_last=clip_last,
            rtol=rtol,
            atol=atol,
            substep=substep,
            costate=costate,
            sweeps=sweeps,
            ascent=ascent,
            checkpoints=checkpoints,
            differentiate_costate=differentiate_costate,
            time_dtype=time_dtype,
            within_span=within_span,
        )
        if field.idle:
            return VectorField({"f": field.f}, field.problem)
        recorded = SolveRun(request).driving_costate()
    narrow = request.narrow
    return field.driven_by(recorded if narrow is None else lambda t: recorded.extrapolated(t).to(narrow))
