"""Tables and reports: which runs make a table, and pages that follow from their records by arithmetic alone."""

import json
import math
import re
import runpy
import statistics
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from odeadv import cli, data
from odeadv.diagnostics import Diagnosis
from odeadv.evaluation import AttackResult, Evaluation
from odeadv.experiments import (
    CLAIMS,
    PRESETS,
    STAGES,
    TABLES,
    RecordWarning,
    Row,
    RunConfig,
    _campaign,
    _claims,
    _figure2,
    _plots,
    _report,
    configuration,
    configurations,
    load_records,
    rehearse,
    run_stage,
    table_costs,
    with_eta,
    write_claims,
    write_figure2,
    write_report,
)
from odeadv.experiments._claims import decide
from odeadv.experiments._config import passes
from odeadv.experiments._report import render
from odeadv.experiments._results import gather
from odeadv.models._network import FieldNetwork
from odeadv.support.files import write_json
from odeadv.training import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(page for page in RESULTS.glob("*/*.md") if page.stem in TABLES)


def record(config: RunConfig, protocol: str, columns, accuracy) -> dict:
    """Return a record with the accuracies ``accuracy(column)``; column 0 is the clean accuracy."""
    attacks = [
        {
            "name": column.attack,
            "eps_255": column.eps_255,
            "steps": column.steps,
            "robust_accuracy": accuracy(number),
            "worst_so_far_accuracy": accuracy(number) - 0.01,
        }
        for number, column in enumerate(columns, start=1)
    ]
    evaluation = {"protocol": protocol, "clean_accuracy": accuracy(0), "attacks": attacks, "seconds": 1.0}
    epoch = {"epoch": 1, "loss": 0.5, "accuracy": 0.75, "lr": 0.1, "seconds": 1.0, "ratio": 2e5}
    return {
        "schema": "odeadv.run/2",
        "key": config.key,
        "method": config.method,
        "config": config.to_dict(),
        "data": {"source": "made up", "train_images": 2, "test_images": 1, "fingerprint": "f"},
        "versions": {"odeadv": "0"},
        "machine": {"device": "x", "threads": 1, "processes": 1},
        "seconds": {"training": 1.0},
        "epochs": [epoch],
        "best_epoch": None,
        "evaluations": {"last": {protocol: evaluation}},
    }


def rows_at(table, preset="bf16"):
    """Return the rows that can be run at this size."""
    return [row for row in table.rows if PRESETS[preset].sizes[row.method.split("+")[0]].can_run(row)]


def made_up(table, rows=None, seeds=(0, 1, 2), preset="bf16", dataset="cifar10"):
    """Return records whose accuracies differ by row, column and seed."""
    return [
        record(
            config, table.protocol, table.columns,
            lambda n, i=i, s=config.training.seed: 0.9 - 0.1 * n + 0.01 * (i % 6) * (n + 1) + 0.004 * s * (i - 1),
        )
        for i, (row, config) in enumerate(configurations(table, PRESETS[preset], dataset=dataset, seeds=seeds))
        if rows is None or row.name in rows
    ]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_a_page_at_every_preset(name, tmp_path):
    table = TABLES[name]
    for dataset in table.datasets:
        for preset in PRESETS:
            size = replace(PRESETS[preset], seeds=(0, 1, 2))
            records = made_up(table, preset=preset, dataset=dataset, seeds=size.seeds)
            text = render(gather(table, size, dataset, records))
            theirs = preset == "paper" and bool(table.paper(dataset))
            assert (
                "\n**The paper's protocol, with these choices of ours: " if theirs else "\n**Not the paper's protocol: "
            ) in text
            assert "Without a record" not in text
            assert ("Not at this size" in text) == (rows_at(table, preset) != list(table.rows))
            for row in rows_at(table, preset):
                assert re.search(rf"^\| {re.escape(row.label)} \| here(, eta [0-9.]+)?, 3 seeds \|", text, re.MULTILINE)
            for row, figures in table.paper(dataset).items():
                assert re.search(
                    rf"^\| {re.escape(table.row(row).label)} \| paper(, eta [0-9.]+)? \|", text, re.MULTILINE
                )
                assert set(figures) <= {"acc", "avg", *(column.key for column in table.columns)}
                assert len(figures) >= len(table.columns)


def test_every_row_that_the_paper_prints_is_a_row_here():
    figures = json.loads((ROOT / "odeadv" / "experiments" / "paper_tables.json").read_text())
    for name in ("table1", "table2", "table3", "table4", "table6", "table7"):
        for dataset in TABLES[name].datasets:
            assert set(TABLES[name].paper(dataset)) == set(figures[name][dataset])
    fifth = TABLES["table5"].paper("cifar100")
    assert fifth["pgd+lad@0.001"] == {"fgsm_8": 23.02, "ifgsm_8": 17.42}
    assert fifth["pgd+lad-sm"] == {"fgsm_8": 26.79, "ifgsm_8": 22.39}
    assert fifth["pgd"] == {"fgsm_8": 23.71, "ifgsm_8": 17.74}
    assert len(fifth) == 11


