"""Runs and reports: one JSON a run, nothing run twice, the table from the JSON alone."""

import dataclasses
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from odeadv.data import ImageDataset
from odeadv.experiments import PRESETS, TABLE1, RunConfig, configurations, load_records, render, run, write_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def tiny_data() -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(260) % 10
    pixels = torch.randint(0, 256, (260, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ImageDataset("cifar-like", "made here", pixels, labels, pixels[:20], labels[:20], 10, flip=True)


def tiny_runs(**changes) -> list[RunConfig]:
    preset = dataclasses.replace(PRESETS["smoke"], width=2, epochs=2, **changes)
    return configurations(TABLE1, preset, dataset="cifar10", seeds=[0, 1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for config in tiny_runs():
        run(config, tiny_data(), out, label="[test]", log=io.StringIO())
    return out


def test_a_record_holds_the_configuration_and_every_figure(finished):
    records = load_records(finished)
    assert [(r["config"]["method"], r["config"]["training"]["seed"]) for r in records] == [
        (method, seed) for method in ("lad", "lad-sm", "natural") for seed in (0, 1)
    ]
    for record in records:
        assert {attack["eps_255"] for attack in record["evaluation"]["attacks"]} == {0.5, 1.0}
        assert len(record["epochs"]) == 2
        assert set(record["versions"]) == {"odeadv", "python", "torch", "numpy"}
        assert record["seconds"]["training"] > 0
        assert record["config"]["training"]["eta"] == (0.0 if record["config"]["method"] == "natural" else 50.0)
    assert sorted(path.name for path in (finished / "weights").iterdir()) == sorted(
        path.with_suffix(".npz").name for path in finished.glob("*.json")
    )


def test_a_finished_run_is_not_run_again_and_another_is_not_overwritten(finished):
    config = tiny_runs()[0]
    path = finished / config.file_name
    before = path.stat().st_mtime_ns
    log = io.StringIO()
    run(config, tiny_data(), finished, log=log)
    assert path.stat().st_mtime_ns == before
    assert "already there" in log.getvalue()
    other = dataclasses.replace(config, width=4)
    with pytest.raises(FileExistsError, match="holds a run of another configuration"):
        run(other, tiny_data(), finished, log=log)


def test_progress_shows_epoch_loss_accuracy_and_time_left(tmp_path):
    log = io.StringIO()
    run(tiny_runs()[0], tiny_data(), tmp_path, label="[1/6 natural]", log=log)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("[1/6 natural] epoch 1/2  loss ")
    assert "accuracy" in lines[0]
    assert "left" in lines[0]
    assert "evaluated in" in lines[-1]


def test_the_report_is_made_of_the_records_alone(finished, tmp_path):
    records = load_records(finished)
    text = render(TABLE1, records)
    assert write_report(TABLE1, finished) == text
    assert (finished / "table1.md").read_text() == text
    assert (finished / "table1.png").stat().st_size > 5_000
    assert text.startswith(
        "**Not the paper's protocol: ResNet-8 of width 2 instead of ResNet-56 of width 16; 2 instead"
    )
    natural = [r for r in records if r["config"]["method"] == "natural"]
    values = [100 * r["evaluation"]["clean_accuracy"] for r in natural]
    assert f"| natural | here, 2 seeds | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} |" in text
    assert "| natural | paper | 92.89 | 67.22 | 49.80 | 56.98 | 19.20 | 48.30 |" in text
    assert "| natural + LAD | paper | +0.15 | +4.57 | +1.38 | +9.04 | +9.07 | +6.02 |" in text
    assert render(TABLE1, records[::-1]) == text


def test_differences_are_paired_by_seed(finished):
    records = load_records(finished)
    by_key = {(r["config"]["method"], r["config"]["training"]["seed"]): r["evaluation"] for r in records}
    clean = [100 * (by_key["lad", s]["clean_accuracy"] - by_key["natural", s]["clean_accuracy"]) for s in (0, 1)]
    expected = f"| natural + LAD | here, 2 pairs | {statistics.fmean(clean):+.2f} ± {statistics.stdev(clean):.2f} |"
    assert expected in render(TABLE1, records)


def test_records_that_do_not_belong_together_are_refused(finished):
    records = load_records(finished)
    altered = json.loads(json.dumps(records))
    altered[1]["config"]["depth"] = 14
    with pytest.raises(ValueError, match=r"^records: lad seed 1 was run at another size"):
        render(TABLE1, altered)
    with pytest.raises(ValueError, match=r"^records: got none"):
        render(TABLE1, [])


def test_what_would_be_pooled_wrongly_is_refused(finished):
    records = load_records(finished)
    other_eta = json.loads(json.dumps(records))
    other_eta[0]["config"]["training"]["eta"] = 5.0
    with pytest.raises(ValueError, match=r"^records: lad was run with \(scheme, eta\)"):
        render(TABLE1, other_eta)
    with pytest.raises(ValueError, match=r"^records: lad seed 0 is there twice"):
        render(TABLE1, [*records, records[0]])
    unknown = json.loads(json.dumps(records[:1]))
    unknown[0]["config"]["method"] = "pgd"
    with pytest.raises(ValueError, match=r"'pgd' is not a row of table1"):
        render(TABLE1, unknown)
    changed = json.loads(json.dumps(records))
    for record in changed:
        record["config"]["training"]["lr"] = 0.01
        if record["config"]["method"] == "lad":
            record["config"]["training"]["eta"] = 7.0
    first = render(TABLE1, changed).splitlines()[0]
    assert "lr 0.01 instead of 0.1" in first
    assert "eta 7 instead of 50 for natural + LAD" in first
    without_baseline = [r for r in records if r["config"]["method"] != "natural"]
    assert "Difference" not in render(TABLE1, without_baseline)


def test_other_data_under_the_same_name_is_another_run(finished):
    data = tiny_data()
    other = dataclasses.replace(data, train_images=255 - data.train_images)
    with pytest.raises(FileExistsError, match=r"on other data"):
        run(tiny_runs()[0], other, finished, log=io.StringIO())


def test_leftovers_of_an_interrupted_write_do_no_harm(finished):
    leftover = finished / ".tmp-cifar10-lad-seed0-x.json"
    leftover.write_text("")
    assert len(load_records(finished)) == 6
    leftover.unlink()
    broken = finished / "cifar10-lad-seed9.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"seed9\.json: is not JSON"):
        load_records(finished)
    broken.unlink()


def test_the_papers_preset_is_appendix_b():
    runs = configurations(TABLE1, PRESETS["paper"])
    assert len(runs) == 9
    for config in runs:
        training = config.training
        assert (config.depth, config.width, config.train_images, config.test_images) == (56, 16, None, None)
        assert (training.epochs, training.milestones, training.batch_size) == (160, (80, 120), 128)
        assert (training.lr, training.momentum, training.weight_decay) == (0.1, 0.9, 1e-4)
        assert training.precision == "fp32"
        assert training.eta == {"natural": 0.0, "lad": 50.0, "lad-sm": 50.0}[config.method]
    cifar100 = configurations(TABLE1, PRESETS["paper"], dataset="cifar100", methods=["lad"], seeds=[5])
    assert [(c.training.epochs, c.training.milestones, c.training.eta) for c in cifar100] == [(300, (150, 225), 1000.0)]
    with pytest.raises(ValueError, match="methods: 'pgd' is not a row of table1; it has natural, lad, lad-sm"):
        configurations(TABLE1, PRESETS["paper"], methods=["pgd"])
    with pytest.raises(ValueError, match=r"^dataset: got 'svhn'"):
        configurations(TABLE1, PRESETS["paper"], dataset="svhn")


def test_a_configuration_has_one_key():
    runs = tiny_runs()
    assert len({config.key for config in runs}) == len(runs)
    assert tiny_runs()[0].key == runs[0].key


@pytest.mark.parametrize("page", sorted(RESULTS.rglob("table1.md")), ids=lambda page: page.parent.name)
def test_committed_tables_are_those_of_their_json(page):
    assert page.read_text(encoding="utf-8") == render(TABLE1, load_records(page.parent))


def test_the_page_of_benchmarks_is_that_of_their_json(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import page

    folder = RESULTS / "benchmarks"
    assert (folder / "README.md").read_text(encoding="utf-8") == page(folder)


def test_the_example_explains_itself_and_names_missing_data(tmp_path):
    example = [sys.executable, str(ROOT / "examples" / "table1.py")]
    shown = subprocess.run([*example, "--help"], capture_output=True, text=True, check=True, timeout=120)
    assert all(preset in shown.stdout for preset in PRESETS)
    failed = subprocess.run(
        [*example, "--dataset", "folder", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert failed.returncode != 0
    assert failed.stderr.splitlines()[-1].startswith("table1.py: error: ")
    assert "Traceback" not in failed.stderr


def test_the_example_refuses_a_folder_of_other_runs(finished, tmp_path):
    for path in finished.glob("*.json"):
        (tmp_path / path.name.replace("cifar10", "digits")).write_text(path.read_text())
    example = [sys.executable, str(ROOT / "examples" / "table1.py"), "--out", str(tmp_path)]
    failed = subprocess.run(example, capture_output=True, text=True, check=False, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("table1.py: error: out: ")
