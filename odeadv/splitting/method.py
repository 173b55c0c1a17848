"""The discretisation: composition, sub-steps and costate evaluation, with checks that they fit a field."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from odeadv.fields import AdversarialField, Forcing, Operator, Residual, VectorField
from odeadv.fields.operator import Cost
from odeadv.fields.terms import Sum, Unrecorded
from odeadv.splitting import schemes
from odeadv.splitting._nested import Nested
from odeadv.splitting._scheme import CostateKind, Scheme
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import (
    SubStep,
    all_names,
    cheapest_of_order,
    get_substep,
    is_named,
    is_substep,
    shown_names,
    substep_names,
)
from odeadv.splitting._tableau import Tableau
from odeadv.support.checks import choice, did_you_mean

SchemeLike = str | Scheme | SubStep
SubSteps = str | SubStep | Mapping[str, str | SubStep]

# The order of each costate evaluation. "exact" integrates Eq. 9 by one midpoint step with a local error of order three.
# "collocation" takes as many points per step as the other orders need.
COSTATE_ORDERS: Mapping[CostateKind, float] = {"linear": 2, "exact": 3, "hermite": 4, "collocation": math.inf}


class AccuracyWarning(UserWarning):
    """Warns that an argument of `solve` lowers the order of the scheme, may make it unstable, or loses digits."""


@dataclass(frozen=True)
class Discretisation:
    """The three independent choices: composition, sub-steps, costate evaluation.

    Attributes:
        name: name of the scheme, or of the sub-step if the field is not split.
        scheme: the composition; None if the field is not split.
        substeps: a dict of operator name to sub-step.
        costate: evaluation of the costate a(t) between recorded nodes.
    """

    name: str
    scheme: Scheme | None
    substeps: Mapping[str, SubStep]
    costate: CostateKind

    def order(self, field: VectorField) -> float:
        """Return the expected order on ``field``: the lowest order of composition, sub-steps and costate evaluation."""
        acting = [(i, name, term) for i, (name, term) in enumerate(field.operators.items()) if term.acts]
        orders = [float(self.scheme.order)] if self.scheme is not None and len(acting) > 1 else []
        for i, name, term in acting:
            if isinstance(term, Forcing) and len(acting) > 1 and self.scheme is not None and self.scheme.freezes(i):
                continue  # a frozen forcing is constant on its stage, and is evaluated at nodes only
            orders.append(self.substeps[name].order)
            if isinstance(term, Forcing) and name == "costate":
                orders.append(COSTATE_ORDERS[self.costate])
        return min(orders)

    def splits(self, field: VectorField) -> bool:
        """Return True if the composition is used for ``field``: at least two of its operators act."""
        return self.scheme is not None and sum(term.acts for term in field.operators.values()) > 1

    def mirror(self, field: VectorField) -> Stepper:
        """Return the stepper of ``field`` with the adjoint scheme."""
        assert self.scheme is not None
        return replace(self, scheme=self.scheme.adjoint()).stepper(field)

    def stepper(self, field: VectorField) -> Stepper:
        """Return the stepper for the operators of ``field`` that act. A single operator has a single stage."""
        acting = {name: term for name, term in field.operators.items() if term.acts}
        operators = list(acting.values())
        substeps = [self.substeps[name] for name in acting]
        if len(acting) == 1:
            return Stepper(operators, substeps)
        if self.scheme is None:
            return Stepper([Sum(operators, list(acting), [Cost() for _ in operators])], substeps[:1])
        return Stepper(operators, substeps, self.scheme.compositions)


def read_discretisation(
    field: VectorField, scheme: SchemeLike | None, substep: SubSteps | None, costate: CostateKind | None
) -> Discretisation:
    """Return the three choices as objects. None selects the default.

    Raises:
        TypeError, ValueError: if a choice does not exist or does not fit the field. The message names the argument.

    Warns:
        AccuracyWarning: see `odeadv.solve`.
    """
    count = len(field.operators)
    table: Scheme | None
    if isinstance(scheme, Scheme):
        scheme.check()
        _check_declared_order(scheme)
        name, table = scheme.name, scheme.numbered(list(field.operators)) if count > 1 else scheme
    elif scheme is not None and is_substep(scheme):
        if substep not in (None, scheme):
            raise ValueError(
                f"scheme: {scheme!r} is itself a sub-step and does not split; give it as substep, or leave substep out"
            )
        substep = get_substep(scheme)
        name, table = substep.name, None
    else:
        if isinstance(scheme, str) and not schemes.knows(scheme):
            known = [*schemes.names(), *all_names()]
            raise ValueError(
                f"scheme: got {scheme!r}, expected one of {', '.join(schemes.names())}; or, to advance the whole field "
                f"without splitting, a sub-step: {shown_names()}{did_you_mean(scheme, known, most=3)}"
            )
        table = schemes.get("strang" if scheme is None else scheme, max(2, count))  # type: ignore[arg-type]
        name = table.name
    if table is None:
        _check_unsplit(field, name)
    kind = _read_costate(field, name, table, costate)
    default = "euler" if table is None or _is_papers(field, scheme) else cheapest_of_order(table.order)
    substeps = _read_substeps(field, substep, default)
    if count == 1:
        (whole,) = substeps.values()
        if table is not None and scheme is not None:
            _warn_unsplit(name, whole)
        name = whole.name
    elif table is not None:
        _warn(field, table, substeps, kind, chosen=substep is not None)
    return Discretisation(name, table, substeps, kind)


def _is_papers(field: VectorField, scheme: SchemeLike | None) -> bool:
    """Return True if the default sub-step is Euler, as in the paper: for adversarial fields and for networks."""
    if isinstance(field, AdversarialField):
        return True
    first, *others = field.operators.values()
    return not others and scheme is None and (bool(first.edges) or isinstance(first, Residual))


def _check_declared_order(scheme: Scheme) -> None:
    """Warn if a user's scheme does not have the order that it declares."""
    known = scheme.name in schemes.names(scheme.operators) and scheme == schemes.get(scheme.name, scheme.operators)
    if known or scheme.name.endswith("*"):  # an adjoint has the same order as its scheme
        return
    measured = scheme.measure_order()
    if measured < scheme.order - 0.5:
        warnings.warn(
            f"scheme: {scheme.name!r} declares order {scheme.order}, but its order is {measured:.2g}, as "
            "Scheme.measure_order() measures it; correct the table or the declared order",
            AccuracyWarning,
            stacklevel=5,
        )