def test_the_figures_are_means_and_deviations_over_the_seeds():
    table = TABLES["table1"]
    records = made_up(table)
    results = gather(table, PRESETS["bf16"], None, records)
    text = render(results)
    for row in rows_at(table):
        clean = [100 * r["evaluations"]["last"]["table1"]["clean_accuracy"] for r in results.runs[row.name].values()]
        cell = f"| {row.label} | here, 3 seeds | {statistics.fmean(clean):.2f} ± {statistics.stdev(clean):.2f} |"
        assert cell in text
    assert "| natural | paper | 92.89 | 67.22 | 49.80 | 56.98 | 19.20 | 48.30 |" in text
    assert render(gather(table, PRESETS["bf16"], None, records[::-1])) == text


def test_differences_are_paired_by_seed_with_students_interval():
    table = TABLES["table2"]
    results = gather(table, PRESETS["bf16"], None, made_up(table))
    lad, pgd = results.runs["pgd+lad"], results.runs["pgd"]
    by_hand = [
        100 * statistics.fmean(
            a["robust_accuracy"] - b["robust_accuracy"]
            for a, b in zip(
                lad[s]["evaluations"]["last"]["table2"]["attacks"],
                pgd[s]["evaluations"]["last"]["table2"]["attacks"],
                strict=True,
            )
        )
        for s in (0, 1, 2)
    ]  # fmt: skip
    difference = results.difference(table.row("pgd+lad"), table.row("pgd"), "avg")
    assert difference.values == pytest.approx(by_hand)
    half = 4.303 * statistics.stdev(by_hand) / math.sqrt(3)
    expected = (statistics.fmean(by_hand) - half, statistics.fmean(by_hand) + half)
    assert difference.interval == pytest.approx(expected, abs=1e-3)
    page = render(results)
    for names, paper in ((("pgd+lad", "pgd"), "+0.76"), (("pgd+lad-sm", "pgd+lad"), "+0.18")):
        row, other = map(table.row, names)
        contrast = results.contrast(row, other, "avg")
        assert contrast.mean == pytest.approx(results.difference(row, other, "avg").mean)
        assert contrast.df == 6  # four rows, three seeds
        assert f"| {row.label} minus {other.label} | Avg | {paper} | {contrast} | 3 |" in page


@pytest.mark.parametrize(
    ("table", "row", "others"),
    [
        ("table2", "pgd", []),
        ("table2", "pgd+damp", ["pgd"]),
        ("table2", "pgd+lad-midpoint", ["pgd", "pgd+lad"]),
        ("table4", "pgd+lad-sm+noise", ["pgd", "pgd+noise", "pgd+lad-sm", "pgd+lad+noise"]),
        ("table5", "pgd+lad-sm@10", ["pgd", "pgd+lad@10"]),
        ("table6", "trades+lad-sm", ["trades", "trades+lad"]),
        ("ablations", "natural+lad+random", ["natural", "natural+lad"]),
        ("ablations", "natural+lad-sm", ["natural", "natural+lad", "natural+matched"]),
        ("ablations-trades", "trades+lad+eta0", ["trades", "trades+lad"]),
    ],
)
def test_rows_are_compared_with_the_undefended_one_and_those_that_differ_in_one_part(table, row, others):
    assert [other.name for other in TABLES[table].compared(TABLES[table].row(row))] == others


def test_a_table_in_which_pgd_does_not_over_fit_tests_nothing():
    table = TABLES["table2"]
    records = made_up(table)
    for found in records:  # robust training accuracy is 75 %, and IFGSM-20 at 8/255 about 60 %
        found["epochs"][-1]["accuracy"] = 0.62
    results = gather(table, PRESETS["bf16"], None, records)
    assert {decision.word for decision in results.decisions()} == {"not tested"}
    assert "**Not a test of the paper's claim: plain PGD over-fits by" in render(results).splitlines()[2]
    for found in records:
        found["epochs"][-1]["accuracy"] = 0.95
    results = gather(table, PRESETS["bf16"], None, records)
    assert results.over_fitting()[1] == ""
    assert "not tested" not in {decision.word for decision in results.decisions()}
    for found in records:
        found["epochs"][-1]["validation"] = {"clean": 0.5, "robust": 0.4}  # the best epoch is the last
    assert "loses 0.0 points" in gather(table, PRESETS["bf16"], None, records).over_fitting()[1]


def test_a_defence_that_is_too_weak_is_not_tested():
    table = TABLES["table1"]
    records = made_up(table)
    for found in records:
        found["epochs"][-1]["strength_first_order"] = 0.002
    results = gather(table, PRESETS["bf16"], None, records)
    words = {decision.row.name: decision.word for decision in results.decisions() if decision.other.name == "natural"}
    assert words["natural+lad"] == "not tested"
    assert "s is 0.2 %" in results.not_tested(table.row("natural+lad"))
    assert results.not_tested(table.row("natural")) == ""


def test_only_runs_of_the_table_and_preset_count():
    table = TABLES["table2"]
    records = made_up(table, rows=("pgd", "pgd+lad"), seeds=(0, 1))
    others = made_up(TABLES["table1"]) + made_up(table, preset="paper")
    results = gather(table, PRESETS["bf16"], None, records + others)
    assert {name: sorted(runs) for name, runs in results.runs.items()} == {"pgd": [0, 1], "pgd+lad": [0, 1]}
    assert (
        "not run or diverged:\n\n- `pgd+lad-sm`, seeds 0 to 2\n- `pgd+lad-midpoint`, seeds 0 to 2\n- `pgd`, seed 2\n"
        in render(results)
    )
    assert "Not at this size, because the network lacks a block to damp: PGD + In-ResNet, PGD + lambda-In" in render(
        results
    )
    with pytest.raises(ValueError, match=r"^records: none of the 9 given belongs to table2 at preset smoke"):
        gather(table, PRESETS["smoke"], None, made_up(TABLES["table1"]))


