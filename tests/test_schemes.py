"""Compositions as data: weights, orders in high precision, symmetry, adjoints, names."""

import functools
import random

import mpmath
import pytest
import torch

import odeadv
from odeadv import Scheme, Stage, schemes

ALL = [(name, operators) for operators in (2, 3) for name in schemes.names(operators)]


@functools.cache
def non_commuting(operators: int) -> tuple[mpmath.matrix, ...]:
    """Random 3x3 matrices, whose brackets up to order 9 satisfy no accidental identity."""
    draw = random.Random(operators)
    return tuple(mpmath.matrix(3, 3).apply(lambda _: mpmath.mpf(draw.uniform(-1, 1))) for _ in range(operators))


def exponential(m: mpmath.matrix) -> mpmath.matrix:
    term = total = mpmath.eye(3)
    for k in range(1, 40):
        term = term * m / k
        total = total + term
    return total


def one_step_error(scheme: Scheme, h: mpmath.mpf) -> mpmath.mpf:
    matrices = non_commuting(scheme.operators)
    mixed = mpmath.zeros(3)
    for factor, stages in scheme.compositions:
        product = mpmath.eye(3)
        for stage in stages:
            product = exponential(matrices[stage.operator] * (h * stage.weight)) * product
        mixed += product * factor
    return mpmath.mnorm(mixed - exponential(sum(matrices[1:], start=matrices[0]) * h), "f")


@pytest.mark.parametrize(("name", "operators"), ALL)
@pytest.mark.parametrize("adjoint", [False, True])
def test_order_in_high_precision_on_non_commuting_operators(name, operators, adjoint):
    scheme = schemes.get(name, operators)
    scheme = scheme.adjoint() if adjoint else scheme
    with mpmath.workdps(40):
        # Factors of a mixture are rounded to float64, which ends the eighth order at larger steps.
        halvings = {1: 7, 2: 7, 3: 6, 4: 5, 6: 4, 8: 2 if scheme.mixture else 3}[scheme.order]
        h = mpmath.mpf(2) ** -halvings
        slope = mpmath.log(one_step_error(scheme, h) / one_step_error(scheme, h / 2), 2)
    assert float(slope) - 1 == pytest.approx(scheme.order, abs=0.1)


@pytest.mark.parametrize(("name", "operators"), [*ALL, *((name, 5) for name in schemes.names(5))])
def test_every_scheme_is_consistent(name, operators):
    scheme = schemes.get(name, operators)
    scheme.check()
    assert scheme.name == name
    assert scheme.operators == operators
    assert name in str(scheme)
    assert scheme.source in str(scheme)
    assert not (scheme.mixture and scheme.symmetric)
    scheme.adjoint().check()
    twice = scheme.adjoint().adjoint()
    assert twice.name == name
    for (factor, stages), (same_factor, same_stages) in zip(twice.compositions, scheme.compositions, strict=True):
        assert factor == same_factor
        for stage, same in zip(stages, same_stages, strict=True):
            assert (stage.operator, stage.weight, stage.frozen) == (same.operator, same.weight, same.frozen)
            assert stage.start == pytest.approx(same.start, abs=1e-14)


@pytest.mark.parametrize(("name", "operators"), ALL)
def test_every_operator_keeps_its_own_clock(name, operators):
    """Running clocks follow one another from 0 to 1 without a gap, the condition for time-dependent operators."""
    for _, stages in schemes.get(name, operators).compositions:
        for operator in range(operators):
            own = [stage for stage in stages if stage.operator == operator and not stage.frozen]
            acted = 0.0
            for stage in own:
                assert stage.start == pytest.approx(acted, abs=1e-13)
                acted += stage.weight
            assert acted == pytest.approx(1.0 if own else 0.0, abs=1e-13)


def test_extrapolation_never_goes_back_and_negative_weights_are_known():
    assert all(schemes.get(f"extrapolated-strang{order}").goes_back == () for order in (4, 6, 8))
    assert schemes.get("strang").goes_back == ()
    assert schemes.get("yoshida4").goes_back == (0, 1)
    assert schemes.triple_jump(8).order == schemes.suzuki(8, operators=3).order == 8
    with pytest.raises(ValueError, match=r"^order: got 5, expected an even number"):
        schemes.suzuki(5)


@pytest.mark.parametrize(
    ("name", "order", "symmetric"),
    [
        ("lie", 1, False),
        ("strang", 2, True),
        ("strang-midpoint", 2, True),
        ("strang-symmetric", 2, True),
        ("best22", 2, False),
        ("mclachlan2", 2, True),
        ("aks3", 3, False),
        ("blanes-moan6", 6, True),
        ("kahan-li8", 8, True),
    ],
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


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"weights of operator 1 in 'odd' sum to 0\.5"):
        Scheme("odd", (Stage(0, 1.0, 0.0), Stage(1, 0.5, 0.0)), 1, "test").check()
    with pytest.raises(ValueError, match=r"'negative' has a stage of a negative operator"):
        Scheme("negative", (Stage(0, 1.0, 0.0), Stage(-1, 1.0, 0.0)), 1, "test").check()


def test_unknown_names_list_near_matches():
    with pytest.raises(ValueError, match=r"got 'stang', expected one of lie, .*; did you mean 'strang'"):
        schemes.get("stang")
    with pytest.raises(ValueError, match=r"operators: got 1"):
        schemes.get("lie", operators=1)
    with pytest.raises(ValueError, match=r"^scheme: 'ruth3' is a table for 2 operators, the field has 3; .*'yoshida4'"):
        schemes.get("ruth3", operators=3)


