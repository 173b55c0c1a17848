"""The benchmark suite: every benchmark at its smallest size, pages from JSON alone, comparison of two runs."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers import COMPILES

import odeadv
from benchmarks import __main__ as command
from benchmarks import (
    _compare,
    _jax_resnet,
    _memory,
    _peers,
    _precision,
    _timing,
    evaluation,
    fisher_kpp,
    limits,
    orders,
    stiff,
    work_precision,
)

HERE = (
    "overhead",
    pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILES, reason="needs torch 2.13")]),
    "orders",
    "gradients",
    "work_precision",
    "converged",
    "fisher_kpp",
    "stiff",
    "recording",
    "training_step",
    "own_network",
    pytest.param("evaluation", marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def _without_jax(monkeypatch):
    """Leave diffrax out. Compiling in jax takes longer than everything else; a separate test below compiles."""
    for module in (_peers, fisher_kpp, stiff, work_precision):
        monkeypatch.setattr(module, "has_diffrax", lambda: False)


@pytest.fixture(autouse=True)
def _without_other_attacks(monkeypatch, tmp_path):
    """Take the digits, whose networks are trained in seconds; other tests compare with the other libraries."""
    monkeypatch.setenv("ODEADV_DATA", str(tmp_path))
    monkeypatch.setattr(evaluation, "FOLDER", tmp_path)
    monkeypatch.setattr(evaluation, "PEERS", {})


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """Return a folder with quick runs of the cheap benchmarks; each has its own test."""
    return tmp_path_factory.mktemp("benchmarks")


def run(name: str, out: Path) -> dict:
    path = out / f"{name}.json"
    if not path.exists():
        if name == "work_precision":  # the network has a test of its own
            problems = {k: v for k, v in work_precision.PROBLEMS.items() if k != "network"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(work_precision, "PROBLEMS", problems)
                assert command.main([name, "--quick", "--threads", "1", "--out", str(out)]) == 0
        else:
            assert command.main([name, "--quick", "--threads", "1", "--out", str(out)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HERE)
def test_a_quick_run_and_its_page(name, quick, capsys):
    data = run(name, quick)
    assert data["benchmark"] == name
    assert data["quick"] is True
    assert data["took"] > 0
    assert {"processor", "cores", "threads", "torch", "python"} <= set(data["machine"])
    numbers = dict(_compare.figures(data))
    assert numbers
    assert not [key for key in numbers if key.startswith(("machine", "took", "quick"))]
    module = importlib.import_module(f"benchmarks.{name}")
    text = module.render(data)
    assert text == module.render(copy.deepcopy(data))
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert widths
    assert "nan" not in text.lower()
    if hasattr(module, "plot"):
        assert (quick / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for row in getattr(module, "limits", lambda data: [])(data):
        assert limits.line(row).count("|") == 6


def test_schemes_as_training_methods(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("lightning_fabric")
    from benchmarks import schemes_training

    chosen = {name: schemes_training.DEFENCES[name] for name in ("natural", "lie", "strang-midpoint", "lie, 2 sweeps")}
    monkeypatch.setattr(schemes_training, "DEFENCES", chosen)
    data = json.loads(json.dumps(schemes_training.run(quick=True)))
    cost = data["cost"]
    blocks = cost["natural"]["evaluations of f"]
    assert [cost[name]["recordings"] for name in chosen] == [0, 1, 1, 2]
    assert cost["lie"]["evaluations of f"] == 2 * blocks
    assert cost["lie, 2 sweeps"]["vector-Jacobian products"] == 2 * blocks
    assert all(0 <= row["IFGSM-20"]["median"] <= row["accuracy"]["high"] for row in data["results"].values())
    assert schemes_training.render(data).count("\n| ") == 2 + len(chosen)
    schemes_training.plot(data, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_the_page_follows_from_the_json(quick, tmp_path):
    run("overhead", quick)
    run("orders", quick)
    text = command.render(quick, [])
    assert (quick / "README.md").read_text(encoding="utf-8") == text == command.page(quick)
    for name in ("overhead", "orders"):
        (tmp_path / f"{name}.json").write_bytes((quick / f"{name}.json").read_bytes())
    assert command.main(["--render", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_bytes()
    bound = (tmp_path / "limits.md").read_bytes()
    assert (tmp_path / "orders.png").read_bytes() == (quick / "orders.png").read_bytes()
    command.render(tmp_path, [])
    assert page == (tmp_path / "README.md").read_bytes()
    assert bound == (tmp_path / "limits.md").read_bytes()
    assert b"A quick run" in page


# ---- orders ----


@pytest.fixture(scope="module")
def order_table() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "STEPS", orders.STEPS[:-1])  # enough for an order
        return json.loads(json.dumps(orders.run()))


def test_every_order_of_the_table_is_the_one_claimed(order_table):
    for row in order_table["table"]:
        for name in ("known", "recorded"):
            assert row["orders"][name] == pytest.approx(row["claimed"], abs=0.12), (row["scheme"], row["f"], name)


def test_strang_with_euler_substeps_is_of_first_order_with_a_smaller_constant_than_lie(order_table):
    errors = {(row["scheme"], row["f"], row["costate"]): row["errors"]["known"] for row in order_table["table"]}
    lie, strang = errors["lie", "exact", "euler"], errors["strang", "exact", "euler"]
    assert all(b < 0.9 * a for a, b in zip(lie, strang, strict=True))
    assert strang[-1] > 50 * errors["strang", "exact", "midpoint"][-1]


def test_every_scheme_has_its_order(order_table):
    for name, row in order_table["schemes"].items():
        assert row["measured"] == pytest.approx(row["order"], abs=0.25 if row["order"] > 4 else 0.12), name


def test_a_slope_is_that_of_a_power():
    assert orders.slope((2, 4, 8), [3.0 * n**-2.5 for n in (2, 4, 8)]) == pytest.approx(2.5)


# ---- the problems of the work-precision diagrams ----


def test_a_converged_costate_takes_fewer_evaluations_than_shooting():
    field, peer = work_precision._linear()
    (shooting,) = _peers.shooting_peers(peer, (7,))
    state, work = shooting.solve()
    exact = work_precision.linear_converged_form()
    assert (state - exact).abs().max() < 1e-6 * exact.abs().max()
    until = odeadv.Converge(rtol=1e-2)
    sol = odeadv.solve(field, orders.X0, (0.0, orders.END), scheme="rk4", steps=16, costate="hermite", sweeps=until)
    assert (sol.xs[-1] - exact).abs().max() < 1e-6 * exact.abs().max()
    assert sol.stats.evaluations["f"] + sol.stats.vjps < work


def test_closed_form_of_the_converged_costate_meets_both_ends():
    end = work_precision.linear_converged_form()
    field, peer = work_precision._linear()
    state, _ = _peers.shooting(_peers.torchdiffeq_ivp("dopri5", 1e-9), peer, 1e-9)
    assert torch.allclose(state, end, atol=1e-7)
    once, _ = _peers.recorded(_peers.torchdiffeq_ivp("dopri5", 1e-9), peer)
    assert torch.allclose(once, orders.closed_form()[0], atol=1e-7)
    assert not torch.allclose(once, end, atol=1e-2)
    assert field.eta == peer.eta


@pytest.mark.parametrize("name", ["rotation", "square", "decay"])
def test_flows_of_the_three_operators_solve_their_equations(name):
    operator = work_precision.OPERATORS[name]
    x = torch.tensor([[0.4, 0.7], [0.1, 0.9]], dtype=torch.float64)
    t, h = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    solved, _ = _peers.torchdiffeq_ivp("dopri5", 1e-11)(operator, x, 0.3, 0.8)
    assert torch.allclose(operator.flow(t, h, x), solved, atol=1e-9)


def test_the_first_stage_of_a_network_is_its_beginning():
    import odeadv

    net = odeadv.models.preact_resnet(14, 2, generator=torch.Generator().manual_seed(0)).eval()
    images, labels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
    field = work_precision.first_stage(net, images, labels, eta=0.0)
    sol = odeadv.solve(field, scheme="lie", dt=1.0)
    assert torch.equal(sol.output, net(images))
    assert field.problem.t_span == (0.0, 2.0)


def test_peers_count_their_evaluations_and_reach_their_tolerance():
    x0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = {}
    for candidate in _peers.torch_peers(lambda ivp: ivp(lambda t, x: -x, x0, 0.0, 1.0), (4, 8)):
        state, work = candidate.solve()
        found[candidate.solver, candidate.method, candidate.setting] = work
        tolerance = float(candidate.setting.removeprefix("tolerance "))
        assert torch.allclose(state, x0 * torch.exp(torch.tensor(-1.0)), atol=50 * tolerance, rtol=0)
    assert found["torchdiffeq", "dopri5", "tolerance 1e-8"] > found["torchdiffeq", "dopri5", "tolerance 1e-4"] > 6


@pytest.fixture
def _orders_at_once(quick, monkeypatch):
    """Let the benchmark orders return its quick run at once, for tests of the command."""
    data = run("orders", quick)
    measured = {key: value for key, value in data.items() if key not in ("benchmark", "took", "quick")}
    monkeypatch.setattr(orders, "run", lambda quick: copy.deepcopy(measured))
    monkeypatch.setattr(orders, "plot", lambda data, path: path.touch())


def points(**costs: tuple[str, float, float]) -> dict:
    return {
        name: {"solver": solver, "method": name, "setting": "", "error": error, "work": 1, "seconds": {"median": s}}
        for name, (solver, error, s) in costs.items()
    }


def test_fronts_and_the_fastest():
    some = points(a=("x", 1e-2, 1.0), b=("x", 1e-4, 2.0), c=("x", 1e-3, 3.0), d=("y", 1e-5, 9.0))
    assert _precision.front(some, "x", lambda p: p["seconds"]["median"]) == ["a", "b"]
    assert _precision.fastest(some, [1e-2, 1e-4, 1e-6]) == {
        "1e-02": {"x": "a", "y": "d"},
        "1e-04": {"x": "b", "y": "d"},
        "1e-06": {},
    }


def test_a_method_that_fails_or_diverges_is_named_and_the_rest_measured():
    def broken() -> tuple[torch.Tensor, int]:
        raise RuntimeError("underflow in dt\nand more")

    one = torch.ones(1, dtype=torch.float64)
    made = [
        _precision.Candidate("x", "good", "1", lambda: (one + 1e-3, 4)),
        _precision.Candidate("x", "bad", "1", broken),
        _precision.Candidate("x", "wild", "1", lambda: (one * torch.nan, 4)),
    ]
    data, _ = _precision.measure(made, one, 2, longest=1.0)
    assert data["failed"] == {"x bad, 1": "underflow in dt", "x wild, 1": "diverged"}
    assert data["points"]["x good, 1"]["error"] == pytest.approx(1e-3)
    assert set(data["points"]["x good, 1"]["seconds"]) == {"median", "low", "high"}


# ---- comparing ----


def test_a_changed_figure_is_flagged_and_one_within_its_spread_is_not():
    old = {"machine": {"threads": 2}, "took": 1.0, "a": {"median": 2.0, "low": 1.8, "high": 2.2}, "n": [3, 0.5], "z": 0}
    new = copy.deepcopy(old) | {"took": 9.0}
    assert not [row for row in _compare.compare(old, new) if row["changed"]]
    new["a"] = {"median": 2.3, "low": 2.1, "high": 2.4}
    assert not [row for row in _compare.compare(old, new) if row["changed"]]
    new["a"] = {"median": 3.0, "low": 2.9, "high": 3.1}
    new["n"][1] = 0.6
    changed = {row["figure"]: row["ratio"] for row in _compare.compare(old, new) if row["changed"]}
    assert changed == {"a": pytest.approx(1.5), "n / 1": pytest.approx(1.2)}
    text = _compare.report("x", old, new | {"machine": {"threads": 1}})
    assert "4 figures in both runs, 2 changed" in text
    assert "threads 2 → 1" in text
    assert "| a | 2 | 3 | 1.500 |" in text


@pytest.mark.usefixtures("_orders_at_once")
def test_the_command_compares_with_what_it_replaces(tmp_path, capsys):
    out = ["orders", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert command.main(out) == 0
    assert not (tmp_path / "comparison.md").exists()
    path = tmp_path / "orders.json"
    data = json.loads(path.read_text())
    data["schemes"]["strang"]["measured"] *= 1.5
    path.write_text(json.dumps(data))
    assert command.main(out) == 0
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert ", 1 changed beyond the spread" in text
    assert "| schemes / strang / measured | " in text
    other = tmp_path / "other"
    assert command.main(["orders", "--quick", "--out", str(other), "--compare", str(path)]) == 0
    assert ", 0 changed beyond the spread" in (other / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_orders_at_once")
def test_an_old_run_that_cannot_be_compared_with_is_named_and_the_new_one_kept(tmp_path, capsys):
    out = ["orders", "--quick", "--threads", "1", "--out", str(tmp_path)]
    (tmp_path / "orders.json").write_text("{")
    assert command.main(out) == 0
    assert "orders.json: not compared, because it is not JSON" in capsys.readouterr().err
    assert json.loads((tmp_path / "orders.json").read_text())["benchmark"] == "orders"
    other = tmp_path / "overhead.json"
    other.write_text('{"benchmark": "overhead"}')
    elsewhere = [*out[:-1], str(tmp_path / "elsewhere")]
    assert command.main([*elsewhere, "--compare", str(other)]) == 0
    assert "overhead.json: not compared, because it is of overhead, not orders" in capsys.readouterr().err


def test_a_figure_that_was_measured_once_has_no_spread():
    assert _timing.shown(_timing.spread([2.0])) == "2.00"
    assert _timing.shown(_timing.spread([1.0, 2.0, 3.0])) == "2.00 (1.50 to 2.50)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["speed"], "NAME: got 'speed', expected some of overhead"), (["--compare", "none.json"], "none.json does not")],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_orders_at_once")
def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def broken(quick: bool) -> dict:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(importlib.import_module("benchmarks.overhead"), "run", broken)
    assert command.main(["overhead", "orders", "--quick", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "orders.json").exists()
    assert not (tmp_path / "overhead.json").exists()
    assert "failed: overhead" in capsys.readouterr().err


def test_results_name_no_machine():
    import platform

    text = json.dumps(_timing.machine())
    assert str(ROOT) not in text
    assert not platform.node() or f'"{platform.node()}"' not in text


# ---- parts ----


def test_json_reads_back_and_is_compact():
    data = {"a": {"median": 1.0, "low": 0.5, "high": 2.0}, "b": [{"c": "x" * 100, "d": [1, 2]}], "e": {}, "f": "é"}
    text = command.dump(data)
    assert json.loads(text) == data
    assert text.endswith("}\n")
    assert '"a": {"median": 1.0, "low": 0.5, "high": 2.0}' in text


def test_memory_counts_each_storage_once_and_until_it_is_let_go():
    def function() -> torch.Tensor:
        a = torch.zeros(1024, 256)  # 1 MiB
        b = a.view(-1)
        c = b + 1
        del a, b
        d = c * 2
        return d.sum()

    assert _memory.peak_mebibytes(function) == pytest.approx(2.0, abs=0.01)
    layer = torch.nn.Linear(256, 256, bias=False)

    def backward() -> None:
        layer.zero_grad()
        layer(torch.ones(1024, 256)).relu().sum().backward()

    first = _memory.peak_mebibytes(backward)
    assert first == _memory.peak_mebibytes(backward)
    assert first > 3.0


def test_limits_say_whether_they_are_met():
    spread = _timing.spread([1.0, 1.2, 1.4])
    assert spread == {"median": 1.2, "low": 1.1, "high": pytest.approx(1.3)}
    assert limits.Limit("x", spread, most=1.3).met is True
    assert limits.Limit("x", spread, least=1.3).met is False
    assert limits.Limit("x", 1.0).met is None
    assert limits.line(limits.Limit("x", spread, floor=1.0, most=1.1)) == (
        "| x | 1.20 (1.10 to 1.30) | 1.00 | ≤ 1.1 | **no** |"
    )


def test_the_committed_page_is_that_of_its_json():
    folder = ROOT / "docs" / "results" / "benchmarks"
    assert (folder / "README.md").read_text(encoding="utf-8") == command.page(folder)
    rows = limits.render(command.results(folder), command.module, command.NAMES)
    assert (folder / "limits.md").read_text(encoding="utf-8") == rows


ROOT = Path(__file__).parents[1]


def test_the_resnet_in_jax_is_the_one_in_torch():
    pytest.importorskip("jax")
    generator = torch.Generator().manual_seed(0)
    net = odeadv.models.preact_resnet(8, 4, generator=generator).double()
    images, labels = torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 5, 9])
    net(images)  # running statistics that are not 0 and 1
    net.eval().requires_grad_(False)
    x = net.stem(images).requires_grad_()

    def torched(value) -> torch.Tensor:
        return torch.tensor(value.tolist(), dtype=torch.float64)

    same, start = {"rtol": 0, "atol": 1e-12}, _peers.float64(x.detach())
    assert torch.allclose(torched(_jax_resnet.velocity(net.blocks[0])(0.0, start)), net.blocks[0].residual(x), **same)
    field = net.field(images, labels)  # its loss is the mean over the batch
    state = x
    for block in net.blocks:
        state = block(state)
    (gradient,) = torch.autograd.grad(field.evaluate(state)[1], x)
    found = torched(_jax_resnet.loss_gradient(net, 0, labels)(start))
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(found, gradient, **same)