def test_what_differs_from_the_paper_stands_in_the_first_lines(monkeypatch):
    table = TABLES["table2"]
    text = render(gather(table, PRESETS["bf16"], None, made_up(table, seeds=(0,))))
    first = next(line for line in text.splitlines() if line.startswith("**Not the paper's protocol: "))
    text = text.partition("<summary>All differences from the paper's protocol</summary>\n\n")[2].partition("\n\n")[0]
    assert first.split(": ", 1)[1].split("; and ")[0].split("; ") == [
        line[2:].partition(" (")[0] for line in text.splitlines()[:4]
    ]
    for part in (
        "ResNet-8 of width 16 instead of ResNet-56", "40 instead of 160 epochs", "bf16 instead of fp32",
        "7 instead of 10 attack steps", "2 training images", "1 instead of 3 seeds",
    ):  # fmt: skip
        assert part in text
    with_other = with_eta(PRESETS["cpu"], table, "cifar10", 30)
    monkeypatch.setitem(PRESETS, "cpu", with_other)
    text = render(gather(table, with_other, None, made_up(table, seeds=(0, 1), preset="cpu")))
    for part in (
        "ResNet-14 of width 8", "64 instead of 128 images per batch", "eta 30 (60 in batches of 128) instead of 50",
    ):  # fmt: skip
        assert part in text


def test_passes_are_counted_as_in_the_cost_model():
    counted = {
        row.name: passes(config)
        for table in TABLES.values()
        for row, config in configurations(table, PRESETS["paper"], dataset=table.datasets[0], seeds=(0,))
    }
    assert (counted["natural"], counted["natural+lad"], counted["natural+lad-sm"]) == (3, 5, 5)
    assert (counted["pgd"], counted["pgd+lad"], counted["pgd+lad-midpoint"]) == (23, 25, 27)
    assert (counted["trades"], counted["trades+lad"], counted["trades+lad+eta0"]) == (27, 32, 30)
    assert counted["natural+lad+sweeps2"] == 7


def test_a_tuned_eta_makes_a_table():
    table = TABLES["table2"]
    preset = with_eta(PRESETS["paper"], table, "cifar10", 200)
    etas = {getattr(c.training.defence, "eta", 0.0) for _, c in configurations(table, preset)}
    assert etas == {0.0, 200.0}
    assert preset.sizes["natural"] == PRESETS["paper"].sizes["natural"]
    records = [
        record(config, table.protocol, table.columns, lambda n: 0.5 - 0.01 * n)
        for _, config in configurations(table, preset, seeds=(0,))
    ]
    assert "eta 200 instead of 50 (PGD + LAD" in render(gather(table, preset, None, records))


