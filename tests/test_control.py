"""Learning and control: eta as a tensor, running costs and losses at several times, spans with gradients."""

import pytest
import torch
from torch import Tensor

import odeadv

G = torch.Generator().manual_seed(0)
A = torch.randn(3, 3, dtype=torch.float64, generator=G)
BATCH = torch.randn(4, 3, dtype=torch.float64, generator=G)


def f(t: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ A) * torch.cos(t)


def squared(x: Tensor) -> Tensor:
    return (x**2).sum()


# ---- eta as a tensor ----

VARIANTS = [
    {},
    {"scheme": "strang-midpoint"},
    {"scheme": "rk4", "costate": "hermite"},
    {"sweeps": 2, "differentiate_costate": True},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_by_eta_are_those_of_finite_differences(options):
    def loss(eta: float | Tensor) -> Tensor:
        field = odeadv.AdversarialField(f, squared, eta)
        return odeadv.solve(field, BATCH, (0.0, 1.0), steps=3, **options).loss

    number = loss(0.3)
    for shape in ((), (4,), (1, 3)):
        eta = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        assert torch.allclose(loss(eta), number, rtol=1e-12)
        assert torch.autograd.gradcheck(loss, (eta,))
    assert torch.func.grad(loss)(torch.tensor(0.3, dtype=torch.float64)) > 0.0


def test_each_sample_has_its_eta():
    etas = [0.0, 0.1, 0.2, 0.5]
    together = odeadv.solve(odeadv.AdversarialField(f, squared, torch.tensor(etas)), BATCH, (0.0, 1.0), steps=3)
    assert together.xs.dtype == torch.float64
    for n, eta in enumerate(etas):
        alone = odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH[n : n + 1], (0.0, 1.0), steps=3)
        assert torch.allclose(together.xs[-1, n], alone.xs[-1, 0], rtol=1e-6)  # eta is in float32
    adaptive = odeadv.AdversarialField(f, squared, torch.tensor(etas))
    assert odeadv.solve(adaptive, BATCH, (0.0, 0.2), dt="adaptive", substep="midpoint", rtol=1e-2).xs.shape[1:] == (
        4,
        3,
    )


def test_eta_zero_that_is_learned_has_a_gradient():
    eta = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH, (0.0, 1.0), steps=3).loss.backward()
    assert eta.grad > 0.0


@pytest.mark.parametrize(
    ("eta", "error", "message"),
    [
        (
            torch.ones(3),
            ValueError,
            r"^eta: got shape \(3,\) for a state of shape \(4, 3\), expected the sizes of its lead",
        ),
        (torch.ones(4, 3, 1), ValueError, r"^eta: got shape \(4, 3, 1\)"),
        (torch.full((4,), torch.inf), ValueError, r"^eta: contains NaN or infinite values"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"^eta: got a tensor of torch\.int64"),
    ],
)
def test_an_eta_that_does_not_fit(eta, error, message):
    with pytest.raises(error, match=message):
        odeadv.solve(odeadv.AdversarialField(f, squared, eta), BATCH, (0.0, 1.0), steps=3)


def test_diagnostics_take_one_eta():
    def drift(eta: float | Tensor) -> float:
        field = odeadv.AdversarialField(f, squared, eta)
        return odeadv.diagnostics.hamiltonian(field, BATCH, (0.0, 1.0), steps=2).drift

    assert drift(torch.tensor(0.25, requires_grad=True)) == drift(0.25)
    with pytest.raises(ValueError, match=r"^eta: got a tensor of shape \(4,\), expected one number for diagnostics"):
        drift(torch.ones(4))
