"""Compositions as data: weights, symmetry, adjoints, names."""

import pytest

from odeadv import Scheme, Stage, schemes


@pytest.mark.parametrize("name", schemes.names())
@pytest.mark.parametrize("operators", [2, 3, 5])
def test_every_scheme_is_consistent(name, operators):
    scheme = schemes.get(name, operators)
    scheme.check()
    assert scheme.operators == operators
    assert scheme.adjoint().adjoint() == scheme
    scheme.adjoint().check()
    assert scheme.name in str(scheme)
    assert scheme.source in str(scheme)


@pytest.mark.parametrize(
    ("name", "order", "symmetric"),
    [("lie", 1, False), ("strang", 2, True), ("strang-midpoint", 2, True), ("strang-symmetric", 2, True)],
)
def test_order_and_symmetry(name, order, symmetric):
    assert (schemes.get(name).order, schemes.get(name).symmetric) == (order, symmetric)


def test_aliases_and_spelling():
    assert schemes.get("lie-trotter") == schemes.get("LAD") == schemes.get("lie")
    assert schemes.get("Strang_Marchuk") == schemes.get("lad-sm") == schemes.get("strang")


def test_the_papers_tables():
    assert schemes.get("lie").stages == (Stage(0, 1.0, 0.0), Stage(1, 1.0, 1.0, frozen=True))
    assert schemes.get("strang").stages == (Stage(1, 0.5, 0.0), Stage(0, 1.0, 0.0), Stage(1, 0.5, 0.5))
    assert schemes.get("strang-midpoint").costate == "exact"
    assert schemes.get("strang").costate is None


def test_the_adjoint_of_lie_reverses_it():
    assert schemes.get("lie").adjoint().stages == (Stage(1, 1.0, 0.0, frozen=True), Stage(0, 1.0, 0.0))


def test_an_operator_left_alone_acts_for_exactly_one_step():
    thirds = Scheme("thirds", (*(Stage(0, 1 / 3, k / 3) for k in range(3)), Stage(1, 1.0, 0.0)), 1, "test")
    assert thirds.restricted_to([0]) == (Stage(0, 1.0, 0.0),)


def test_neighbours_merge_where_the_operator_between_them_vanishes():
    merged = schemes.get("strang", 3).restricted_to([1, 2])
    assert merged == (Stage(1, 0.5, 0.0), Stage(0, 1.0, 0.0), Stage(1, 0.5, 0.5))


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"weights of operator 1 in 'odd' sum to 0\.5"):
        Scheme("odd", (Stage(0, 1.0, 0.0), Stage(1, 0.5, 0.0)), 1, "test").check()


def test_unknown_names_list_near_matches():
    with pytest.raises(ValueError, match=r"'stang' is not known; did you mean 'strang'"):
        schemes.get("stang")
    with pytest.raises(ValueError, match=r"operators: got 1"):
        schemes.get("lie", operators=1)