@pytest.mark.parametrize(
    ("name", "preset"), [("mechanism-natural-eta", "overfit"), ("mechanism-eta", "mlp"), ("table5", "cpu")]
)
def test_numbers_at_the_axes_of_eta_do_not_overlap(name, preset):
    table = TABLES[name]
    dataset = table.datasets[0]
    results = gather(table, PRESETS[preset], dataset, made_up(table, preset=preset, dataset=dataset))
    figure = Figure(figsize=(8.0, 6.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _plots._over_eta(results, figure, {"acc": "clean", **{c.key: c.label for c in table.columns}})
    canvas.draw()
    for axes in figure.axes[: 1 + len(table.columns)]:  # the last place of the grid may be empty
        labels = [label for label in axes.get_xticklabels(which="both") if label.get_text() and label.get_visible()]
        if labels and labels[0].get_rotation() == 0.0:
            boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), [label.get_text() for label in labels]
        assert len(labels) <= 13


def test_a_table_over_eta_shows_both_values_and_curves():
    table, preset = TABLES["table5"], PRESETS["cpu"]
    records = [
        record(config, table.protocol, table.columns, lambda n: 0.5 - 0.01 * n)
        for _, config in configurations(table, preset, dataset="cifar100", seeds=(0,))
    ]
    page = render(gather(table, preset, "cifar100", records))
    assert "eta 7 times (14 times in batches of 128) the paper's (all with LAD)" in page
    assert "| PGD + LAD-SM, eta x 0.01 | paper, eta 10 |  | 22.43 | 15.98 |" in page
    assert "| PGD + LAD-SM, eta x 0.01 | here, eta 70, 1 seed |" in page
    assert "| PGD | here, 1 seed |" in page


def test_sizes_may_differ_between_data_sets():
    size = replace(
        PRESETS["cpu"].sizes["pgd"], epochs={"digits": 7, "cifar100": 3}, train_images={"digits": 9, "cifar100": 5}
    )
    runs = {name: configuration(Row("pgd"), size, name, 0) for name in ("digits", "cifar100")}
    assert {name: (run.training.epochs, run.data.train_images) for name, run in runs.items()} == {
        "digits": (7, 9),
        "cifar100": (3, 5),
    }


def test_matched_baselines_make_as_many_passes():
    preset = PRESETS["paper"]
    for objective, size in preset.sizes.items():
        longer, lad = (configuration(Row(f"{objective}+{part}"), size, "cifar10", 0) for part in ("matched", "lad"))
        assert longer.training.epochs * passes(longer) == pytest.approx(160 * passes(lad), rel=0.01)
        assert longer.training.milestones == (longer.training.epochs // 2, longer.training.epochs * 3 // 4)


def test_records_that_contradict_each_other_are_refused():
    table = TABLES["table2"]
    records = made_up(table)
    with pytest.raises(ValueError, match="two have the key"):
        gather(table, PRESETS["bf16"], None, [*records, records[0]])
    records[0]["data"] = {**records[0]["data"], "fingerprint": "another"}
    with pytest.raises(ValueError, match="were run on different data"):
        gather(table, PRESETS["bf16"], None, records)


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    return load_records(RESULTS / "runs")


@pytest.fixture
def _read_once(committed, monkeypatch):
    """Give each page the committed records without reading the hundreds of files again."""
    for module in (_report, _figure2, _claims):
        monkeypatch.setattr(module, "load_records", lambda folder: committed)


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_committed_pages_are_made_of_committed_records(page, tmp_path):
    name, dataset, preset = page.parent.name.rsplit("-", 2)
    assert name == page.stem
    text = write_report(TABLES[name], PRESETS[preset], dataset, RESULTS / "runs", tmp_path)
    assert page.read_text(encoding="utf-8") == text
    assert (page.parent / f"{name}.png").exists() == (tmp_path / f"{name}.png").exists()


def test_the_same_runs_give_one_word_for_a_difference():
    """Two tables that share runs pool their errors over other rows, so one of them must leave the word to the other."""
    words: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        name, dataset, preset = page.parent.name.rsplit("-", 2)
        claims = (
            page.read_text(encoding="utf-8").partition("\n## Claims\n")[2].partition("\n#")[0].partition("<details>")[0]
        )
        for line in claims.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 6 and cells[0] not in ("Difference", "---") and "decided [" not in cells[5]:
                words.setdefault((cells[0], dataset, preset, TABLES[name].protocol), set()).add(cells[5])
    assert len(words) > 30
    assert {key: found for key, found in words.items() if len(found) > 1} == {}


@pytest.mark.usefixtures("_read_once")
@pytest.mark.parametrize("page", sorted(RESULTS.glob("figure2-*/figure2.md")), ids=lambda page: page.parent.name)
def test_committed_figures_are_made_of_committed_records(page, tmp_path):
    _, dataset, preset = page.parent.name.rsplit("-", 2)
    assert page.read_text(encoding="utf-8") == write_figure2(PRESETS[preset], dataset, RESULTS / "runs", tmp_path)


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("diagnostics-*/*")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_committed_dynamics_are_made_of_their_json(folder, tmp_path):
    data = json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))
    Diagnosis.from_dict(data, tmp_path).write()
    assert (tmp_path / "diagnostics.md").read_text(encoding="utf-8") == (folder / "diagnostics.md").read_text(
        encoding="utf-8"
    )
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_a_record_that_cannot_be_used_leaves_the_others_in_the_table():
    table = TABLES["table2"]
    for change in (
        lambda record: record["config"]["training"].update(lr=7.0),
        lambda record: record["config"]["training"].update(objective={"name": "no:Such"}),
        lambda record: record["evaluations"]["last"]["table2"]["attacks"].pop(),
        lambda record: record["evaluations"]["last"]["table2"].update(clean_outcomes="!"),
    ):
        records = made_up(table, rows=("pgd", "pgd+lad"), seeds=(0,))
        change(records[1])
        with pytest.warns(RecordWarning, match=f"left out, the record with key {records[1]['key']}: "):
            results = gather(table, PRESETS["bf16"], "cifar10", records)
        assert [row.name for row in results.rows] == ["pgd"]


def test_figure_2_says_whether_it_is_the_papers(tmp_path):
    records = made_up(TABLES["table2"], rows=("pgd",), seeds=(0,))
    ratios = [2e6, 1e6, 3e5, 2e5]
    records[0]["epochs"] = [{**records[0]["epochs"][0], "epoch": n, "ratio": r} for n, r in enumerate(ratios, start=1)]
    (tmp_path / "a.json").write_text(json.dumps(records[0]))
    text = write_figure2(PRESETS["bf16"], "cifar10", tmp_path, tmp_path / "out")
    assert "| PGD, seed 0 | 2e+06 | 2e+05 | 4 of 4 | 2e+05 | yes | yes |" in text
    records[0]["epochs"][1]["ratio"] = 5e4
    (tmp_path / "a.json").write_text(json.dumps(records[0]))
    text = write_figure2(PRESETS["bf16"], "cifar10", tmp_path, tmp_path / "out")
    assert "| PGD, seed 0 | 2e+06 | 5e+04 | 2 of 4 | 2e+05 | no | no |" in text
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="none of the 0 given"):
        write_figure2(PRESETS["bf16"], "cifar10", tmp_path / "nothing", tmp_path / "out")


def test_there_are_committed_pages():
    assert PAGES


