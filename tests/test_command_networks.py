"""The commands evaluate, audit and diagnose for networks that are not those of runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from odeadv import cli, data, models
from odeadv.data import to_float
from odeadv.evaluation import Evaluation, evaluate

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))

    def forward(self, x):
        return {"logits": self.net(x)}


def plain():
    return Net().net


def answer():
    return 42
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return the name of a module in the current folder."""
    name = f"networks_of_{tmp_path.name}"  # a new name for each test, because imports are cached
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"2.weight": torch.randn(10, 48, generator=generator), "2.bias": torch.zeros(10)}


def test_evaluate_prints_a_table_and_writes_json(module, tmp_path, capsys):
    """The command prints the figures of the same network evaluated from Python."""
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights().items()}}, "w.pt")
    save_file(weights(), "w.safetensors")
    arguments = ["evaluate", f"{module}:plain", "--dataset", "digits", "--images", "20", "--protocol", "table1"]
    for file in ("w.pt", "w.safetensors"):
        assert cli.main([*arguments, "--weights", file, "--out", f"{file}.json"]) == 0
        printed = capsys.readouterr().out
        assert "right under every attack (worst case)" in printed
    written = [json.loads((tmp_path / f"{file}.json").read_text()) for file in ("w.pt", "w.safetensors")]
    net = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10))
    net.load_state_dict(weights())
    test = data.load("digits").subset(None, 20)
    expected = evaluate(net, (to_float(test.test_images), test.test_labels), "table1")
    for found in map(Evaluation.from_dict, written):
        assert found.model == expected.model
        assert found.data == expected.data
        assert torch.equal(found.worst_case_outcomes, expected.worst_case_outcomes)
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 20


def test_audit_of_an_l2_ball(module, tmp_path, capsys):
    arguments = [
        "audit",
        f"{module}:Net",
        "--output",
        "logits",
        "--dataset",
        "digits",
        "--images",
        "10",
        "--norm",
        "l2",
    ]
    status = cli.main([*arguments, "--eps", "1.5", "--surrogate", f"{module}:Net", "--out", "page"])
    found = json.loads((tmp_path / "page" / "audit.json").read_text())
    assert status == (0 if found["passed"] else 1)
    assert (found["norm"], found["eps"], found["eps_255"]) == ("l2", 1.5, None)
    printed = capsys.readouterr().out
    assert "eps = 1.5 in L2" in printed
    assert "/255" not in printed
    page = (tmp_path / "page" / "audit.md").read_text()
    assert f"{module}:Net, digits, the first test images" in page


def test_networks_of_the_package(tmp_path, monkeypatch, capsys):
    """The commands take their names, evaluate on their own images, and write next to nothing else."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "digits-pgd", "--images", "30", "--json"]) == 0
    images = data.load("digits").resized(16).subset(None, 30)
    expected = evaluate(models.pretrained("digits-pgd"), images, "table2")
    assert json.loads(capsys.readouterr().out)["attacks"] == json.loads(json.dumps(expected.to_dict()))["attacks"]
    assert cli.main(["audit", "digits-pgd", "--surrogate", "digits-natural", "--images", "10"]) == 0
    assert "to IFGSM-20" in capsys.readouterr().out
    assert cli.main(["diagnose", "digits-pgd-lad-sm", "--other", "digits-pgd", "--images", "4"]) == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert found == {"digits-pgd/audit", "digits-pgd-lad-sm/diagnostics"}
    assert cli.main(["audit", "digits-pgd", "--dataset", "digits"]) == 2
    assert "digits-pgd, which has its own" in capsys.readouterr().err
    assert cli.main(["evaluate", "digits-pdg"]) == 2
    assert "or one of cifar10-natural" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}:plain"], "dataset: missing for"),
        (["{}:answer", "--dataset", "digits"], "returned int, expected a torch.nn.Module"),
        (["{}:nothing", "--dataset", "digits"], "lacks nothing, expected a network or a function"),
        (["{}_:plain", "--dataset", "digits"], "cannot be imported (No module named"),
        (["{}:plain", "--dataset", "digits", "--weights", "{}.py"], "cannot be read as a file of tensors"),
        (["{}:plain", "--dataset", "digits", "--weights", "nothing.pt"], "weights: nothing.pt is not a file"),
        (["{}:Net", "--dataset", "digits", "--weights", "w.pt"], "weights: w.pt does not fit"),
        (
            ["{}:Net", "--dataset", "digits", "--images", "5"],
            "returned dict, expected a floating tensor of logits",
        ),
        (["nothing", "--dataset", "digits"], "weights, dataset: got one for nothing, which has its own"),
    ],
)
def test_errors_are_one_line(module, arguments, message, capsys):
    torch.save(weights(), "w.pt")
    assert cli.main(["evaluate", *(text.format(module) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
