"""The method of a solve: composition, sub-steps and costate evaluation, checked against a field."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from odeadv.fields import AdversarialField, Forcing, Jump, VectorField
from odeadv.fields.operator import Cost
from odeadv.fields.terms import Sum, Unrecorded
from odeadv.splitting import schemes
from odeadv.splitting._nested import Nested
from odeadv.splitting._scheme import CostateKind, Scheme
from odeadv.splitting._stepper import Stepper
from odeadv.splitting._substep import Exact, SubStep, get_substep, substep_names

SubSteps = str | SubStep | Mapping[str, str | SubStep]


class AccuracyWarning(UserWarning):
    """A choice of `solve` keeps the scheme from its order, or may not be stable."""


@dataclass(frozen=True)
class Discretisation:
    """The three orthogonal choices, checked against the field: composition, sub-steps, costate evaluation."""

    name: str
    scheme: Scheme | None
    substeps: Mapping[str, SubStep]
    costate: CostateKind

    def order(self, field: VectorField) -> float:
        """The order to be expected on ``field``: the lowest of sub-steps and, if it is split, composition."""
        orders = [self.substeps[name].order for name, term in field.operators.items() if term.acts]
        return min(orders if self.scheme is None or len(orders) == 1 else [self.scheme.order, *orders])

    def splits(self, field: VectorField) -> bool:
        """Whether ``field`` is solved by the composition: not where a single operator acts."""
        return self.scheme is not None and sum(term.acts for term in field.operators.values()) > 1

    def mirror(self, field: VectorField) -> Stepper:
        """What advances ``field`` by the adjoint scheme."""
        assert self.scheme is not None
        return replace(self, scheme=self.scheme.adjoint()).stepper(field)

    def stepper(self, field: VectorField) -> Stepper:
        """What advances those operators of ``field`` that act; one that is left alone acts in a single stage."""
        active = [i for i, term in enumerate(field.operators.values()) if term.acts]
        names = [list(field.operators)[i] for i in active]
        operators = [field.operators[name] for name in names]
        substeps = [self.substeps[name] for name in names]
        if len(active) == 1:
            return Stepper(operators, substeps)
        if self.scheme is None:
            return Stepper([Sum(operators, names, [Cost() for _ in operators])], substeps[:1])
        return Stepper(operators, substeps, self.scheme.compositions)


def read_discretisation(
    field: VectorField, scheme: str | Scheme, substep: SubSteps | None, costate: CostateKind | None
) -> Discretisation:
    """The three orthogonal choices, as objects.

    Raises:
        TypeError, ValueError: naming ``scheme``, ``substep`` or ``costate``.
    """
    count = len(field.operators)
    table: Scheme | None
    if isinstance(scheme, Scheme):
        scheme.check()
        name, table = scheme.name, scheme.numbered(list(field.operators)) if count > 1 else scheme
    elif isinstance(scheme, str) and (scheme in substep_names() or scheme.startswith("torchdiffeq:")):
        if substep not in (None, scheme):
            raise ValueError(
                f"scheme: {scheme!r} is itself a sub-step and does not split; give it as substep, or leave substep out"
            )
        name, table, substep = scheme, None, scheme
    else:
        table = schemes.get(scheme, max(2, count))
        name = table.name
    acting = 1 if isinstance(field, AdversarialField) and field.eta == 0.0 else count
    if table is None and acting > 1:
        if name == "exact":
            raise ValueError("scheme: 'exact' needs a field with one operator; choose a splitting scheme")
        if _jumps(field):
            raise ValueError(
                f"scheme: {name!r} does not split, but the field jumps from {_jumps(field)[0][0]:g} to "
                f"{_jumps(field)[0][1]:g}; use a splitting scheme such as 'lie' or 'strang'"
            )
    kind = costate if costate is not None else (table.costate if table else None) or "linear"
    if kind not in ("linear", "hermite", "exact"):
        raise ValueError(f"costate: got {kind!r}, expected 'linear', 'hermite' or 'exact'")
    if kind != "linear" and isinstance(field, AdversarialField) and field.transforms:
        asked = repr(kind) if costate is not None else f"{kind!r} by scheme {name!r}"
        raise ValueError(
            f"costate: got {asked} for a transformed field, whose costate does not follow Eq. 9 between nodes; "
            "expected costate='linear'"
        )
    substeps = _substeps(field, "euler" if substep is None else substep)
    if table is not None and count > 1:
        _warn(field, table, substeps, chosen=substep is not None)
    return Discretisation(name, table, substeps, kind)


def _warn(field: VectorField, scheme: Scheme, substeps: Mapping[str, SubStep], *, chosen: bool) -> None:
    """Say where the sub-steps or the operators do not allow what the scheme promises."""
    still = {
        name
        for i, (name, term) in enumerate(field.operators.items())
        if isinstance(term, Forcing | Unrecorded) and scheme.freezes(i)
    }
    low = [
        f"{name!r} by {method.name!r}"
        for name, method in substeps.items()
        if method.order < scheme.order and name not in still  # with its clock frozen, a costate is a constant
    ]
    if low and (chosen or scheme.order > 2):
        warnings.warn(
            f"scheme: {scheme.name!r} has order {scheme.order}, but a sub-step has less ({', '.join(low)}), and lowers "
            "the order of the whole; give substep=",
            AccuracyWarning,
            stacklevel=5,
        )
    names = list(field.operators)
    back = [names[int(i)] for i in scheme.goes_back if not field.operators[names[int(i)]].reversible]
    for name, method in substeps.items():
        operator = field.operators[name]
        if isinstance(method, Nested) and isinstance(operator, Sum):
            back += method.runs_back(operator)
    if back:
        warnings.warn(
            f"scheme: {scheme.name!r} runs the irreversible operator {back[0]!r} backward; take one without negative "
            "weights, such as 'strang' or 'extrapolated-strang4'",
            AccuracyWarning,
            stacklevel=5,
        )


def _substeps(field: VectorField, substep: SubSteps) -> dict[str, SubStep]:
    if isinstance(substep, Mapping):
        unknown = [name for name in substep if name not in field.operators]
        if unknown:
            raise ValueError(
                f"substep: no operator is called {unknown[0]!r}; the field has {', '.join(map(repr, field.operators))}"
            )
        chosen = {name: get_substep(substep.get(name, "euler")) for name in field.operators}
    else:
        chosen = dict.fromkeys(field.operators, get_substep(substep))
    for name, method in chosen.items():
        operator = field.operators[name]
        if isinstance(method, Nested) and not isinstance(operator, Forcing | Unrecorded):
            chosen[name] = method.of(operator)
        known = isinstance(operator, Forcing | Unrecorded) or all(
            isinstance(part, Jump) or part.flow is not None for part in operator.pieces or (operator,)
        )
        if isinstance(method, Exact) and not known:
            raise ValueError(
                f"substep: 'exact' is asked for operator {name!r}, which has no flow; give "
                f"odeadv.Operator(f, flow=...) or another sub-step ({', '.join(substep_names())})"
            )
    return chosen


def _jumps(field: VectorField) -> list[tuple[float, float]]:
    return [jump for term in field.operators.values() for jump in term.jumps]
