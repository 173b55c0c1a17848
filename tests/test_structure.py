"""States that are tuples, lists, dicts and named tuples of tensors."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import odeadv

Q, P = torch.tensor([[1.0, 0.2], [0.3, -0.4]], dtype=torch.float64), torch.tensor([0.5, -0.1], dtype=torch.float64)


class Phase(NamedTuple):
    q: Tensor
    p: Tensor


MAKERS = {
    "tuple": lambda q, p: (q, p),
    "list": lambda q, p: [q, p],
    "dict": lambda q, p: {"q": q, "p": p},
    "named tuple": Phase,
    "nested": lambda q, p: {"first": [q], "second": (p,)},
}


def leaves(state: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a state of any of the kinds."""
    first, second = state.values() if isinstance(state, dict) else state
    return (first, second) if isinstance(first, Tensor) else (first[0], second[0])


def coupled(q: Tensor, p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(t) * q * p - q**3, -p + q.mean(dim=-1)


def vector(q: Tensor, p: Tensor) -> Tensor:
    return torch.cat([q.reshape(-1), p])


def flat_f(t: Tensor, x: Tensor) -> Tensor:
    return vector(*coupled(x[:4].reshape(2, 2), x[4:], t))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("options", [{"steps": 6}, {"dt": "adaptive"}])
def test_every_kind_gives_the_bits_of_one_vector(kind: str, options: dict[str, Any]) -> None:
    make = MAKERS[kind]
    common: dict[str, Any] = {"substep": "rk4", "save_at": "steps", "dense": True}
    sol = odeadv.solve(lambda t, s: make(*coupled(*leaves(s), t)), make(Q, P), (0.0, 1.0), **options, **common)
    norm = odeadv.Adaptive(norm=lambda r: torch.stack([r[:4].reshape(2, 2).square().mean(1).max().sqrt(),
                                                       r[4:].square().mean().sqrt()]).max())  # fmt: skip
    same = odeadv.solve(flat_f, vector(Q, P), (0.0, 1.0), **(options if "steps" in options else {"dt": norm}), **common)
    assert type(sol.xs) is type(make(Q, P))
    for state, expected in ((sol.xs, same.xs), (sol([0.2, 0.9]), same([0.2, 0.9])), (sol(0.3), same(0.3))):
        q, p = leaves(state)
        assert torch.equal(q.flatten(-2), expected[..., :4])
        assert torch.equal(p, expected[..., 4:])
    assert torch.equal(sol.ts, same.ts)
    assert torch.equal(leaves(copy.deepcopy(sol).xs)[0], leaves(sol.xs)[0])
    assert ", 2, 2)" in repr(sol)


def test_an_adversarial_field_whose_loss_readout_and_costate_see_the_structure() -> None:
    def loss(s: Phase) -> Tensor:
        return s.q.square().sum() + s.p.sum()

    f = lambda t, s: Phase(*coupled(*s, t))  # noqa: E731
    running = {"running": lambda t, s: s.p.square().sum(), "at": {0.5: lambda s: s.q.sum()}}
    field = odeadv.AdversarialField(f, loss, 0.1, x0=Phase(Q, P), t_span=(0.0, 1.0), steps=4, **running)
    flat = odeadv.AdversarialField(
        flat_f, lambda x: x[:4].square().sum() + x[4:].sum(), 0.1,
        running=lambda t, x: x[4:].square().sum(), at={0.5: lambda x: x[:4].sum()},
    )  # fmt: skip
    options: dict[str, Any] = {"scheme": "strang", "costate": "hermite", "sweeps": 2}
    sol, same = odeadv.solve(field, **options), odeadv.solve(flat, vector(Q, P), (0.0, 1.0), steps=4, **options)
    assert isinstance(sol.xs, Phase)
    assert torch.equal(vector(*sol.output), same.xs[-1])
    assert torch.allclose(sol.loss, same.loss, rtol=1e-14)
    assert torch.equal(vector(*sol.costate(0.3)), same.costate(0.3))
    assert torch.equal(vector(*sol.costate.nodes[2]), same.costate.nodes[2])
    read = odeadv.AdversarialField(f, lambda y: y.square(), 0.1, readout=lambda s: s.p.sum())
    assert odeadv.solve(read, Phase(Q, P), (0.0, 1.0), steps=4).output.ndim == 0
    again = odeadv.solve(odeadv.AdversarialField(f, loss, 0.1).driven_by(sol.costate), Phase(Q, P), (0.0, 1.0), steps=4)
    assert isinstance(again.xs, Phase)
    shifted = odeadv.AdversarialField(f, loss, 0.1).transformed(lambda nodes: [Phase(s.q, 0 * s.p) for s in nodes])
    assert odeadv.solve(shifted, Phase(Q, P), (0.0, 1.0), steps=4).costate(0.3).p.abs().max() == 0.0


def test_kick_and_drift_of_a_hamiltonian_and_exact_flows() -> None:
    """None means a derivative that is zero; Stormer-Verlet keeps the energy to second order over a long time."""
    drift = odeadv.Operator(
        lambda t, s: {"q": s["p"], "p": None}, flow=lambda t, dt, s: {"q": s["q"] + dt * s["p"], "p": s["p"]}
    )
    field = odeadv.SplitField(drift=drift, kick=lambda t, s: {"q": None, "p": -torch.sin(s["q"])})
    start = {"q": torch.tensor([1.0], dtype=torch.float64), "p": torch.tensor([0.0], dtype=torch.float64)}
    sol = odeadv.solve(
        field, start, (0.0, 20.0), steps=200, substep={"drift": "exact", "kick": "midpoint"}, save_at="steps"
    )
    energy = 0.5 * sol.xs["p"] ** 2 - torch.cos(sol.xs["q"])
    assert float((energy - energy[0]).abs().max()) < 2e-3


def test_gradients_and_implicit_sub_steps() -> None:
    net = nn.Linear(2, 2).double()
    q, p = Q.clone().requires_grad_(), P.clone().requires_grad_()

    def end(q: Tensor, p: Tensor) -> Tensor:
        sol = odeadv.solve(lambda t, s: (torch.tanh(net(s[0])), -s[1]), (q, p), (0.0, 1.0), steps=3, substep="sdirk2")
        return sol.xs[0][-1].sum() * sol.xs[1][-1].sum()

    assert torch.autograd.gradcheck(end, (q, p))
    assert len(torch.autograd.grad(end(q, p), net.parameters())) == 2


@pytest.mark.parametrize(
    ("error", "x0", "options", "message"),
    [
        (TypeError, (Q, 1.0), {}, r"^x0\[1\]: got float, expected a tensor, or a tuple, list or dict"),
        (ValueError, (Q, P.float()), {}, r"^x0\[1\]: got torch.float32 on cpu, expected torch.float64 .* x0\[0\]"),
        (ValueError, (), {}, r"^x0: got a structure without tensors"),
        (ValueError, {"q": Q / 0}, {}, r"^x0: contains NaN or infinite values"),
        (
            ValueError,
            (Q, P),
            {"dt": "adaptive", "rtol": torch.ones(6)},
            r"^rtol: got a tensor of shape \(6,\), expected a",
        ),
    ],
)
def test_states_that_do_not_fit(error: type[Exception], x0: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        odeadv.solve(lambda t, s: s, x0, (0.0, 1.0), **(options or {"steps": 2}))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda s: {"q": s["q"]}, TypeError, r"^f: returned dict of 'q', expected dict of 'q', 'p', like the state"),
        (lambda s: s["q"], TypeError, r"^f: returned Tensor, expected dict of"),
        (lambda s: (s["q"], s["p"]), TypeError, r"^f: returned tuple of 0, 1, expected dict of"),
        (lambda s: {"q": s["q"][0], "p": s["p"]}, ValueError, r"^f\['q'\]: returned shape \(2,\) for a state of shape"),
        (lambda s: {"q": s["q"].add_(1.0), "p": s["p"]}, ValueError, r"^f: modifies the state in place"),
    ],
)
def test_values_that_do_not_fit(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeadv.solve(lambda t, s: value(s), {"q": Q, "p": P}, (0.0, 1.0), steps=2)


def test_fields_that_need_one_tensor() -> None:
    field = odeadv.AdversarialField(lambda t, s: s, lambda s: s[0].sum(), torch.ones(2))
    with pytest.raises(ValueError, match=r"^eta: got a tensor of shape \(2,\) for a state of several tensors"):
        odeadv.solve(field, (Q, P), (0.0, 1.0), steps=2)
    with pytest.raises(TypeError, match=r"^x0: got tuple, expected a tensor"):
        odeadv.driven(field, (Q, P), (0.0, 1.0), steps=2)
    newton = odeadv.Operator(lambda t, s: s, solve=odeadv.Newton(samples=0))
    with pytest.raises(ValueError, match=r"^solve: got Newton\(samples="):
        odeadv.solve(newton, (Q, P), (0.0, 1.0), steps=2, substep="sdirk2")


@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_a_time_span_per_sample_by_rescaling_time(eta: float) -> None:
    spans, x0 = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.eye(3, dtype=torch.float64)

    def f(t: Tensor, x: Tensor) -> Tensor:
        return torch.cos(t)[..., None] * x - 0.1 * x**3

    field = odeadv.AdversarialField(
        lambda s, x: spans[:, None] * f(spans * s, x), lambda x: x.square().sum(), eta * spans if eta else 0.0
    )
    sol = odeadv.solve(field, x0, (0.0, 1.0), scheme="strang", steps=4)
    for end, start, span in zip(sol.xs[-1], x0, spans.tolist(), strict=True):
        alone = odeadv.AdversarialField(lambda t, x: f(t[None], x[None])[0], lambda x: x.square().sum(), eta)
        expected = odeadv.solve(alone, start, (0.0, span), scheme="strang", steps=4).xs[-1]
        assert torch.allclose(end, expected, rtol=1e-12)
