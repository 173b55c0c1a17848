"""All schemes by name: `names` lists them, and `get` returns one. The other functions make schemes of a family.

``solve(..., scheme="strang")`` takes a name, and ``print(odeadv.schemes.get("strang"))`` shows the table of stages. The
orders of all schemes are measured in 40 digits. docs/solver.md shows how to write a scheme of your own.
"""

# The coefficients are copied from the sources. If a consistency condition determines a coefficient (the centre of a
# palindrome, the last term of a sum), the coefficient is computed.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

from odeadv.splitting._scheme import Composition, Scheme, Stage, alternating, repeated
from odeadv.support.checks import did_you_mean

__all__ = [
    "Scheme",
    "Stage",
    "alternating",
    "extrapolated_strang",
    "get",
    "names",
    "repeated",
    "suzuki",
    "triple_jump",
]

STRANG = "Strang (1968), SIAM J. Numer. Anal. 5; Marchuk (1968)"


def lie(operators: int = 2) -> Scheme:
    """Return Lie-Trotter: every operator acts for a full step, in turn.

    The clock runs during the stage of the first operator. The other operators act at the end time of the step. With
    Euler sub-steps and the operators (f, costate) this is Eq. 18-19, the paper's LAD (Eq. 5). The costate then has its
    value at the end of the step.
    """
    rest = tuple(Stage(operator, 1.0, 1.0, frozen=True) for operator in range(1, operators))
    return Scheme("lie", (Stage(0, 1.0, 0.0), *rest), 1, "Trotter (1959), Proc. Amer. Math. Soc. 10; Eq. 18")


def strang(operators: int = 2) -> Scheme:
    """Return Strang-Marchuk: half steps of the later operators before and after a full step of the first operator.

    Each operator has its own clock. With Euler sub-steps, a linear costate and the operators (f, costate) this is the
    paper's LAD-SM (Eq. 8, 20). LAD-SM has order one, because both half steps of the costate use the value at their
    beginning.
    """
    return Scheme("strang", _palindrome(range(operators)), 2, f"{STRANG}; Eq. 20")


def strang_midpoint(operators: int = 2) -> Scheme:
    """Return Strang-Marchuk with the costate a(t + dt/2) from the costate equation (Eq. 21, Eq. 9), not from a mean."""
    return Scheme(
        "strang-midpoint", _palindrome(range(operators)), 2, "Eq. 21, a(t + dt/2) from Eq. 9", costate="exact"
    )


def strang_symmetric(operators: int = 2) -> Scheme:
    """Return the symmetric Strang scheme: time is split with the first operator, and the other clocks are frozen.

    The two half steps of a costate use its values a(t) and a(t + dt). The scheme is symmetric. It has second order with
    a second-order sub-step for the first operator, even with Euler for the costate.
    """
    before = tuple(Stage(operator, 0.5, 0.0, frozen=True) for operator in range(operators - 1, 0, -1))
    after = tuple(Stage(operator, 0.5, 1.0, frozen=True) for operator in range(1, operators))
    source = "Hairer, Lubich & Wanner (2006), Geometric Numerical Integration, II.5"
    return Scheme("strang-symmetric", (*before, Stage(0, 1.0, 0.0), *after), 2, source)


def averaged_lie(operators: int = 2) -> Scheme:
    """Return the mean of Lie-Trotter and its reverse, with each operator on its own clock. Both can run in parallel."""
    forward = tuple(Stage(operator, 1.0, 0.0) for operator in range(operators))
    source = "Strang (1963), Arch. Rational Mech. Anal. 12 (symmetrically weighted sequential splitting)"
    mixture = ((0.5, forward), (0.5, forward[::-1]))
    return Scheme("averaged-lie", (), 2, source, mixture=mixture)


def averaged_strang(operators: int = 2) -> Scheme:
    """Return the mean of Strang's splitting and its version with reversed operators. Both can run in parallel."""
    mixture = ((0.5, _palindrome(range(operators))), (0.5, _palindrome(range(operators - 1, -1, -1))))
    return Scheme("averaged-strang", (), 2, f"{STRANG}; averaged over the order of the operators", mixture=mixture)