def test_a_scheme_is_a_table_or_a_mixture_of_tables():
    table = (Stage(0, 1.0, 0.0), Stage(1, 1.0, 0.0))
    with pytest.raises(ValueError, match=r"^stages: 'none' needs either stages or a mixture"):
        Scheme("none", (), 1, "test")
    with pytest.raises(ValueError, match=r"factors of the mixture 'half' do not sum to 1"):
        Scheme("half", (), 1, "test", mixture=((0.5, table),)).check()


# ---- names for operators ----


def test_complex_weights_are_refused_with_what_there_is_instead():
    with pytest.raises(TypeError, match=r"^weight: got \(0\.5\+0\.3j\), expected a real number; .*extrapolated_strang"):
        Stage(0, 0.5 + 0.3j)
    with pytest.raises(TypeError, match=r"^start: got None, expected a real number$"):
        Stage(0, 0.5, None)


NAMED = Scheme("mine", (Stage("wave", 0.5), Stage("decay", 1.0), Stage("wave", 0.5)), 2, "test")


def test_stages_may_name_their_operators_and_leave_out_their_clocks():
    assert NAMED.stages == (Stage("wave", 0.5, 0.0), Stage("decay", 1.0, 0.0), Stage("wave", 0.5, 0.5))
    NAMED.check()
    assert (NAMED.operators, NAMED.symmetric, NAMED.goes_back) == (2, True, ())
    assert NAMED.adjoint().stages == NAMED.stages
    assert NAMED.numbered(["decay", "wave"]).stages == schemes.get("strang").stages
    assert NAMED.numbered(["wave", "decay"]).stages == (Stage(0, 0.5, 0.0), Stage(1, 1.0, 0.0), Stage(0, 0.5, 0.5))
    assert Scheme("back", (Stage("a", 1.0), Stage("b", 2.0), Stage("b", -1.0)), 1, "test").goes_back == ("b",)
    numbers = Scheme("numbers", [Stage(1, 0.5), Stage(0, 1.0), Stage(1, 0.5)], 2, "test")
    assert numbers.stages == schemes.get("strang").stages


@pytest.mark.parametrize("mixed", [False, True])
def test_a_named_scheme_solves_the_field_with_these_names(mixed):
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    x0 = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def wave(t, x):
        return torch.cos(t) * (a @ x)

    def decay(t, x):
        return -t * x

    scheme = NAMED
    if mixed:
        other = tuple(Stage({"wave": "decay", "decay": "wave"}[s.operator], s.weight) for s in NAMED.stages)
        scheme = Scheme("both", (), 2, "test", mixture=((0.5, NAMED.stages), (0.5, other)))
    by_name = schemes.get("averaged-strang" if mixed else "strang")
    for operators in ({"decay": decay, "wave": wave}, {"wave": wave, "decay": decay}):
        found = odeadv.solve(
            odeadv.SplitField(**operators), x0, (0.0, 1.0), scheme=scheme, steps=4, substep="midpoint"
        ).xs
        expected = odeadv.solve(
            odeadv.SplitField(decay=decay, wave=wave), x0, (0.0, 1.0), scheme=by_name, steps=4, substep="midpoint"
        ).xs
        assert torch.allclose(found, expected, rtol=1e-14, atol=0) if mixed else torch.equal(found, expected)
    pair = odeadv.SplitField(outer=odeadv.SplitField(wave=wave, decay=decay), rest=lambda t, x: 0.1 * x)
    ends = [
        odeadv.solve(pair, x0, (0.0, 1.0), steps=2, substep={"outer": odeadv.Nested(inner), "rest": "midpoint"}).xs
        for inner in (NAMED, NAMED.numbered(["wave", "decay"]))
    ]
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NAMED.numbered(["waves", "decay"]),
            r"^scheme: 'mine' has a stage of 'wave', but the field has 'waves', 'decay'; did you mean 'waves'\?",
        ),
        (
            lambda: NAMED.numbered(["wave", "decay", "noise"]),
            r"^scheme: 'mine' lacks a stage of 'noise', but the field has 'wave', 'decay', 'noise'",
        ),
        (
            lambda: odeadv.solve(odeadv.SplitField(a=min, b=min), scheme=NAMED),
            r"^scheme: 'mine' has a stage of 'wave', but the field has 'a', 'b'; name the stages",
        ),
        (
            lambda: Scheme("x", (Stage("a", 1.0), Stage(1, 1.0)), 1, "test"),
            r"^stages: 'x' has names for some operators and numbers for others",
        ),
        (
            lambda: Scheme("x", (Stage("a", 1.0), Stage("b", 1.0, frozen=True)), 1, "test"),
            r"^start: a stage of 'b' in 'x' is frozen and needs one",
        ),
        (
            lambda: Scheme("x", (Stage("a", 1.0), Stage("b", 0.5)), 1, "test").check(),
            r"^scheme: the weights of operator 'b' in 'x' sum to 0\.5",
        ),
    ],
)
def test_names_that_do_not_fit_are_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_table_can_show_the_names_of_a_field():
    field = odeadv.SplitField(reaction=min, diffusion=min)
    table = schemes.get("strang").table(field).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["diffusion", "reaction", "diffusion"]
    assert len({line.index("0.5 ") for line in table[2:5:2]}) == 1
    assert schemes.get("strang").table(["reaction", "diffusion"]).splitlines() == table
    assert [line.split()[0] for line in str(NAMED).splitlines()[2:]] == ["wave", "decay", "wave"]
    with pytest.raises(ValueError, match=r"^scheme: 'strang' splits 2 operators, the field has 1 \(f\)"):
        schemes.get("strang").table(["f"])
    mixed = schemes.get("averaged-strang")
    assert mixed.stages == ()
    assert ".compositions" in repr(mixed)
    assert repr(schemes.get("strang")) == "Scheme('strang', order 2, 2 operators, 3 stages)"
