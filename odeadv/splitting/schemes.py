"""The schemes by name, as ``odeadv.schemes``: ``names()``, ``get(name, operators=2)``, and the generators."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from odeadv.splitting import _high_order as high
from odeadv.splitting import _low_order as low
from odeadv.splitting._high_order import extrapolated_strang, suzuki, triple_jump
from odeadv.splitting._scheme import Scheme, Stage, alternating, repeated

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

_BUILDERS: dict[str, Callable[[int], Scheme]] = {
    "lie": low.lie,
    "strang": low.strang,
    "strang-midpoint": low.strang_midpoint,
    "strang-symmetric": low.strang_symmetric,
    "averaged-lie": low.averaged_lie,
    "averaged-strang": low.averaged_strang,
    "best22": high.best22,
    "mclachlan2": high.mclachlan2,
    "ruth3": high.ruth3,
    "aks3": high.aks3,
    "yoshida4": partial(triple_jump, 4),
    "suzuki4": partial(suzuki, 4),
    "blanes-moan4": high.blanes_moan4,
    "extrapolated-strang4": partial(extrapolated_strang, 4),
    "yoshida6": high.yoshida6,
    "triple-jump-6": partial(triple_jump, 6),
    "suzuki6": partial(suzuki, 6),
    "blanes-moan6": high.blanes_moan6,
    "kahan-li6": high.kahan_li6,
    "extrapolated-strang6": partial(extrapolated_strang, 6),
    "kahan-li8": high.kahan_li8,
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
    """The names `get` knows for so many operators, without their aliases."""
    tables = {"best22", "mclachlan2", "ruth3", "aks3", "blanes-moan4", "blanes-moan6"}
    return tuple(name for name in _BUILDERS if operators == 2 or name not in tables)


def get(name: str, operators: int = 2) -> Scheme:
    """The scheme called ``name`` (or by an alias of it), for a number of operators.

    Raises:
        TypeError: if ``name`` is not a string.
        ValueError: for an unknown name, listing near matches; for fewer than two operators; or for more than two
            where the scheme is a table for two.
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
