"""Properties that hold whatever the problem: hypothesis chooses it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import odeadv
from benchmarks._expm import matrix_exp

pytestmark = pytest.mark.filterwarnings("ignore::odeadv.AccuracyWarning")

SCHEMES = odeadv.schemes.names()
PALINDROMIC = [name for name in SCHEMES if odeadv.schemes.get(name).symmetric]
numbers = st.floats(-1.0, 1.0, allow_nan=False, width=32)
matrices = st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=2, max_size=2)
states = st.lists(numbers, min_size=2, max_size=2)


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear(m: Tensor) -> odeadv.Operator:
    return odeadv.Operator(lambda t, x: m @ x, flow=lambda t, dt, x: matrix_exp(m * dt) @ x)


@settings(deadline=None, max_examples=40)
@given(a=matrices, b=matrices, x0=states, scheme=st.sampled_from(PALINDROMIC), start=numbers, steps=st.integers(1, 5))
def test_palindromic_schemes_retrace_their_steps(a, b, x0, scheme, start, steps):
    field = odeadv.SplitField(a=linear(tensor(a)), b=linear(tensor(b)))
    x0 = tensor(x0)
    there = odeadv.solve(field, x0, (start, start + 0.5), scheme=scheme, steps=steps, substep="exact").xs[-1]
    back = odeadv.solve(field, there, (start + 0.5, start), scheme=scheme, steps=steps, substep="exact").xs[-1]
    assert torch.allclose(back, x0, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(a=matrices, b=matrices, x0=states, scheme=st.sampled_from(SCHEMES), shift=st.floats(-3, 3, width=32))
def test_autonomous_fields_do_not_know_the_time(a, b, x0, scheme, shift):
    field = odeadv.SplitField(a=linear(tensor(a)), b=linear(tensor(b)))
    here = odeadv.solve(field, tensor(x0), (0.0, 0.5), scheme=scheme, steps=4, substep="rk4").xs[-1]
    later = odeadv.solve(field, tensor(x0), (shift, shift + 0.5), scheme=scheme, steps=4, substep="rk4").xs[-1]
    assert torch.allclose(here, later, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(p=numbers, q=numbers, r=numbers, x0=states, scheme=st.sampled_from(odeadv.schemes.names(3)))
def test_operators_that_commute_may_come_in_any_order_and_by_any_name(p, q, r, x0, scheme):
    def scaled(factor: float) -> odeadv.Operator:
        return odeadv.Operator(lambda t, x: factor * x, flow=lambda t, dt, x: x * torch.exp(factor * dt))

    one = odeadv.SplitField(a=scaled(p), b=scaled(q), c=scaled(r))
    other = odeadv.SplitField(z=scaled(r), y=scaled(p), x=scaled(q))
    ends = [
        odeadv.solve(field, tensor(x0), (0.0, 1.0), scheme=scheme, steps=3, substep="exact").xs[-1]
        for field in (one, other)
    ]
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-12)
    order = odeadv.schemes.get(scheme, 3)
    if not order.mixture:  # with commuting operators every composition is exact
        assert torch.allclose(ends[0], tensor(x0) * math.exp(p + q + r), rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(
    a=matrices,
    x0=states,
    scheme=st.sampled_from(SCHEMES),
    substep=st.sampled_from(["euler", "midpoint", "heun", "rk4"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    span=st.sampled_from([(0.0, 1.0), (1.0, 0.0), (-0.3, 0.4)]),
)
def test_eta_zero_is_bitwise_the_unsplit_solve(a, x0, scheme, substep, dtype, span):
    m, start = tensor(a).to(dtype), tensor(x0).to(dtype)

    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(m @ x) * torch.cos(t)

    field = odeadv.AdversarialField(f, lambda x: (x**2).sum(), eta=0.0)
    plain = odeadv.solve(f, start, span, scheme=substep, steps=3).xs[-1]
    assert torch.equal(plain, odeadv.solve(field, start, span, scheme=scheme, substep=substep, steps=3).xs[-1])


@settings(deadline=None, max_examples=30)
@given(
    a=matrices, x0=states, eta=st.floats(0.0, 1.0, width=32), scheme=st.sampled_from(SCHEMES), sweeps=st.integers(1, 3)
)
def test_a_linear_problem_is_linear_in_its_initial_state(a, x0, eta, scheme, sweeps):
    m = tensor(a)

    def end(start: Tensor) -> Tensor:
        field = odeadv.AdversarialField(lambda t, x: m @ x, lambda x: 0.5 * (x**2).sum(), eta=eta)
        return odeadv.solve(field, start, (0.0, 0.5), scheme=scheme, steps=3, sweeps=sweeps).xs[-1]

    start = tensor(x0)
    assert torch.allclose(end(3.0 * start), 3.0 * end(start), rtol=1e-10, atol=1e-12)