def test_committed_records_are_where_their_configuration_says(committed):
    files = sorted((RESULTS / "runs").glob("*.json"))
    assert len(files) == len(committed) > 0
    for file, found in zip(files, committed, strict=True):
        config = RunConfig.from_dict(found["config"])
        assert file.stem == config.name
        assert found["key"] == config.key
        assert found["method"] == config.method


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_of_every_table_can_be_built(preset):
    """Built, not trained: `--preset paper` must not fail after hours."""
    digits = data.load("digits")
    built = set()
    for table in TABLES.values():
        for _, config in configurations(table, PRESETS[preset], dataset=table.datasets[0], seeds=(0,)):
            if repr(config.model) not in built:
                assert isinstance(config.model.build(digits), FieldNetwork)
                built.add(repr(config.model))


def test_a_rehearsal_takes_the_first_steps_of_a_training_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = ["natural", "natural+lad"]
    assert cli.main(["table", "table1", "--preset", "smoke", "--methods", *methods, "--rehearse", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ((_, config),) = configurations(
        TABLES["table1"], PRESETS["smoke"], dataset="digits", methods=["natural"], seeds=(0,)
    )
    whole = config.training
    images, _ = config.data.take(data.load("digits"))
    steps = len(images.train_images) // whole.batch_size * whole.epochs
    assert [re.match(r"(\S+): 2 of (\d+) steps, loss \d\.\d{3}, ", line).groups() for line in lines[:2]] == [
        (method, str(steps)) for method in methods
    ]
    assert re.match(r"table1: \S+ h to train 2 of 2 rows, a seed of each(; \S+ h for \d+ seeds)?$", lines[2])
    assert not list(tmp_path.iterdir())
    few = slice(0, 2 * whole.batch_size)
    short = replace(images, train_images=images.train_images[few], train_labels=images.train_labels[few])
    net = config.model.build(images, torch.Generator().manual_seed(0))
    first = train(net, short, replace(whole, epochs=1, milestones=())).epochs[0].loss
    found = rehearse(config, data.load("digits"), 2)
    assert found.loss == first
    assert (found.taken, found.steps, found.hours) == (2, steps, steps * found.seconds / 3600)
    assert str(replace(found, memory=2**30)).endswith(f" s a step, 1.00 GiB: {found.hours:.3g} h to train")
    with pytest.raises(ValueError, match=r"^steps: got 1, expected 2 or more"):
        rehearse(config, data.load("digits"), 1)


def test_a_row_that_cannot_be_rehearsed_does_not_keep_the_others_from_it(capsys, monkeypatch):
    def broken(config, *args, **options):
        if "lad" in config.method:
            raise RuntimeError("out of memory")
        return rehearse(config, *args, **options)

    monkeypatch.setattr("odeadv.experiments._cost.rehearse", broken)
    arguments = ["--preset", "smoke", "--rehearse", "2", "--methods", "natural+lad", "natural"]
    assert cli.main(["table", "table1", *arguments]) == 1
    shown = capsys.readouterr().out
    assert "natural+lad: failed: out of memory" in shown
    assert "h to train 1 of 2 rows" in shown


def test_the_command_lists_runs_and_refuses_what_is_no_row(capsys):
    assert cli.main(["table", "table2", "--list", "--preset", "bf16", "--seeds", "0"]) == 0
    listed = capsys.readouterr()
    assert len(listed.out.splitlines()) == len(rows_at(TABLES["table2"]))
    images = 40 * (2000 // 128) * 128 * (17 + 2 * 19 + 21)  # one plain row, LAD and LAD-SM, the exact midpoint
    assert f"4 runs, {images:.3g} image passes" in listed.err
    assert cli.main(["table", "table2", "--methods", "natural"]) == 2
    assert "is not a row of table2" in capsys.readouterr().err


def test_the_cost_of_the_tables_counts_every_run_and_evaluation_once():
    rows = {(row.table, row.dataset): row for row in table_costs(PRESETS["paper"])}
    first = rows["table1", "cifar10"]
    epochs = 3 * 160 * (50_000 // 128) * 128  # of one row in three seeds
    assert (first.runs, first.new) == (15, 15)
    assert first.training == epochs * (3 * 3 + 2 * 5)  # three rows of 3 passes, LAD and LAD-SM
    assert first.evaluation == 15 * 10_000 * (1 + 2 * 3 + 2 * 41)
    assert first.hours(1000) == pytest.approx((first.training + first.evaluation) / 3000 / 3600)
    second, noisy, strong = rows["table2", "cifar10"], rows["table4", "cifar10"], rows["table6", "cifar10"]
    assert second.training == epochs * (3 * 23 + 2 * 25 + 27)
    assert (noisy.runs, noisy.new) == (18, 9)  # the plain rows are also rows of Table 2, and evaluated alike
    assert noisy.evaluation == 9 * 10_000 * 89 * 100
    assert strong.new == strong.training == 0
    assert strong.evaluation == 18 * 10_000 * (1 + 41 + 201 + 2001)
    small = {(row.table, row.dataset): row for row in table_costs(PRESETS["cpu"])}["table1", "cifar10"]
    assert small.evaluation == 2 * 15 * 2000 * 89  # last and best weights


def test_listing_without_a_table_shows_the_cost_of_all(capsys):
    assert cli.main(["table", "--list", "--preset", "paper", "--rates", "1000"]) == 0
    shown = capsys.readouterr().out
    first = next(cost for cost in table_costs(PRESETS["paper"]) if (cost.table, cost.dataset) == ("table1", "cifar10"))
    assert f"| table1 | cifar10 | 15 | 15 | {first.training:.3g} | {first.evaluation:.3g} |" in shown
    assert f"{first.hours(1000):.1f} |" in shown
    assert cli.main(["table", "--list", "--rates", "0"]) == 2
    assert "rates: got [0.0]" in capsys.readouterr().err
    assert cli.main(["table"]) == 2
    assert "table: got none" in capsys.readouterr().err


def test_the_command_makes_a_table(tmp_path, capsys, monkeypatch):
    from dataclasses import replace

    tiny = replace(PRESETS["smoke"].sizes["natural"], width=2, epochs=1)
    preset = replace(PRESETS["smoke"], sizes=dict.fromkeys(PRESETS["smoke"].sizes, tiny), seeds=(0,))
    monkeypatch.setitem(PRESETS, "smoke", preset)
    arguments = ["--methods", "natural", "natural+lad", "--images", "100", "20"]
    arguments += ["--runs", str(tmp_path), "--out", str(tmp_path / "page")]
    assert cli.main(["table", "table1", *arguments]) == 0
    shown = capsys.readouterr().out
    page = tmp_path / "page" / "table1.md"
    records = sorted((tmp_path / "page").glob("*.json"))
    assert len(records) == 2
    plain, defended = (json.loads(record.read_text()) for record in records[::-1])
    assert [plain["data"][key] for key in ("train_images", "test_images")] == [100, 20]
    # The summary: rows of equal columns, a difference, and that one seed decides nothing.
    clean, average = (100 * plain["evaluations"]["last"]["table2"][key] for key in ("clean_accuracy", "average"))
    assert re.search(rf"^natural +1 +{clean:.1f} .* {average:.1f}$", shown, re.MULTILINE)
    gain = 100 * defended["evaluations"]["last"]["table2"]["average"] - average
    assert re.search(rf"^natural \+ LAD minus natural +{re.escape(f'{gain:+.1f}')}(?= |$)", shown, re.MULTILINE)
    assert "Not resolved: natural + LAD against natural." in shown
    assert "With one seed the interval covers chance in the images" in shown
    assert " ".join(preset.limits.split()) in " ".join(shown.split())
    assert f"page:    {page}" in shown
    before = page.read_bytes(), (tmp_path / "page" / "table1.png").read_bytes()
    assert cli.main(["table", "table1", *arguments, "--render"]) == 0
    assert (page.read_bytes(), (tmp_path / "page" / "table1.png").read_bytes()) == before
    # The paper has no such figure.
    assert re.search(r"\| natural \+ LAD minus natural \| Acc \|  \| .* \| 1 \|", page.read_text())
    assert cli.main(["table", "table1", "--images", "1", "2", "3"]) == 2
    assert "images: got 3 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(1, 8))
def test_examples_run_as_programs(number, capsys, monkeypatch):
    program = str(ROOT / "examples" / f"table{number}.py")
    arguments = [program, "--list", "--seeds", "0", "--preset", "bf16"]
    arguments += ["--dataset", "cifar100"] if number in (5, 7) else []
    # As python does, without the time that a new process needs to import torch; .ci/run starts table1 as a process.
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(program, run_name="__main__")
    assert not end.value.code
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == len(rows_at(TABLES[f"table{number}"]))


def evaluated(table, outcomes: dict[str, list[bool]]) -> dict:
    """Return an evaluation by the table's protocol, or by AutoAttack, with these outcomes."""
    bits = {key: torch.tensor(value) for key, value in outcomes.items()}
    if "auto" in bits:
        spec = table.autoattack.attacks[0]
        attacks = (AttackResult(spec.name, spec.eps, None, None, None, bits["auto"]),)
    else:
        attacks = tuple(
            AttackResult(c.attack, c.eps_255 / 255, 2 / 255, c.steps, bits[c.key], bits[c.key] & bits["clean"])
            for c in table.columns
        )
    return Evaluation("made up", bits["clean"], attacks, 1, 1, 1.0).to_dict()


class TestAutoAttack:
    def records(self) -> list[dict]:
        """Return records of PGD and LAD in two seeds: four test images, the first two of them under AutoAttack."""
        table = TABLES["table2"]
        found = []
        for row, config in configurations(table, PRESETS["cpu"], methods=["pgd", "pgd+lad"], seeds=(0, 1)):
            better = row.name == "pgd+lad" or config.training.seed == 1
            whole = {c.key: [True, better, False, False] for c in table.columns}
            whole["clean"] = [True, False, True, True]
            one = record(config, table.protocol, table.columns, lambda n: 0.5)
            one["evaluations"]["last"] = {
                "table2": evaluated(table, whole),
                "autoattack-8@2": evaluated(table, {"clean": [True, False], "auto": [row.name == "pgd+lad", False]}),
            }
            found.append(one)
        return found

    def test_section_has_all_figures_of_the_same_images(self):
        text = render(gather(TABLES["table2"], PRESETS["cpu"], "cifar10", self.records()))
        section = text.split("<summary>AutoAttack</summary>")[1].split("</details>")[0]
        assert "The radius is 8/255. All figures are of the first test images." in section
        header = "| Method |  | images | Acc | IFGSM-20 8 | IFGSM-20 8, worst so far | AutoAttack 8 | difference |"
        assert header in section
        # For the first two images. IFGSM leaves the second one right in one seed of PGD, but its clean image is wrong.
        pgd = "| PGD | 2 seeds | 2 | 50.00 ± 0.00 | 75.00 ± 35.36 | 50.00 ± 0.00 | 0.00 ± 0.00 |  |"
        lad = "| PGD + LAD | 2 seeds | 2 | 50.00 ± 0.00 | 100.00 ± 0.00 | 50.00 ± 0.00 | 50.00 ± 0.00 | "
        assert pgd in section
        assert f"{lad}+50.00 [+50.00, +50.00] |" in section

    def test_no_section_without_it(self):
        records = self.records()
        for one in records:
            del one["evaluations"]["last"]["autoattack-8@2"]
        assert "AutoAttack" not in render(gather(TABLES["table2"], PRESETS["cpu"], "cifar10", records))

    def test_radius_is_one_of_the_table(self):
        for table in TABLES.values():
            assert table.autoattack_255 in [column.eps_255 for column in table.columns if column.attack == "ifgsm"]
            assert table.autoattack.attacks[0].eps == pytest.approx(table.autoattack_255 / 255)

    def test_is_refused_before_any_work_without_its_package(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        assert cli.main(["table", "table2", "--autoattack", "5", "--runs", str(tmp_path)]) == 2
        assert "pyautoattack: is not installed; expected the extra 'autoattack'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_a_stage_goes_on_from_records_and_starts_no_run_that_has_one(tmp_path, monkeypatch):
    stage = replace(STAGES["2b"], seeds=(10, 11, 12))
    jobs = stage.jobs
    table = TABLES[stage.table]
    whole, part = (record(job.config, table.protocol, table.columns, lambda _: 0.5) for job in jobs[:2])
    for made in (whole, part):
        made["evaluations"]["best"] = made["evaluations"]["last"]
        made["best_epoch"] = 1
    part["evaluations"]["best"] = {"another": part["evaluations"]["last"][table.protocol]}
    paths = [tmp_path / f"{job.config.name}.json" for job in jobs]
    for path, made in zip(paths, (whole, part), strict=False):
        write_json(path, made)
    before = [path.read_bytes() for path in paths[:2]]
    started = []
    monkeypatch.setattr(_campaign, "launch", lambda jobs, *_: (started.extend(jobs), ([{}] * len(jobs), []))[1])
    (failure,) = run_stage(stage, tmp_path / "runs", tmp_path, tmp_path)
    assert failure.job == jobs[1]
    assert failure.reason == f"{paths[1]}: lacks the evaluation {table.protocol}; move the file away to run it again"
    assert started == [jobs[2]]
    assert [path.read_bytes() for path in paths[:2]] == before
    assert set(tmp_path.glob("*.json")) == set(paths)


class TestClaims:
    def test_every_claim_is_a_primary_contrast_of_its_table(self):
        for claim in CLAIMS:
            pairs = TABLES[claim.table].primary_pairs(claim.dataset)
            assert (claim.row, claim.other) in pairs if claim.row else len(pairs) > 1
            assert {claim.again, claim.best} - {None} <= set(pairs)

    def test_every_primary_contrast_of_the_campaign_is_a_claim(self):
        """So that no question of the rules is missing on the page. Tables over eta are read as a shape."""
        asked = {(claim.table, *pair) for claim in CLAIMS for pair in ((claim.row, claim.other), claim.again) if pair}
        tables = {stage.table for stage in STAGES.values()} - {"mechanism-eta", "mechanism-natural-eta"}
        assert {(name, *pair) for name in tables for pair in TABLES[name].primary} <= asked | {
            (claim.table, *claim.best) for claim in CLAIMS if claim.best
        }

    def test_the_weights_of_the_best_epoch_are_a_reading_of_their_own(self):
        claim = next(claim for claim in CLAIMS if claim.best and claim.best != (claim.row, claim.other))
        records = made_up(TABLES[claim.table], preset=claim.preset, seeds=(10, 11, 12))
        last = decide(claim, records)
        assert last["other_readings"] == []
        assert "1 of 2 readings so far" in last["why"]
        for made in records:
            made["evaluations"]["best"] = made["evaluations"]["last"]
        label = "{} minus {}, at the best epoch".format(*(TABLES[claim.table].row(name).label for name in claim.best))
        found = decide(claim, records)
        assert label in [found["rows"], *(other["rows"] for other in found["other_readings"])]
        assert found["difference"] <= last["difference"]
        assert "readings" not in found["why"]
        records = [made for made in records if made["method"] in ("pgd", "pgd+lad", "pgd+lad-sm")]
        del records[0]["evaluations"]["best"]  # a run of another row, or one seed less: the reading stays
        assert label in [found["rows"], *(other["rows"] for other in decide(claim, records)["other_readings"])]

    @pytest.mark.parametrize(("paper", "weaker"), [(0.7, (-0.3, 0.5)), (None, (-0.3, 0.5)), (-0.7, (0.1, 0.8))])
    def test_the_weaker_reading_supports_the_claim_less_also_if_the_claim_is_negative(self, paper, weaker):
        contrasts = [SimpleNamespace(mean=sum(ends) / 2, interval=ends) for ends in ((-0.3, 0.5), (0.1, 0.8))]
        readings = [SimpleNamespace(paper=paper, contrast=contrast) for contrast in contrasts]
        assert min(readings, key=_claims._support).contrast.interval == weaker

    @pytest.mark.usefixtures("_read_once")
    def test_the_committed_page_is_made_of_committed_records(self, tmp_path):
        write_claims(RESULTS / "runs", tmp_path)
        for name in ("claims.md", "claims.json"):
            assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()

    def test_claims_are_decided_on_new_seeds_once_there_are_two(self):
        claim = next(claim for claim in CLAIMS if claim.row == "natural+lad" and claim.other == "natural")
        table = TABLES["ablations"]
        assert decide(claim, made_up(table, preset="cpu", seeds=(0, 1, 2, 3)))["seeds"] == [0, 1, 2, 3]
        found = decide(claim, made_up(table, preset="cpu", seeds=(0, 1, 2, 3, 4, 5)))
        assert found["seeds"] == [3, 4, 5]
        assert found["why"] == "3 of 7 seeds so far"
        assert decide(claim, made_up(table, preset="cpu", seeds=range(3, 10)))["why"] == ""
        assert decide(claim, made_up(TABLES["table2"]))["word"] == "not tested"
        assert decide(claim, made_up(table, preset="cpu", seeds=(0,)))["why"] == "one seed"

    def test_a_page_decides_on_new_seeds_too(self):
        """Seeds that made the hypothesis do not count beside new ones, on a table's page or on that of claims."""
        claim = next(claim for claim in CLAIMS if claim.row == "natural+lad" and claim.other == "natural")
        table, preset = TABLES[claim.table], PRESETS[claim.preset]
        for seeds, used in (((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 1, 2, 3, 4), (3, 4))):
            records = made_up(table, preset="cpu", seeds=seeds)
            decided = gather(table, preset, "cifar10", records).decided()
            assert {decision.seeds for decision in decided} == {used}
            assert decide(claim, records)["seeds"] == list(used)

    def test_a_reading_that_lacks_seeds_is_unfinished_even_if_it_is_the_stronger_one(self):
        claim = next(claim for claim in CLAIMS if claim.again)
        records = made_up(TABLES[claim.table], preset=claim.preset, seeds=range(10, 20))
        assert decide(claim, records)["why"] == ""
        for names in ((claim.row, claim.other), claim.again):
            table = TABLES[claim.table]
            lacking = gather(table, PRESETS[claim.preset], "cifar10", records).runs[names[0]][19]["key"]
            kept = [made for made in records if made["key"] != lacking]
            assert decide(claim, kept)["why"] == "9 of 10 seeds so far"

    def test_a_table_of_mixed_data_is_an_error_and_not_an_untested_claim(self):
        claim = next(claim for claim in CLAIMS if claim.row == "natural+lad" and claim.other == "natural")
        records = made_up(TABLES["ablations"], preset="cpu", seeds=(3, 4))
        records[0]["data"] = records[0]["data"] | {"fingerprint": "other"}
        with pytest.raises(ValueError, match="run on different data"):
            decide(claim, records)

    @pytest.mark.parametrize(("sign", "word"), [(1, "confirmed"), (-1, "undecided")])
    def test_the_shape_over_eta(self, sign, word):
        """Small eta help by their logarithm or harm; the largest always harms."""
        claim = next(claim for claim in CLAIMS if not claim.row)
        table, generator = TABLES["mechanism-eta"], torch.Generator().manual_seed(0)
        records = []
        for row, config in configurations(table, PRESETS["mlp"], seeds=(10, 11, 12)):
            gain = (
                0.0 if row.method == "pgd" else -0.1 if row.factor == 30 else sign * 0.02 * (4 + math.log10(row.factor))
            )
            noise = 0.002 * float(torch.randn((), generator=generator))
            found = record(config, table.protocol, table.columns, lambda n, g=gain + noise: 0.5 - 0.05 * n + g)
            found["epochs"][-1] |= {"accuracy": 0.95, "strength_first_order": 0.05}
            records.append(found)
        decided = decide(claim, records)
        assert decided["word"] == word
        assert decided["seeds"] == [10, 11, 12]


@pytest.mark.parametrize("name", ["split_ode", "defend", "own_objective"])
def test_programs_that_show_the_library_run(name, capsys, monkeypatch):
    namespace = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="not main")
    if name == "split_ode":
        fine = namespace["end"]("strang", 64) - namespace["end"]("strang", 128)
        coarse = namespace["end"]("strang", 32) - namespace["end"]("strang", 64)
        assert math.log2(float(coarse.abs().max() / fine.abs().max())) == pytest.approx(2.0, abs=0.1)
        return
    monkeypatch.setitem(sys.modules, "not main", None)
    namespace["main"](epochs=1)
    assert "epoch 1: " in capsys.readouterr().out


def test_the_example_of_a_diagnosis_writes_its_page(tmp_path):
    namespace = runpy.run_path(str(ROOT / "examples" / "diagnose.py"), run_name="not main")
    namespace["main"](["--out", str(tmp_path), "--images", "2"])
    assert (tmp_path / "diagnostics.md").exists()
