"""Radii, step sizes and targets of single examples in a protocol."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from helpers import conv_net, image_batch
from torch import Tensor

from odeadv.attacks import apgd, fgsm, ifgsm, pgd
from odeadv.evaluation import AttackSpec, Evaluation, Protocol, compare, evaluate
from odeadv.support import plain

N = 11
IMAGES, _ = image_batch(n=N)
NET = conv_net().eval()
LABELS = NET(IMAGES).argmax(1)
EPS = torch.linspace(0.0, 0.3, N, dtype=torch.float64)
TARGETS = (LABELS + torch.arange(N) % 4 + 1) % 5


def right(attacked: Tensor) -> list[bool]:
    return (NET(attacked).argmax(1) == LABELS).tolist()


def following(labels: Tensor) -> Tensor:
    return (labels + 1) % 5


def test_every_example_has_its_own_radius_step_and_target() -> None:
    """The outcomes are those of attacks called with tensors, whatever the batch size."""
    l2 = {"norm": "l2"}
    specs = (
        AttackSpec("fgsm", EPS),
        AttackSpec("ifgsm", EPS.tolist(), (EPS / 3).numpy(), 4),
        AttackSpec("pgd", 0.2, 0.06, 4, options={"target": TARGETS, "start": "clean"}),
        AttackSpec("ifgsm", 10 * EPS, 3 * EPS, 4, "worst", options=l2),
        AttackSpec("apgd", 0.2, steps=4, options={"target": following, "start": "clean"}),
    )
    expected = [
        fgsm(NET, IMAGES, LABELS, eps=EPS),
        ifgsm(NET, IMAGES, LABELS, eps=EPS, alpha=EPS / 3, steps=4),
        pgd(NET, IMAGES, LABELS, eps=0.2, alpha=0.06, steps=4, target=TARGETS, start="clean"),
        ifgsm(NET, IMAGES, LABELS, eps=10 * EPS, alpha=3 * EPS, steps=4, norm="l2", keep="worst"),
        apgd(NET, IMAGES, LABELS, eps=0.2, steps=4, target=following(LABELS), start="clean"),
    ]
    for batch_size in (4, 64):
        result = evaluate(NET, (IMAGES, LABELS), Protocol("p", specs), batch_size=batch_size)
        found = [(a.worst_so_far_outcomes if a.outcomes is None else a.outcomes).tolist() for a in result.attacks]
        assert found == [right(attacked) for attacked in expected]
    assert len({tuple(row) for row in found}) > 2
    assert result.attacks[0].outcomes[0]  # its radius is 0
    assert [a.label for a in result.attacks[:3]] == [
        "fgsm at 0 to 76.5/255",
        "ifgsm-4 at 0 to 76.5/255",
        "pgd-4 at 51/255",
    ]
    assert result.attacks[3].label == "ifgsm-4 at 0 to 3 in L2 (worst so far)"
    again = Evaluation.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.attacks[0].eps == tuple(EPS.tolist())
    assert repr(again) == repr(result)
    assert all(test.only_a == test.only_b == 0 for test in compare(result, again).values())


def test_a_journal_knows_the_radii(tmp_path) -> None:
    path = tmp_path / "journal"
    evaluate(NET, (IMAGES, LABELS), AttackSpec("fgsm", EPS), resume=path)
    with pytest.raises(ValueError, match=r"resume: .* is the journal of another attacks") as error:
        evaluate(NET, (IMAGES, LABELS), AttackSpec("fgsm", EPS.flip(0)), resume=path)
    assert len(str(error.value)) < 500
    spec = AttackSpec("pgd", 0.1, options={"target": lambda labels: (labels + 1) % 5})
    with pytest.raises(ValueError, match=r"target of .* is a lambda"):
        evaluate(NET, (IMAGES, LABELS), spec, resume=tmp_path / "other")


def test_radii_in_a_file() -> None:
    data = {"name": "mine", "attacks": [{"name": "pgd", "eps": ["8/255", 0.1], "options": {"target": [1, 2]}}]}
    (spec,) = plain.from_dict(Protocol, data).attacks
    assert spec.eps == (8 / 255, 0.1)
    assert spec.options["target"] == (1, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttackSpec("pgd", [0.1, 2.0]), ValueError, r"^eps: got 2, expected at most 1"),
        (lambda: AttackSpec("pgd", [0.1, True]), TypeError, r"^eps: got True, expected a number"),
        (lambda: AttackSpec("pgd", []), ValueError, r"^eps: got no values"),
        (lambda: AttackSpec("pgd", [0.1, 0.2]), ValueError, r"^eps: got 2 values, expected 11, one per example"),
        (lambda: AttackSpec("pgd", 0.1, [0.1]), ValueError, r"^alpha: got 1 values, expected 11"),
        (lambda: AttackSpec("autoattack", [0.1]), ValueError, r"^eps: got 1 radii, expected one number"),
        (
            lambda: AttackSpec("pgd", 0.1, options={"target": 3}),
            TypeError,
            r"^target: got 3, expected 'most-likely' or",
        ),
        (
            lambda: AttackSpec("pgd", 0.1, options={"target": [0.5]}),
            TypeError,
            r"^target: got 0.5, expected an integer",
        ),
        (lambda: AttackSpec("pgd", 0.1, options={"target": "least-likly"}), ValueError, r"did you mean 'least-likely'"),
        (lambda: AttackSpec("pgd", 0.1, options={"target": [1, 2]}), ValueError, r"^target: got shape \(2,\)"),
        (
            lambda: AttackSpec("pgd", 0.1, options={"target": LABELS}),
            ValueError,
            r"^target: got the label itself for 11",
        ),
        (lambda: AttackSpec("pgd", 0.1, options={"target": Tensor.double}), TypeError, r"^target: got dtype torch.fl"),
        (lambda: AttackSpec("pgd", 0.1, options={"target": print}), TypeError, r"^target: the function returned None"),
    ],
)
def test_refusals(make: Callable[[], AttackSpec], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(NET, (IMAGES, LABELS), make())