def _check_unsplit(field: VectorField, name: str) -> None:
    """Raise ValueError if ``field`` cannot be solved without splitting by the method ``name``."""
    idle = isinstance(field, AdversarialField) and field.idle
    if len(field.operators) == 1 or idle:
        return
    if name == "exact":
        raise ValueError("scheme: 'exact' needs a field with one operator; choose a splitting scheme")
    hidden = [other for other, operator in field.operators.items() if "f" not in operator.abilities]
    if hidden:
        raise ValueError(
            f"scheme: {name!r} does not split, but the right-hand side of operator {hidden[0]!r} is not known; use a "
            "splitting scheme such as 'lie' or 'strang'"
        )
    if field.jumps:
        raise ValueError(
            f"scheme: {name!r} does not split, but the field jumps from {field.jumps[0][0]:g} to "
            f"{field.jumps[0][1]:g}; use a splitting scheme such as 'lie' or 'strang'"
        )


def _read_costate(field: VectorField, name: str, table: Scheme | None, costate: CostateKind | None) -> CostateKind:
    kind = costate if costate is not None else (table.costate if table else None) or "linear"
    choice("costate", kind, COSTATE_ORDERS)
    if kind != "linear" and isinstance(field, AdversarialField) and "f" not in field.f.abilities:
        raise ValueError(
            f"costate: got {kind!r} for a field whose right-hand side is not known, which Eq. 9 needs between nodes; "
            "expected costate='linear'"
        )
    if kind != "linear" and isinstance(field, AdversarialField) and field.transforms:
        asked = repr(kind) if costate is not None else f"{kind!r} by scheme {name!r}"
        raise ValueError(
            f"costate: got {asked} for a transformed field, whose costate does not follow Eq. 9 between nodes; "
            "expected costate='linear'"
        )
    return kind