def _palindrome(operators: range) -> Composition:
    """Return a full step of the first operator between half steps of the others, with the last operator outermost."""
    centre, *others = operators
    before = tuple(Stage(operator, 0.5, 0.0) for operator in reversed(others))
    after = tuple(Stage(operator, 0.5, 0.5) for operator in others)
    return (*before, Stage(centre, 1.0, 0.0), *after)


def triple_jump(order: int, operators: int = 2) -> Scheme:
    """Return Strang's splitting raised to an even ``order`` by triple jumps. Order 4 is the scheme ``yoshida4``.

    Args:
        order: order of accuracy of the scheme: 4, 6, 8, ...
        operators: number of operators of the field, at least 2.

    Raises:
        ValueError: if ``order`` is not an even number of at least 4.
    """
    stages = strang(operators).stages
    for even in range(4, _even(order) + 1, 2):
        outer = 1.0 / (2.0 - 2.0 ** (1.0 / (even - 1)))
        stages = repeated(stages, (outer, 1.0 - 2.0 * outer, outer))
    name = "yoshida4" if order == 4 else f"triple-jump-{order}"
    return Scheme(name, stages, order, "Yoshida (1990), Phys. Lett. A 150; Creutz & Gocksch (1989)")


def suzuki(order: int, operators: int = 2) -> Scheme:
    """Return Strang's splitting raised to an even ``order`` by Suzuki's fractal: five copies, the third runs backward.

    Args:
        order: order of accuracy of the scheme: 4, 6, 8, ...
        operators: number of operators of the field, at least 2.

    Raises:
        ValueError: if ``order`` is not an even number of at least 4.
    """
    stages = strang(operators).stages
    for even in range(4, _even(order) + 1, 2):
        outer = 1.0 / (4.0 - 4.0 ** (1.0 / (even - 1)))
        stages = repeated(stages, (outer, outer, 1.0 - 4.0 * outer, outer, outer))
    return Scheme(f"suzuki{order}", stages, order, "Suzuki (1990), Phys. Lett. A 146")


