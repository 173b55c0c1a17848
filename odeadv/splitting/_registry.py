"""The schemes by name, as ``odeadv.schemes``: ``names()``, ``get(name, operators=2)``."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from odeadv.splitting._scheme import Scheme, Stage

__all__ = ["Scheme", "Stage", "get", "lie", "names", "strang", "strang_midpoint", "strang_symmetric"]


def lie(operators: int = 2) -> Scheme:
    """Lie-Trotter: every operator for a full step, in turn; the first carries time, the others see its end.

    With Euler sub-steps and the operators (f, costate) this is Eq. 18-19, the paper's LAD (Eq. 5): the costate acts
    with its value at the end of the step.
    """
    rest = tuple(Stage(operator, 1.0, 1.0, frozen=True) for operator in range(1, operators))
    return Scheme("lie", (Stage(0, 1.0, 0.0), *rest), 1, "Trotter (1959), Proc. Amer. Math. Soc. 10; Eq. 18")


def strang(operators: int = 2) -> Scheme:
    """Strang-Marchuk: halves of the later operators around a full step of the first, each on its own clock.

    With Euler sub-steps, a linear costate and the operators (f, costate) this is the paper's LAD-SM (Eq. 8, 20):
    order one, since both halves of the costate take the value at their beginning.
    """
    before = tuple(Stage(operator, 0.5, 0.0) for operator in range(operators - 1, 0, -1))
    after = tuple(Stage(operator, 0.5, 0.5) for operator in range(1, operators))
    source = "Strang (1968), SIAM J. Numer. Anal. 5; Marchuk (1968); Eq. 20"
    return Scheme("strang", (*before, Stage(0, 1.0, 0.0), *after), 2, source)


def strang_midpoint(operators: int = 2) -> Scheme:
    """Strang-Marchuk with a(t + dt/2) from the costate equation itself (Eq. 21 with Eq. 9), not from a mean."""
    base = strang(operators)
    return Scheme("strang-midpoint", base.stages, 2, "Eq. 21, a(t + dt/2) from Eq. 9", costate="exact")


def strang_symmetric(operators: int = 2) -> Scheme:
    """Palindromic Strang: time is carried by the first operator, so the costate acts with a(t), then a(t + dt).

    Symmetric, and second order with a second-order sub-step for the first operator, even with Euler for the costate.
    """
    before = tuple(Stage(operator, 0.5, 0.0, frozen=True) for operator in range(operators - 1, 0, -1))
    after = tuple(Stage(operator, 0.5, 1.0, frozen=True) for operator in range(1, operators))
    source = "Hairer, Lubich & Wanner (2006), Geometric Numerical Integration, II.5"
    return Scheme("strang-symmetric", (*before, Stage(0, 1.0, 0.0), *after), 2, source)


_BUILDERS: dict[str, Callable[[int], Scheme]] = {
    "lie": lie,
    "strang": strang,
    "strang-midpoint": strang_midpoint,
    "strang-symmetric": strang_symmetric,
}
_ALIASES = {"lie-trotter": "lie", "lad": "lie", "strang-marchuk": "strang", "lad-sm": "strang"}


def names() -> tuple[str, ...]:
    """The names `get` knows, without their aliases."""
    return tuple(_BUILDERS)


def get(name: str, operators: int = 2) -> Scheme:
    """The scheme called ``name`` (or by an alias of it), for a number of operators.

    Raises:
        TypeError: if ``name`` is not a string.
        ValueError: for an unknown name, listing near matches; or for fewer than two operators.
    """
    if not isinstance(name, str):
        raise TypeError(f"scheme: got {type(name).__name__}, expected a name or a Scheme")
    if operators < 2:
        raise ValueError(f"operators: got {operators}, expected at least 2")
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = _ALIASES.get(key, key)
    if key not in _BUILDERS:
        known = [*_BUILDERS, *_ALIASES]
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "none is near."
        raise ValueError(f"scheme: {name!r} is not known; {hint} Known: {', '.join(_BUILDERS)}")
    return _BUILDERS[key](operators)
