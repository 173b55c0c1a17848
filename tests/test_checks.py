"""Arguments that mean the same are read alike, and messages have one wording."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

import odeadv
from odeadv import attacks, data, models
from odeadv.data import Batches
from odeadv.support.checks import choice, did_you_mean, integer, number, shown
from odeadv.training import Layerwise, Pgd
from tests.helpers import seeded

NET = models.preact_resnet(depth=8, width=4, num_classes=3, generator=seeded()).eval()
IMAGES, LABELS = torch.rand(2, 3, 8, 8, generator=seeded()), torch.tensor([0, 1])
FIELD = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), 0.1)
X0 = torch.ones(2)
PIXELS, CLASSES = torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])


def solve(**how: object) -> object:
    return odeadv.solve(FIELD, X0, (0.0, 1.0), **{"steps": 2, **how})


def dataset() -> data.ImageDataset:
    kinds = {"num_classes": 3, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    return data.ImageDataset("pixels", PIXELS, CLASSES, PIXELS, CLASSES, **kinds)


INTEGERS: dict[str, tuple[str, Callable[[object], object]]] = {
    "solve": ("steps", lambda n: solve(steps=n)),
    "sweeps": ("sweeps", lambda n: solve(sweeps=n)),
    "ascent": ("ascent", lambda n: solve(ascent=n)),
    "checkpoints": ("checkpoints", lambda n: solve(checkpoints=n)),
    "nested": ("steps", lambda n: odeadv.Nested(steps=n)),
    "adaptive": ("most", lambda n: odeadv.Adaptive(most=n)),
    "converge": ("most", lambda n: odeadv.Converge(most=n)),
    "pgd": ("steps", lambda n: attacks.pgd(NET, IMAGES, LABELS, eps=0.1, steps=n)),
    "restarts": ("restarts", lambda n: attacks.pgd(NET, IMAGES, LABELS, eps=0.1, steps=1, restarts=n)),
    "eot": ("eot", lambda n: attacks.fgsm(NET, IMAGES, LABELS, eps=0.1, eot=n)),
    "square": ("queries", lambda n: attacks.square(NET, IMAGES, LABELS, eps=0.1, queries=n, generator=seeded())),
    "evaluate": ("batch_size", lambda n: odeadv.evaluate(NET, (IMAGES, LABELS), protocol="table1", batch_size=n)),
    "batches": ("batch_size", lambda n: Batches(PIXELS, CLASSES, batch_size=n, generator=seeded())),
    "network": ("width", lambda n: models.preact_resnet(depth=8, width=n)),
    "objective": ("steps", lambda n: Pgd(steps=n)),
    "defence": ("ascent", lambda n: Layerwise("lie", eta=1.0, ascent=n)),
}


@pytest.mark.parametrize(("name", "call"), INTEGERS.values(), ids=list(INTEGERS))
@pytest.mark.parametrize("value", [True, 2.0, np.float64(2.0), [2], None, torch.tensor(2)])
def test_what_is_not_an_integer_is_a_type_error(name, call, value):
    if value is None and name in ("steps", "sweeps", "ascent", "checkpoints", "queries", "batch_size"):
        return  # None means: not given
    with pytest.raises(TypeError, match=rf"^{name}: got .*, expected an integer") as caught:
        call(value)
    assert re.match(rf"{name}: got {re.escape(shown(value))}, expected", str(caught.value))


@pytest.mark.parametrize(("name", "call"), INTEGERS.values(), ids=list(INTEGERS))
@pytest.mark.parametrize("value", [0, -3, np.int64(-1)])
def test_an_integer_out_of_range_is_a_value_error(name, call, value):
    with pytest.raises(ValueError, match=rf"^{name}: got {int(value)}, expected an integer, at least \d"):
        call(value)


@pytest.mark.parametrize(("name", "call"), INTEGERS.values(), ids=list(INTEGERS))
def test_numpy_integers_are_integers(name, call):
    assert call(np.int32(2)) is not None


def test_numbers():
    for value in (1, 1.5, np.float32(1.5), np.int64(2), torch.tensor(0.5)):
        assert number("eta", value) == float(value)
    for value in (True, "1", b"1", None, [1.0], torch.ones(2), 1j):
        with pytest.raises(TypeError, match=r"^eta: got .*, expected a number"):
            number("eta", value)
    with pytest.raises(TypeError, match="requires a gradient"):
        number("eta", torch.tensor(1.0, requires_grad=True))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^eta: got (nan|inf), expected a finite number"):
            number("eta", value)
    with pytest.raises(ValueError, match=r"^eps: got -1, expected a finite number, at least 0, at most 1$"):
        number("eps", -1, least=0, most=1)
    with pytest.raises(ValueError, match=r"^dt: got 0, expected a finite number, above 0$"):
        number("dt", 0, above=0)


def test_choices():
    assert choice("norm", "l2", ("linf", "l2")) == "l2"
    with pytest.raises(ValueError, match=r"^norm: got 'linv', expected one of 'linf', 'l2'; did you mean 'linf'\?$"):
        choice("norm", "linv", ("linf", "l2"))
    with pytest.raises(TypeError, match=r"^norm: got 2, expected one of"):
        choice("norm", 2, ("linf", "l2"))
    assert did_you_mean("Strnag", ["strang", "lie"]) == "; did you mean 'strang'?"
    assert did_you_mean("zzz", ["strang", "lie"]) == ""


def test_messages_never_print_a_whole_tensor():
    assert shown(torch.zeros(3, 4)) == "a tensor of shape (3, 4)"
    assert shown(torch.tensor(2.5)) == "2.5"
    assert len(shown(list(range(1000)))) == 80
    assert integer("n", np.uint8(3)) == 3
