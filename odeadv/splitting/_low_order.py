"""The paper's schemes and other first- and second-order ones, for any number of operators."""

from __future__ import annotations

from odeadv.splitting._scheme import Composition, Scheme, Stage

STRANG = "Strang (1968), SIAM J. Numer. Anal. 5; Marchuk (1968)"


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
    return Scheme("strang", _palindrome(range(operators)), 2, f"{STRANG}; Eq. 20")


def strang_midpoint(operators: int = 2) -> Scheme:
    """Strang-Marchuk with a(t + dt/2) from the costate equation itself (Eq. 21 with Eq. 9), not from a mean."""
    return Scheme(
        "strang-midpoint", _palindrome(range(operators)), 2, "Eq. 21, a(t + dt/2) from Eq. 9", costate="exact"
    )


def strang_symmetric(operators: int = 2) -> Scheme:
    """Palindromic Strang: time is carried by the first operator, so the costate acts with a(t), then a(t + dt).

    Symmetric, and second order with a second-order sub-step for the first operator, even with Euler for the costate.
    """
    before = tuple(Stage(operator, 0.5, 0.0, frozen=True) for operator in range(operators - 1, 0, -1))
    after = tuple(Stage(operator, 0.5, 1.0, frozen=True) for operator in range(1, operators))
    source = "Hairer, Lubich & Wanner (2006), Geometric Numerical Integration, II.5"
    return Scheme("strang-symmetric", (*before, Stage(0, 1.0, 0.0), *after), 2, source)


def averaged_lie(operators: int = 2) -> Scheme:
    """The mean of Lie-Trotter and its reverse, each operator on its own clock; the two can run in parallel.

    Lie-Trotter itself, of order one, is embedded.
    """
    forward = tuple(Stage(operator, 1.0, 0.0) for operator in range(operators))
    source = "Strang (1963), Arch. Rational Mech. Anal. 12 (symmetrically weighted sequential splitting)"
    mixture = ((0.5, forward), (0.5, forward[::-1]))
    return Scheme("averaged-lie", (), 2, source, mixture=mixture, embedded=(1.0, 0.0), embedded_order=1)


def averaged_strang(operators: int = 2) -> Scheme:
    """The mean of Strang's splitting and the one with the operators in reverse; the two can run in parallel."""
    mixture = ((0.5, _palindrome(range(operators))), (0.5, _palindrome(range(operators - 1, -1, -1))))
    return Scheme("averaged-strang", (), 2, f"{STRANG}; averaged over the order of the operators", mixture=mixture)


def _palindrome(operators: range) -> Composition:
    """A full step of the first operator with halves of the others around it, the last outermost."""
    centre, *others = operators
    before = tuple(Stage(operator, 0.5, 0.0) for operator in reversed(others))
    after = tuple(Stage(operator, 0.5, 0.5) for operator in others)
    return (*before, Stage(centre, 1.0, 0.0), *after)