def _warn_unsplit(name: str, substep: SubStep) -> None:
    warnings.warn(
        f"scheme: {name!r} splits a field into operators, but this field has one, so it is advanced un-split by "
        f"{substep.name!r}, of order {substep.order:g}; leave scheme out, or pass an odeadv.SplitField",
        AccuracyWarning,
        stacklevel=5,
    )


def _warn(
    field: VectorField, scheme: Scheme, substeps: Mapping[str, SubStep], costate: CostateKind, *, chosen: bool
) -> None:
    """Warn if sub-steps or costate lower the order of the scheme, or an irreversible operator would run backward."""
    names = list(field.operators)
    frozen = {
        name
        for i, (name, term) in enumerate(field.operators.items())
        if isinstance(term, Forcing | Unrecorded) and scheme.freezes(i)
    }
    low = [
        f"{name!r} by {substep.name!r}"
        for name, substep in substeps.items()
        if substep.order < scheme.order and name not in frozen  # a frozen costate is constant on its stage
    ]
    if low and (chosen or scheme.order > 2):
        _warn_accuracy(
            f"scheme: {scheme.name!r} has order {scheme.order}, but a sub-step has less ({', '.join(low)}), which "
            "lowers the order of the solve; give substep="
        )
    if isinstance(field, AdversarialField) and COSTATE_ORDERS[costate] < scheme.order and "costate" not in frozen:
        better = "" if costate == "hermite" else "; give costate='hermite', which has 4"
        _warn_accuracy(
            f"scheme: {scheme.name!r} has order {scheme.order}, but the costate is {costate} between its nodes, which "
            f"has order {COSTATE_ORDERS[costate]} and lowers the order of the solve{better}"
        )
    back = [names[int(i)] for i in scheme.goes_back if not field.operators[names[int(i)]].reversible]
    for name, substep in substeps.items():
        operator = field.operators[name]
        if isinstance(substep, Nested) and isinstance(operator, Sum):
            back += substep.runs_back(operator)
    if back:
        _warn_accuracy(
            f"scheme: {scheme.name!r} runs the irreversible operator {back[0]!r} backward; take one without negative "
            "weights, such as 'strang' or 'extrapolated-strang4'"
        )


def _warn_accuracy(message: str) -> None:
    warnings.warn(message, AccuracyWarning, stacklevel=6)


def _read_substeps(field: VectorField, substep: SubSteps | None, default: str) -> dict[str, SubStep]:
    if isinstance(substep, Mapping):
        unknown = [name for name in substep if name not in field.operators]
        if unknown:
            raise ValueError(
                f"substep: no operator is called {unknown[0]!r}; the field has {', '.join(map(repr, field.operators))}"
            )
        given = substep
    else:
        given = {} if substep is None else dict.fromkeys(field.operators, substep)
    chosen = {}
    for name, operator in field.operators.items():
        only_flow = operator.abilities == {"flow"}
        method = get_substep(given.get(name, "exact" if only_flow else default))
        if isinstance(method, Nested):
            method = method.of(operator)
        _check_tableau(method)
        _check_able(name, operator, method)
        chosen[name] = method
    return chosen


def _check_tableau(method: SubStep) -> None:
    """Warn if a user's Runge-Kutta method does not have the order that it declares."""
    if isinstance(method, Tableau) and not is_named(method) and method.measure_order() < min(method.order, 8):
        warnings.warn(
            f"substep: {method.name!r} declares order {method.order:g}, but has order {method.measure_order()}; "
            "correct the tableau or the declared order",
            AccuracyWarning,
            stacklevel=6,
        )


def _check_able(name: str, operator: Operator, method: SubStep) -> None:
    """Raise ValueError if the operator lacks a function that the sub-step ``method`` needs."""
    missing = sorted(getattr(method, "needs", frozenset()) - operator.abilities)
    if not missing:
        return
    asked = f"substep: {method.name!r} is asked for operator {name!r}, whose"
    if missing == ["flow"]:
        others = ", ".join(other for other in substep_names() if other != "exact")
        raise ValueError(f"{asked} flow is not known; give odeadv.Operator(f, flow=...) or another sub-step ({others})")
    known = "'exact'" if "flow" in operator.abilities else "an implicit one such as 'sdirk2'"
    raise ValueError(f"{asked} right-hand side is not known; give odeadv.Operator(f, ...) or another sub-step, {known}")