def extrapolated_strang(order: int, operators: int = 2) -> Scheme:
    """Return the Richardson extrapolation of Strang's splitting with 1, 2, ... inner steps. All operators run forward.

    Args:
        order: order of accuracy of the scheme: 4, 6, 8, ...
        operators: number of operators of the field, at least 2.

    Raises:
        ValueError: if ``order`` is not an even number of at least 4.
    """
    counts = range(1, _even(order) // 2 + 1)
    tables = (repeated(strang(operators).stages, (1.0 / count,) * count) for count in counts)
    mixture = tuple(zip(_extrapolating(counts), tables, strict=True))
    source = "Hairer, Norsett & Wanner (1993), Solving ODEs I, II.9; Chin (2010), Celest. Mech. Dyn. Astr. 106"
    return Scheme(f"extrapolated-strang{order}", (), order, source, mixture=mixture)


def _extrapolating(counts: Sequence[int]) -> list[float]:
    """Return the factors that cancel the leading even error terms of results with ``counts`` inner steps."""
    return [math.prod(n**2 / (n**2 - other**2) for other in counts if other != n) for n in counts]


def yoshida6(operators: int = 2) -> Scheme:
    """Return Yoshida's sixth-order composition of seven Strang steps, solution A."""
    half = (0.784513610477560, 0.235573213359357, -1.17767998417887)
    return _palindromic_strang("yoshida6", half, 6, "Yoshida (1990), Phys. Lett. A 150, solution A", operators)


def kahan_li6(operators: int = 2) -> Scheme:
    """Return Kahan and Li's sixth-order composition of nine Strang steps."""
    half = (0.39216144400731413928, 0.33259913678935943860, -0.70624617255763935981, 0.082213596293550800230)
    return _palindromic_strang("kahan-li6", half, 6, "Kahan & Li (1997), Math. Comp. 66, s9odr6a", operators)


def kahan_li8(operators: int = 2) -> Scheme:
    """Return Kahan and Li's eighth-order composition of seventeen Strang steps."""
    half = (
        0.13020248308889008088,
        0.56116298177510838456,
        -0.38947496264484728641,
        0.15884190655515560090,
        -0.39590389413323757734,
        0.18453964097831570709,
        0.25837438768632204729,
        0.29501172360931029887,
    )
    return _palindromic_strang("kahan-li8", half, 8, "Kahan & Li (1997), Math. Comp. 66, s17odr8a", operators)


def best22(operators: int = 2) -> Scheme:
    """Return the second-order scheme with two stages per operator that has the smallest error constant."""
    a = math.sqrt(0.5)
    source = "McLachlan & Atela (1992), Nonlinearity 5; Auzinger, 'Best 2-2'"
    return _table("best22", alternating(0, (1.0 - a, a, a, 1.0 - a)), 2, source, operators)


def mclachlan2(operators: int = 2) -> Scheme:
    """Return McLachlan's second-order palindrome with the smallest error constant: two stages of the first operator."""
    root = (2.0 * math.sqrt(326.0) + 36.0) ** (1.0 / 3.0)
    outer = 0.5 - root / 12.0 + 1.0 / (6.0 * root)
    source = "McLachlan (1995), SIAM J. Sci. Comput. 16; Omelyan, Mryglod & Folk (2002), Phys. Rev. E 65"
    return _table("mclachlan2", _palindromic_table((outer,), (0.5,)), 2, source, operators)


def ruth3(operators: int = 2) -> Scheme:
    """Return Ruth's third-order scheme."""
    return _table(
        "ruth3",
        alternating(0, (7 / 24, 2 / 3, 3 / 4, -2 / 3, -1 / 24, 1.0)),
        3,
        "Ruth (1983), IEEE Trans. Nucl. Sci. 30",
        operators,
    )


def aks3(operators: int = 2) -> Scheme:
    """Return a third-order scheme with three stages per operator. Reversal exchanges the roles of the operators."""
    first, middle = 0.268330095781759925, -0.187991618799159782
    last = 1.0 - first - middle
    source = "Auzinger, Hofstaetter, Ketcheson & Koch (2017), BIT 57, and their collection of coefficients, AKS 3"
    return _table("aks3", alternating(0, (first, last, middle, middle, last, first)), 3, source, operators)


def blanes_moan4(operators: int = 2) -> Scheme:
    """Return Blanes and Moan's fourth-order palindrome S6: six stages of the first operator."""
    outer = (0.0792036964311957, 0.353172906049774, -0.0420650803577195)
    inner = (0.209515106613362, -0.143851773179818)
    source = "Blanes & Moan (2002), J. Comput. Appl. Math. 142, S6"
    stages = _palindromic_table(outer, (*inner, 0.5 - sum(inner)))
    return _table("blanes-moan4", stages, 4, source, operators)


def blanes_moan6(operators: int = 2) -> Scheme:
    """Return Blanes and Moan's sixth-order palindrome S10: ten stages of the first operator."""
    outer = (0.0502627644003922, 0.413514300428344, 0.0450798897943977, -0.188054853819569, 0.541960678450780)
    inner = (0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175)
    source = "Blanes & Moan (2002), J. Comput. Appl. Math. 142, S10"
    stages = _palindromic_table(outer, (*inner, 0.5 - sum(inner)))
    return _table("blanes-moan6", stages, 6, source, operators)


def _palindromic_strang(name: str, half: Sequence[float], order: int, source: str, operators: int) -> Scheme:
    weights = (*half, 1.0 - 2.0 * math.fsum(half), *reversed(half))
    return Scheme(name, repeated(strang(operators).stages, weights), order, source)


def _palindromic_table(outer: Sequence[float], inner: Sequence[float]) -> Composition:
    """Return a palindrome of operators 1 and 0 in turn, from the weights of its first half.

    ``outer`` are the weights of operator 1, and ``inner`` the weights of operator 0. The weight of the central stage,
    of operator 1, follows from the sum 1.
    """
    half = [weight for pair in zip(outer, inner, strict=True) for weight in pair]
    return alternating(1, (*half, 1.0 - 2.0 * math.fsum(outer), *reversed(half)))


def _table(name: str, stages: Composition, order: int, source: str, operators: int) -> Scheme:
    if operators != 2:
        raise ValueError(
            f"scheme: {name!r} is a table for 2 operators, the field has {operators}; for more, take a composition of "
            "Strang such as 'yoshida4', 'suzuki4', 'kahan-li6' or 'extrapolated-strang4'"
        )
    return Scheme(name, stages, order, source)


def _even(order: int) -> int:
    if order < 4 or order % 2:
        raise ValueError(f"order: got {order}, expected an even number, at least 4")
    return order


_BUILDERS: dict[str, Callable[[int], Scheme]] = {
    "lie": lie,
    "strang": strang,
    "strang-midpoint": strang_midpoint,
    "strang-symmetric": strang_symmetric,
    "averaged-lie": averaged_lie,
    "averaged-strang": averaged_strang,
    "best22": best22,
    "mclachlan2": mclachlan2,
    "ruth3": ruth3,
    "aks3": aks3,
    "yoshida4": partial(triple_jump, 4),
    "suzuki4": partial(suzuki, 4),
    "blanes-moan4": blanes_moan4,
    "extrapolated-strang4": partial(extrapolated_strang, 4),
    "yoshida6": yoshida6,
    "triple-jump-6": partial(triple_jump, 6),
    "suzuki6": partial(suzuki, 6),
    "blanes-moan6": blanes_moan6,
    "kahan-li6": kahan_li6,
    "extrapolated-strang6": partial(extrapolated_strang, 6),
    "kahan-li8": kahan_li8,
    "extrapolated-strang8": partial(extrapolated_strang, 8),
}
_ALIASES = {
    "lie-trotter": "lie",
    "lad": "lie",
    "strang-marchuk": "strang",
    "lad-sm": "strang",
    "triple-jump-4": "yoshida4",
}


def names(operators: int = 2) -> tuple[str, ...]:
    """Return the names that `get` accepts for this number of operators, without aliases.

    Args:
        operators: number of operators of the field. For more than 2, the list lacks the schemes that are tables for two
            operators.

    Example:
        >>> "yoshida4" in odeadv.schemes.names()
        True
    """
    tables = {"best22", "mclachlan2", "ruth3", "aks3", "blanes-moan4", "blanes-moan6"}
    return tuple(name for name in _BUILDERS if operators == 2 or name not in tables)


def get(name: str, operators: int = 2) -> Scheme:
    """Return the scheme with the name or alias ``name``, for this number of operators.

    Args:
        name: a name from `names`, or an alias: ``"lad"`` and ``"lie-trotter"`` for ``"lie"``, ``"lad-sm"`` and
            ``"strang-marchuk"`` for ``"strang"``, ``"triple-jump-4"`` for ``"yoshida4"``. Case, spaces, "-" and "_"
            make no difference.
        operators: number of operators of the field, at least 2.

    Raises:
        TypeError: if ``name`` is not a string.
        ValueError: if the name is unknown (the message lists near matches), or ``operators`` is below 2. Also if the
            scheme is a table for two operators and ``operators`` is above 2.

    Example:
        >>> odeadv.schemes.get("lad-sm").name
        'strang'
    """
    if not isinstance(name, str):
        raise TypeError(f"scheme: got {type(name).__name__}, expected a name or a Scheme")
    if operators < 2:
        raise ValueError(f"operators: got {operators}, expected at least 2")
    key = _key(name)
    if key not in _BUILDERS:
        near = did_you_mean(key, [*_BUILDERS, *_ALIASES], most=3)
        raise ValueError(f"scheme: got {name!r}, expected one of {', '.join(_BUILDERS)}{near}")
    return _built(key, operators)


@cache  # schemes are immutable, and every solve needs a scheme
def _built(key: str, operators: int) -> Scheme:
    return _BUILDERS[key](operators)


def knows(name: str) -> bool:
    """Return True if `get` accepts ``name`` for two operators."""
    return _key(name) in _BUILDERS


def _key(name: str) -> str:
    """Return the listed name for an alias, or for a name in another spelling."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    return _ALIASES.get(key, key)
