"""The functions `solve` (record the costate, then solve) and `driven` (only record the costate)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from odeadv.costate import Converge
from odeadv.fields import AdversarialField, Operator, VectorField
from odeadv.fields.operator import VectorFunction
from odeadv.solver._run import SolveRun, remedy
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
    trajectory, linear costate. ``scheme="lie"`` is then Eq. 5 (LAD), and ``scheme="strang"`` is Eq. 8 (LAD-SM). The
    solve is differentiable with respect to parameters and ``x0``.

    Args:
        field: an `AdversarialField`, a `SplitField`, an `Operator` or a callable ``f(t, x)``. f receives ``t`` as a 0-d
            tensor of the real dtype of the state (at least float32).
        x0: initial state, any shape, floating or complex, any device; by default the initial state of the field. Steps
            of a 16-bit state are added up in float32, except the steps of a network. Or a tuple, list, dict or named
            tuple of tensors of one dtype, also nested. Functions of the state then receive this structure, and return
            it (None for a derivative that is zero). ``xs``, ``output``, ``sol(t)`` and the costate have it too.
        t_span: start and end time ``(t0, t1)``, in either direction; by default the span of the field. ``t0``, ``t1``
            and ``dt`` may be 0-d tensors that require gradients. The steps then scale with the span, see
            docs/costate.md.
        scheme: a name of `odeadv.schemes` or a `Scheme`, by default ``"strang"``. Or a sub-step or its name: it then
            advances the whole field without splitting. A field with one operator is never split.
        dt: step size. It must divide the span. It is positive, or has the sign of a span that runs backward. Or
            ``"adaptive"`` (or an `Adaptive`): solve first finds steps that meet the tolerances. It then uses them like
            fixed steps, also for gradients and saved times. The costate of an `AdversarialField` is recorded on finer
            steps until it meets the tolerances too. Or a sequence of the sizes of all steps, with the length of the
            span as their sum.
        steps: number of steps, instead of ``dt``; or a sequence of the times at which steps begin and end.
        clip_last: True makes the last step shorter if ``dt`` does not divide the span.
        rtol: relative tolerance of an adaptive step, by default 1e-4.
        atol: absolute tolerance of an adaptive step, by default 1e-6.
        save_at: None saves the two ends, ``"steps"`` saves every step, and a sequence of times saves these times. The
            state at a time within a step comes from a cubic Hermite polynomial, which needs two more evaluations of the
            field. If the order is above four, or a sub-step is not an explicit Runge-Kutta method, the step is repeated
            up to this time instead.
        dense: True keeps the states of all steps, so that ``sol(t)`` returns the state at any time, see
            `Solution.__call__`.
        substep: the method that advances each operator. It is a name (`odeadv.substep_names`, or a method of
            torchdiffeq), a `SubStep` such as `RungeKutta`, `DIRK`, `Nested` or `TorchDiffEq`, or a dict of operator
            name to sub-step. The default is Euler's method for an `AdversarialField`. Without a scheme, it is also
            Euler's method for a network, a `Residual` block or another `Piecewise` field. For all other fields it is
            the cheapest of Euler, midpoint and RK4 that has the order of the scheme. (It is midpoint if no scheme is
            given, and RK4 with a warning above order four.) So an `AdversarialField` with eta = 0 is bit-identical to
            ``solve(f, ..., scheme="euler")``.
        costate: evaluation of a(t) between recorded nodes: ``"linear"`` (Theorem 3.2, order 2), ``"exact"`` (Eq. 9
            integrated back from the next node, order 3) or ``"hermite"`` (cubic with slopes from Eq. 9, order 4). Or
            ``"collocation"``, with ``sweeps="converge"``: state and costate are one boundary-value problem, solved by
            Gauss collocation of the order of the scheme. The state may have up to 256 numbers, with all samples of a
            batch. The default is part of the scheme, or linear. With adaptive steps the default is cubic, unless f is
            advanced by its exact flow or by an implicit method.
        sweeps: number of recordings, each on the trajectory that the previous recording drives (Picard iteration); 1 is
            the paper's two-stage method. ``"converge"`` (or a `Converge`) repeats the recording, with Anderson
            acceleration, until the costate belongs to the trajectory that it drives.
        ascent: number of recordings, each on the trajectory that the sum of all previous recordings drives (Eq. 3).
            ``sweeps`` and ``ascent`` need a field with a loss.
        checkpoints: number of segments of the solve and of each recording. Only the autograd graph of one segment and
            the states between segments are in memory at a time. The backward pass runs each segment again, and the
            gradients are bit-identical. About the square root of the number of steps needs the least memory.
        differentiate_costate: True lets gradients pass through the costate too, instead of treating it as a constant.
        time_dtype: dtype of the times that f receives; by default the real dtype of the state (at least float32).
        within_span: True rejects schemes that evaluate f outside ``t_span``, see `Scheme.reach`.
        throw: True raises SolveError if the solve fails. If False, look at ``status`` of the solution.

    Returns:
        A `Solution`.

    Raises:
        TypeError, ValueError: if an argument does not fit. The error comes before f is evaluated, and names the
            argument. Also if a result of f or of the loss does not fit.
        SolveError: if the solve fails (see `Status`) and ``throw`` is True.

    Warns:
        AccuracyWarning: if a sub-step or the costate has a lower order than the scheme, or a user's scheme does not
            have its declared order. Also if a scheme is given for a field with one operator, or a scheme runs an
            irreversible operator backward. Also if steps are so small that f is evaluated at wrong times, or that the
            state does not change. Also if the solve with a collocated costate ends away from the collocated states.

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
        raise SolveError(solution, remedy(request, solution.status))
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

    Only the recordings are computed. They belong to this ``x0``, this ``t_span`` and the current weights. The returned
    field is a function of (t, x), and is differentiable with respect to both. So other solvers can evaluate it in any
    order, also in a backward pass (``odeint_adjoint``).

    Args:
        field: an `AdversarialField`.
        x0: initial state of the recorded trajectories. The costate belongs to this state.
        t_span: time span of the recorded trajectories. The costate is extrapolated outside the span, because adaptive
            solvers step beyond the end.
        scheme: as for `solve`. The first recording uses f alone, so the scheme has an effect from the second
            recording on.
        dt: step size, see `solve`.
        steps: as for `solve`.
        clip_last: as for `solve`.
        rtol: as for `solve`.
        atol: as for `solve`.
        substep: as for `solve`. With one recording, only the sub-step of f is used.
        costate: evaluation of a(t) between the recorded nodes, see `solve`.
        sweeps: as for `solve`.
        ascent: as for `solve`.
        checkpoints: as for `solve`.
        differentiate_costate: as for `solve`.
        time_dtype: as for `solve`.
        within_span: as for `solve`.

    Returns:
        A `VectorField`. If eta is 0, it contains f only.

    Raises:
        TypeError, ValueError: if an argument does not fit. The error comes before f is evaluated, and names the
            argument. Also if a result of f or of the loss does not fit.
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
