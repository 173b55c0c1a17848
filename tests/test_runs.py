"""Runs: folders, locks, running again, the command line."""

import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from odeadv import cli, data, experiments
from odeadv.evaluation import Evaluation
from odeadv.experiments import (
    DataConfig,
    Job,
    Measurement,
    ModelConfig,
    RunConfig,
    RunLockedError,
    launch,
    load_model,
    run,
)
from odeadv.experiments._folder import locked
from odeadv.models import preact_resnet
from odeadv.support.files import DamagedFileError, read_tensors, write_tensors
from odeadv.support.machine import processor
from odeadv.support.plain import identity
from odeadv.training import Layerwise, Pgd, TrainConfig, TrainingDiverged, Undefended, weights_digest

pytestmark = pytest.mark.filterwarnings("ignore:eta. .* is for the mean over batches:UserWarning")

ROOT = Path(__file__).parents[1]


def small(**changes) -> RunConfig:
    training = TrainConfig(
        **{"epochs": 2, "batch_size": 32, "milestones": (1,), "defence": Layerwise("lie", 5.0), **changes}
    )
    return RunConfig(DataConfig("digits", 96, 20, 20), ModelConfig(depth=8, width=4), training)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """Return the folder of a run of `small`, evaluated by table1. Tests only read it."""
    runs = tmp_path_factory.mktemp("finished")
    run(small(), digits, runs, protocols=("table1",), log=StringIO())
    return runs / small().name


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """Return a copy of the finished run in the test's folder."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


class TestFolder:
    def test_a_run_leaves_its_record_metrics_and_weights(self, digits, tmp_path):
        config = small(objective=Pgd(steps=1))
        record = run(config, digits, tmp_path, protocols=("table2",), log=StringIO())
        folder = tmp_path / config.name
        assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
            "best.safetensors", "config.json", "last.safetensors", "metrics.jsonl", "record.json",
        ]  # fmt: skip
        assert json.loads((folder / "record.json").read_text()) == json.loads(json.dumps(record))
        assert RunConfig.from_dict(json.loads((folder / "config.json").read_text())) == config
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2]
        assert all(line["ratio"] > 0 and line["validation"]["robust"] >= 0 for line in lines)
        net, info = load_model(folder)
        assert info["run"] == config.to_dict()
        assert not net.training
        plain = preact_resnet(8, 4, num_classes=10)  # the snippet of docs/training.md
        plain.load_state_dict(load_file(folder / "last.safetensors"))
        assert plain.state_dict().keys() == net.state_dict().keys()
        assert all(map(torch.equal, plain.state_dict().values(), net.state_dict().values()))
        evaluated = experiments.load_records(tmp_path)[0]["evaluations"]
        assert set(evaluated) == {"last", "best"}

    def test_a_finished_run_is_not_run_again_but_evaluated_further(self, digits, tmp_path, copied, monkeypatch):
        config = small()
        monkeypatch.setattr("odeadv.experiments._run.train", None)
        before = (copied / "record.json").read_bytes()
        log = StringIO()
        run(config, digits, tmp_path, protocols=("table1",), log=log)
        assert "already there" in log.getvalue()
        assert (copied / "record.json").read_bytes() == before
        record = run(config, digits, tmp_path, protocols=("table1", "table2"), log=StringIO())
        assert set(record["evaluations"]["last"]) == {"table1", "table2"}

    def test_some_of_the_images_may_be_evaluated_and_the_last_weights_only(self, digits, tmp_path, copied):
        config = small()
        some = Measurement("table1", 12, best=False)
        record = run(config, digits, tmp_path, protocols=("table1", some), log=StringIO())
        assert set(record["evaluations"]["last"]) == {"table1", "table1@12"}
        assert set(record["evaluations"]["best"]) == {"table1"}
        part, whole = (record["evaluations"]["last"][key] for key in ("table1@12", "table1"))
        assert part["n"] == 12
        outcomes = [Evaluation.from_dict(each).clean_outcomes for each in (part, whole)]
        assert torch.equal(outcomes[0], outcomes[1][:12])
        assert not list(copied.glob("*.journal"))
        last = part
        record = run(config, digits, tmp_path, protocols=(Measurement("table1", 12),), log=StringIO())
        assert set(record["evaluations"]["best"]) == {"table1", "table1@12"}  # what was left out can be asked for later
        assert record["evaluations"]["last"]["table1@12"] == last
        with pytest.raises(ValueError, match="images: got 0"):
            Measurement("table1", 0)

    def test_the_weights_are_the_ones_evaluated(self, digits, finished):
        record = experiments.load_record(finished / "record.json")
        net, _ = load_model(finished / "last.safetensors")
        subset, _ = small().data.take(digits)
        images = data.to_float(subset.test_images)
        with torch.no_grad():
            accuracy = (net(images).argmax(1) == subset.test_labels).float().mean().item()
        assert record["evaluations"]["last"]["table1"]["clean_accuracy"] == pytest.approx(accuracy)

    def test_what_cannot_be_evaluated_or_is_other_data_is_said_before_training(self, digits, tmp_path):
        with pytest.raises(ValueError, match="did you mean 'table2'"):
            run(small(), digits, tmp_path, protocols=("tabel2",), log=StringIO())
        with pytest.raises(ValueError, match=r"^data: got 'digits', expected 'cifar10'"):
            run(replace(small(), data=DataConfig("cifar10")), digits, tmp_path, log=StringIO())
        assert not list(tmp_path.iterdir())

    def test_what_is_compared_when_a_run_goes_on_leaves_out_defaults(self):
        """If a later version adds a field whose default changes nothing, earlier runs can still be continued."""
        assert identity(small()) == {
            "data": {"name": "digits", "train_images": 96, "test_images": 20, "validation_images": 20},
            "model": {"depth": 8, "width": 4},
            "training": {
                "defence": {"name": "layerwise", "eta": 5.0}, "epochs": 2, "batch_size": 32, "milestones": [1],
            },
        }  # fmt: skip

    def test_other_data_in_a_runs_folder_are_refused(self, digits, tmp_path, copied):
        other = replace(digits, train_labels=digits.train_labels.flip(0))
        with pytest.raises(ValueError, match="other data"):
            run(small(), other, tmp_path, log=StringIO())

    def test_two_processes_cannot_write_one_run(self, digits, tmp_path):
        config = small(epochs=1)
        with locked(tmp_path / config.name), pytest.raises(RunLockedError, match="another process is writing"):
            run(config, digits, tmp_path, log=StringIO())
        run(config, digits, tmp_path, log=StringIO())

    def test_a_failed_run_does_not_keep_others_from_running(self, digits, tmp_path):
        one_step = replace(small(lr=1e30, batch_size=96, epochs=2))  # weights are lost between two epochs
        no_model = replace(small(), model=ModelConfig(depth=8, options={"nope": 1}))
        jobs = [
            Job(small(lr=1e30)), Job(small(lr=1e30, objective=Pgd(steps=1), defence=Undefended())), Job(one_step),
            Job(no_model), Job(small()),
        ]  # fmt: skip
        records, failures = launch(jobs, tmp_path, log=StringIO())
        assert [record["key"] for record in records] == [jobs[4].config.key]
        assert [failure.job for failure in failures] == jobs[:4]
        assert all("training: epoch" in f.reason and "lower lr" in f.reason for f in failures[:3])
        assert "eta" not in failures[1].reason
        assert "nope" in failures[3].reason
        with pytest.raises(ValueError, match=r"^launcher: got 'slurm'"):
            launch(jobs, tmp_path, launcher="slurm")

    def test_two_processes_share_the_runs_of_one_list(self, digits, tmp_path):
        """A run that another process has is taken last, and is then waited for."""
        jobs = [Job(small(epochs=1), ("table1",)), Job(small(epochs=1, seed=1)), Job(small(epochs=1, lr=1e30))]
        theirs = FileLock(tmp_path / jobs[0].config.name / ".lock", thread_local=False)
        (tmp_path / jobs[0].config.name).mkdir()
        theirs.acquire()
        text = []

        class Log(StringIO):
            def write(self, line):
                if "failed" in line:  # the last of the others
                    theirs.release()
                text.append(line)
                return len(line)

        records, failures = launch(jobs, tmp_path, log=Log(), pause=0.1)
        assert [record["key"] for record in records] == [jobs[0].config.key, jobs[1].config.key]
        assert [failure.job for failure in failures] == [jobs[2]]
        shown = "".join(text)
        assert shown.count("is run by another process, others first") == 1
        assert shown.index("seed 1] epoch 1/1") < shown.index("seed 0] epoch 1/1")

    def test_a_folder_with_anything_in_it_can_be_listed(self, tmp_path, copied, capsys):
        path = copied / "record.json"
        record = json.loads(path.read_text())
        (measured,) = record["evaluations"]["last"].values()
        record["evaluations"]["last"]["worst"] = {**measured, "clean_accuracy": 0.5, "average": None}
        path.write_text(json.dumps(record))
        bad = {
            "broken": "{", "empty": "", "a-list": "[]", "unknown": '{"trainign": 1}', "deep": "[" * 100_000,
        }  # fmt: skip
        for name, text in bad.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(text)
        (tmp_path / "bytes" / "config.json").mkdir(parents=True)
        cut = {
            "cut": path.read_text()[:999],
            "other": '{"a": 1}',
            "lacking": {**record, "epochs": None},
            "not-a-file": 0,
        }
        for name, text in cut.items():
            shutil.copytree(path.parent, tmp_path / name)
            (tmp_path / name / "record.json").write_text(text if isinstance(text, str) else json.dumps(text))
        assert cli.main(["runs", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert shown.count("  unreadable: ") == len(shown.splitlines()) - 1 == len(bad) + len(cut) + 1
        assert "lacking/record.json: epochs: got None, expected a list" in shown
        assert "worst: clean 50.00, average -" in shown
        with pytest.warns(
            experiments.RecordWarning, match="left out, not a readable record: .*cut/record.json: is not"
        ):
            assert len(experiments.load_records(tmp_path)) == 1

    def test_a_listing_imports_no_module(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("never_imported.py").write_text("raise SystemExit('imported')\n")
        training = {"objective": {"name": "awp", "base": "never_imported:A"}, "defence": {"name": "never_imported:B"}}
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.json").write_text(json.dumps({"training": training}))
        assert cli.main(["runs", "."]) == 0
        assert capsys.readouterr().out == "x  stopped, epoch 0/160\n"
        assert experiments.list_runs(tmp_path)[0]["method"] == "awp+never_imported:B"

    def test_looking_does_not_keep_a_run_from_starting(self, tmp_path):
        holding = FileLock(tmp_path / ".lock", thread_local=False)
        holding.acquire()
        timer = threading.Timer(0.2, holding.release)
        timer.start()
        with locked(tmp_path):
            assert not holding.is_locked
        timer.join()


def test_event_files_are_what_tensorboard_reads(tmp_path, digits):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small()
    record = run(config, digits, tmp_path, log=StringIO(), tensorboard=True)
    events = reader.EventAccumulator(str(tmp_path / config.name / "tensorboard"))
    events.Reload()
    for name in ("loss", "accuracy", "lr", "ratio", "validation/clean"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        kept = [
            (epoch["epoch"], epoch["validation"]["clean"] if "/" in name else epoch[name]) for epoch in record["epochs"]
        ]
        assert told == [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in kept]


class TestAgain:
    def test_a_run_from_its_record_alone_is_the_same_to_the_bit(self, digits, tmp_path, capsys, monkeypatch):
        config = small(epochs=1, objective=Pgd(steps=1))
        protocols = ("table1", Measurement("table2", 12, best=False))
        record = run(config, digits, tmp_path / "runs", protocols=protocols, log=StringIO())
        file = tmp_path / "runs" / config.name / "record.json"
        assert cli.main(["rerun", str(file.parent), "--runs", str(tmp_path / "again")]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[:3] == [
            "training losses: the same to the bit",
            "weights: the same to the bit",
            "table1, last weights, clean: 0 of 20 outcomes differ",
        ]
        assert "table2@12, last weights, ifgsm-20 at 8/255, worst so far: 0 of 12 outcomes differ" in shown
        assert not any(line.startswith("table2@12, best") or "not run again" in line for line in shown)
        assert cli.main(["rerun", str(file), "--runs", str(tmp_path / "runs")]) == 2
        assert "is the folder that the record is in" in capsys.readouterr().err

        again = tmp_path / "again" / config.name / "record.json"
        again.write_text(again.read_text().replace(str(torch.__version__), "1.0"))
        assert cli.main(["rerun", str(file), "--runs", str(tmp_path / "again")]) == 2
        assert "is of other versions than those of now" in capsys.readouterr().err

        other = run(
            small(epochs=1, objective=Pgd(steps=1), seed=1), digits, tmp_path, protocols=protocols[:1], log=StringIO()
        )
        found = experiments.agreement(record, {**other, "versions": {**other["versions"], "torch": "1.0"}})
        pairs = [(a["loss"], b["loss"]) for a, b in zip(record["epochs"], other["epochs"], strict=True)]
        assert found.losses == max(abs(a - b) / a for a, b in pairs) > 0
        assert (found.weights, found.same) == (False, False)
        assert found.not_run == ("table2@12, last weights",)
        mine, theirs = (r["evaluations"]["last"]["table1"]["clean_correct"] for r in (record, other))
        different, n = found.outcomes["table1, last weights, clean"]
        assert n == 20
        assert different >= abs(mine - theirs)
        assert "weights: different" in str(found)
        assert f"torch: {torch.__version__} then, 1.0 now" in str(found)

    def test_what_is_no_longer_the_same_run_is_refused_before_it_is_trained(
        self, digits, tmp_path, finished, monkeypatch
    ):
        record = experiments.load_record(finished / "record.json")
        monkeypatch.setattr("odeadv.experiments._rerun.run", None)
        with pytest.raises(ValueError, match=r"^record: its key is 0123, but its configuration has"):
            experiments.rerun({**record, "key": "0123"}, digits, tmp_path / "again")
        with pytest.raises(ValueError, match=r"^data: the images of the record have the fingerprint abc, these"):
            experiments.rerun({**record, "data": {"fingerprint": "abc"}}, digits, tmp_path / "again")
        old = {"last": {"table1": {"schema": "odeadv.evaluation/1"}}}
        with pytest.raises(ValueError, match=r"^record: .*table1 cannot.*schema: got 'odeadv.evaluation/1'"):
            experiments.rerun({**record, "evaluations": old}, digits, tmp_path / "again")

    def test_what_is_missing_wrong_or_unknown_in_a_record_is_named(self, tmp_path):
        file = tmp_path / "record.json"

        def changed(change):
            record = json.loads(next((ROOT / "docs" / "results" / "runs").glob("cifar10-pgd-seed0*.json")).read_text())
            change(record)
            file.write_text(json.dumps(record))
            return experiments.load_record(file)

        for part in ("key", "config", "evaluations", "versions", "epochs"):
            with pytest.raises(ValueError, match=rf"record.json: not a whole record of a run, expected {part} in it"):
                changed(lambda record, part=part: record.pop(part))
        wrong = {
            "epochs[1].loss: is missing": lambda record: record["epochs"][1].pop("loss"),
            "data.fingerprint: got 3, expected a string": lambda record: record["data"].update(fingerprint=3),
            "config.training.seed: got 'a', expected an integer": lambda r: r["config"]["training"].update(seed="a"),
            "evaluations.last: got a list, expected a mapping": lambda record: record["evaluations"].update(last=[]),
            "epochs[0].lr: got inf, expected a finite number": lambda record: record["epochs"][0].update(lr=1e400),
        }
        for message, change in wrong.items():
            with pytest.raises(
                ValueError, match=re.escape(f"record.json: {message}") if "inf" not in message else "JSON"
            ):
                changed(change)
        with pytest.warns(experiments.RecordWarning, match=r"unknown fields are ignored: epochs\[0\].mood, note"):
            changed(lambda record: (record.update(note=1), record["epochs"][0].update(mood=1)))

    def test_records_of_autoattack_and_unknown_protocols_are_not_run_again_unasked(self, digits, tmp_path):
        config = small(epochs=1)
        record = run(config, digits, tmp_path, protocols=("table1",), log=StringIO())
        (evaluation,) = record["evaluations"]["last"].values()
        record["evaluations"]["last"] |= {"autoattack-8@100": evaluation, "mine": evaluation}
        found = experiments.rerun(record, digits, tmp_path / "again", log=StringIO())
        assert found.same
        assert found.not_run == ("autoattack-8@100, last weights", "mine, last weights")

    def test_another_machine_is_named(self, digits, tmp_path):
        config = small(epochs=1)
        record = run(config, digits, tmp_path, log=StringIO())
        assert experiments.agreement(record, record).machines == {}
        old = {**record, "machine": {"device": "a", "threads": 3}}
        found = experiments.agreement(old, record)
        assert found.same
        assert set(found.machines) == {"device", "processor", "threads", "processes"}
        assert f"threads: 3 then, {torch.get_num_threads()} now" in str(found)
        assert f"processor: not recorded then, {processor()} now" in str(found)


class TestFiles:
    def test_what_is_altered_or_cut_off_is_noticed(self, tmp_path):
        tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.empty(0)}
        file = tmp_path / "x.safetensors"
        write_tensors(file, tensors, {"k": [1, 2.5, None, "ü"]})
        found, info = read_tensors(file)
        assert info == {"k": [1, 2.5, None, "ü"]}
        assert all(
            torch.equal(value, found[name]) and value.dtype == found[name].dtype for name, value in tensors.items()
        )
        whole = file.read_bytes()
        for position in range(0, len(whole), 7):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(DamagedFileError):
                read_tensors(file)
            file.write_bytes(whole[:position])
            with pytest.raises(DamagedFileError):
                read_tensors(file)

    def test_weights_of_something_else_are_refused(self, tmp_path):
        write_tensors(tmp_path / "last.safetensors", {"a": torch.ones(1)}, {"schema": "other"})
        with pytest.raises(ValueError, match="schema is 'other'"):
            load_model(tmp_path)
        with pytest.raises(FileNotFoundError):
            load_model(tmp_path / "nothing")
        (tmp_path / "record.json").write_text("{}")
        with pytest.raises(ValueError, match="holds no weights, expected the folder of a run"):
            load_model(tmp_path / "record.json")


class TestCommand:
    def test_train_evaluate_and_list(self, tmp_path, capsys):
        file = tmp_path / "run.json"
        file.write_text(json.dumps(small(epochs=1).to_dict()))
        runs = tmp_path / "runs"
        assert cli.main(["train", str(file), "--runs", str(runs), "--accelerator", "cpu", "--protocol", "table1"]) == 0
        folder = runs / small(epochs=1).name
        assert str(folder) in capsys.readouterr().out
        out = tmp_path / "e.json"
        assert cli.main(["evaluate", str(folder), "--protocol", "table2", "--images", "20", "--out", str(out)]) == 0
        assert len(json.loads(out.read_text())["attacks"]) == 4
        capsys.readouterr()
        assert cli.main(["runs", str(runs)]) == 0
        line = capsys.readouterr().out
        assert "natural-lad" in line
        assert "finished, epoch 1/1" in line
        assert cli.main(["runs", str(runs), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"

    def test_a_finished_run_is_extended_started_from_and_drawn(self, digits, tmp_path, capsys):
        runs = ["--runs", str(tmp_path)]
        for epochs in (1, 2):
            (tmp_path / f"{epochs}.json").write_text(json.dumps(small(epochs=epochs).to_dict()))
        first, second = (tmp_path / small(epochs=epochs).name for epochs in (1, 2))
        assert cli.main(["train", str(tmp_path / "1.json"), *runs, "--checkpoint-every", "0"]) == 0
        assert [path.name for path in (first / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
        assert cli.main(["train", str(tmp_path / "2.json"), *runs, "--extend", str(first)]) == 0
        assert "resumes at epoch 2/2, step 1/3" in capsys.readouterr().err
        whole = tmp_path / "whole" / second.name
        run(small(), digits, whole.parent, log=StringIO())
        assert not (whole / "checkpoints").exists()
        for one, other in zip(
            *(read_tensors(f / "last.safetensors")[0].values() for f in (second, whole)), strict=True
        ):
            assert torch.equal(one, other)
        with pytest.raises(ValueError, match=r"^extend: .* lacks a checkpoint, expected the folder of a run that kept"):
            run(small(epochs=3), digits, tmp_path, extend=whole, log=StringIO())

        assert cli.main(["train", str(tmp_path / "1.json"), *runs, "--init", str(second)]) == 0
        started = Path(capsys.readouterr().out.splitlines()[-1])
        digest = weights_digest(second)
        record = experiments.load_record(started / "record.json")
        assert started not in (first, second)
        assert record["config"]["init"] == digest == weights_digest(read_tensors(second / "last.safetensors")[0])
        with pytest.raises(ValueError, match=rf"^init: got none, expected the weights {digest}"):
            experiments.rerun(record, digits, tmp_path / "again", log=StringIO())
        with pytest.raises(
            ValueError, match=rf"^init: .* holds the weights {weights_digest(first)}, expected {digest}"
        ):
            experiments.rerun(record, digits, tmp_path / "again", init=first, log=StringIO())
        assert experiments.rerun(record, digits, tmp_path / "again", init=second, log=StringIO()).same

        (second / "record.json").unlink()
        assert cli.main(["runs", str(second), "--plot"]) == 0  # from metrics.jsonl
        assert (second / "training.png").read_bytes()[:4] == b"\x89PNG"
        assert cli.main(["runs", str(tmp_path), "--plot"]) == 2
        assert "has neither record.json nor metrics.jsonl" in capsys.readouterr().err
        (second / "metrics.jsonl").write_text('{"epoch": 1}\n')
        assert cli.main(["runs", str(second), "--plot"]) == 2
        assert "metrics.jsonl: EpochResult lacks loss, accuracy, lr, seconds" in capsys.readouterr().err

    def test_an_evaluation_by_a_protocol_of_ones_own_goes_on_where_it_was_stopped(
        self, digits, tmp_path, capsys, monkeypatch
    ):
        config = small(epochs=1)
        run(config, digits, tmp_path, log=StringIO())
        (tmp_path / "mine.yaml").write_text(
            "name: mine\nattacks:\n  - {name: ifgsm, eps: 8/255, alpha: 2/255, steps: 3}\n"
            "  - {name: pgd, eps: 8/255, alpha: 2/255, steps: 2, options: {loss: margin}}\n"
        )
        out = tmp_path / "e.json"
        arguments = ["evaluate", str(tmp_path / config.name), "--protocol", str(tmp_path / "mine.yaml")]
        arguments += ["--images", "15", "--batch-size", "5", "--out", str(out)]
        shown = []

        class Stopping:
            def __call__(self, done, total):
                shown.append((done, total))
                if len(shown) == 2:
                    raise KeyboardInterrupt

        monkeypatch.setattr("odeadv.evaluation.ProgressLine", Stopping)
        assert cli.main(arguments) == 130
        assert not out.exists()
        assert (tmp_path / "e.json.journal").exists()
        assert cli.main(arguments) == 0
        assert shown == [(1, 3), (2, 3), (2, 3), (3, 3)]  # the journal's two batches are not run again
        assert not (tmp_path / "e.json.journal").exists()
        again = tmp_path / "again.json"
        assert cli.main([*arguments[:-1], str(again), "--fold"]) == 0
        found, other = (json.loads(file.read_text()) for file in (out, again))
        assert [attack["name"] for attack in found["attacks"]] == ["ifgsm", "pgd"]
        assert found["protocol"] == "mine"
        assert (found["settings"]["fold"], other["settings"]["fold"]) == (False, True)
        capsys.readouterr()
        (tmp_path / "mine.yaml").write_text("name: mine\nattacks:\n  - {name: ifgsm, eps: 8/255, step: 3}\n")
        assert cli.main(arguments) == 2
        assert "did you mean 'steps'" in capsys.readouterr().err

    def test_compare_runs_and_evaluations(self, digits, tmp_path, capsys):
        folders = []
        for config in (small(epochs=2), small(epochs=2, defence=Undefended())):
            run(config, digits, tmp_path, protocols=["table1"], log=StringIO())
            folders.append(tmp_path / config.name)
        a, b = ([str(folder), str(folder / "record.json")] for folder in folders)
        assert cli.main(["compare", a[0], b[1], "--protocol", "table1", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        first, second = (json.loads((folder / "record.json").read_text()) for folder in folders)
        first, second = (record["evaluations"]["last"]["table1"] for record in (first, second))
        assert found["clean"]["only_a"] - found["clean"]["only_b"] == first["clean_correct"] - second["clean_correct"]
        strong = found["ifgsm-20 at 1/255"]
        assert strong["only_a"] + strong["both"] == first["attacks"][3]["robust_correct"]
        assert len(found) == 1 + 2 * 4 + 1  # clean, two scores of four attacks, worst case
        (tmp_path / "e.json").write_text(json.dumps(first))  # as odeadv evaluate writes it
        assert cli.main(["compare", str(tmp_path / "e.json"), b[0], "--protocol", "table1"]) == 0
        printed = capsys.readouterr().out
        assert f"{100 * first['clean_accuracy']:7.2f}{100 * second['clean_accuracy']:7.2f}" in printed
        assert "ifgsm-20 at 1/255, worst so far" in printed
        assert cli.main(["compare", a[0], b[0]]) == 2
        assert re.search("got 'table2' of the last weights in .*, expected table1", capsys.readouterr().err)

    def test_diagnose_one_run_and_two_side_by_side(self, digits, tmp_path, capsys):
        lad, plain = small(epochs=1), small(epochs=1, defence=Undefended())
        for config in (lad, plain):
            run(config, digits, tmp_path, log=StringIO())
        first, second, out = str(tmp_path / lad.name), str(tmp_path / plain.name), tmp_path / "page"
        assert cli.main(["diagnose", second, "--images", "2"]) == 0
        assert "so eta is 0; --eta measures another" in capsys.readouterr().err
        assert (tmp_path / plain.name / "diagnostics" / "diagnostics.md").exists()
        options = ["--images", "2", "--attack", "8", "--out", str(out)]
        assert cli.main(["diagnose", first, "--other", second, *options]) == 0
        found = json.loads((out / "diagnostics.json").read_text())
        assert list(found["fields"]) == ["natural + LAD", "natural"]
        for measured in found["fields"].values():
            assert measured["contraction"]["eta"] == 5.0  # of the run that was trained with one
            assert measured["growth"]["linear"] is False
            assert measured["growth"]["size"] > 0
        page = (out / "diagnostics.md").read_text()
        assert page.startswith("# Dynamics: natural + LAD and natural, ResNet-8 of width 4, digits\n")
        assert (
            f"\n{lad.name} with eta 5 and {plain.name} with eta 5 (trained without a defence), on 2 test images.\n"
            in page
        )
        assert "| quantity | natural + LAD | natural |" in page
        assert cli.main(["diagnose", first, "--other", first, "--images", "2"]) == 2
        assert f"other: got {lad.name} twice, expected another run" in capsys.readouterr().err
        assert cli.main(["diagnose", first, "--other", "digits-pgd", "--images", "2"]) == 2
        size = "trained on digits of 16 x 16 pixels, expected one for digits of 32 x 32 pixels"
        assert f"other: got digits-pgd, {size}" in capsys.readouterr().err
        assert cli.main(["audit", first, "--surrogate", "digits-pgd", "--images", "10"]) == 2
        assert f"surrogate: got digits-pgd, {size}" in capsys.readouterr().err

    def test_a_seed_and_an_objective_of_the_working_directory(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "objective_of_mine.py").write_text(
            "from dataclasses import dataclass\n"
            "from odeadv.training import Objective\n"
            "@dataclass(frozen=True)\n"
            "class Mine(Objective, name='test-mine'):\n"
            "    def __call__(self, step):\n"
            "        return step.defended(step.images)\n"
        )
        plain = small(epochs=1).to_dict()
        plain["training"]["objective"] = {"name": "objective_of_mine:Mine"}
        (tmp_path / "run.json").write_text(json.dumps(plain))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
        assert cli.main(["train", "run.json", "--seed", "7", "--accelerator", "cpu"]) == 0
        folder = capsys.readouterr().out.strip()
        assert "test-mine-lad-seed7" in folder
        monkeypatch.delitem(sys.modules, "objective_of_mine")
        (tmp_path / "objective_of_mine.py").unlink()
        net, _ = load_model(folder)  # the weights do not need it
        assert not net.training
        assert cli.main(["evaluate", folder, "--images", "10", "--out", "e.json"]) == 0

    def test_configurations_are_printed_and_changed(self, capsys):
        changes = ["--set", "training.epochs=3", "--set", "training.milestones=[2]"]
        assert cli.main(["train", "--method", "pgd+lad", *changes, "--print-config"]) == 0
        printed = capsys.readouterr().out
        import yaml

        config = RunConfig.from_dict(yaml.safe_load(printed))
        assert config.training.epochs == 3
        assert config.method == "pgd+lad"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train"], "give either a configuration file or --method"),
            (["train", "--method", "gpd"], "method: got 'gpd'"),
            (["train", "--method", "pgd", "--set", "training.epoch=3"], "did you mean 'epochs'"),
            (["train", "nothing.yaml"], "nothing.yaml"),
            (["train", "nothing.yaml", "--preset", "cpu"], "preset, dataset: got one for a configuration file"),
            (["evaluate", "nothing"], "nothing"),
            (["evaluate", "nothing", "--protocol", "nothing.yaml"], "nothing.yaml"),
            (["compare", "nothing.json", "nothing.json"], "nothing.json"),
            (["tune", "--method", "pgd", "--etas", "1"], "lacks an eta to choose"),
            (["report", "table1", "nowhere", "--out", "x"], "records: nowhere is not a folder"),
            (["report", "table1", ".", "--out", "setup.py"], "out: setup.py is not a folder"),
            (["runs", "nowhere"], "folder: nowhere does not exist"),
            (["evaluate", "setup.py"], "setup.py holds no weights, expected the folder of a run"),
            (["evaluate", "nothing", "--out", "tests"], "out: tests is a folder, expected the path of a file"),
            (["audit", "nothing", "--out", "setup.py"], "out: setup.py is not a folder"),
            (["diagnose", "nothing", "--out", "setup.py/x"], "setup.py is not a folder, so setup.py/x cannot be"),
            (["diagnose", "nothing", "--attack", "-3"], "attack: got -3, expected a radius in 1/255"),
            (["audit", "digits-pgd", "--eps", "0.03137"], "eps: got 0.03137, expected a radius in 1/255, such as 8"),
            (["evaluate", "digits-pgd", "--eps", "8"], "odeadv evaluate --help lists the arguments"),
            (["audit", "digits-pgd", "--eps", "8/256"], "eps: got 8/256, expected a radius in 1/255"),
            (
                ["audit", "digits-pgd", "--eps", "much", "--norm", "l2"],
                "eps: got much, expected a length in pixel units",
            ),
            (["diagnose", "digits-pgd", "--attack", "0.03"], "attack: got 0.03, expected a radius in 1/255"),
            (["diagnose", "torchvision.models:resnet18"], "from Python, odeadv.diagnostics.diagnose(net.field("),
            (["train", "--method", "PGD+LAD"], "did you mean 'pgd+lad'?"),
            (["table", "table1", "--out", "setup.py"], "out: setup.py is not a folder"),
            (["table", "table1", "--runs", "setup.py", "--out", "x"], "runs: setup.py is not a folder"),
            (["table", "table1", "--rehearse", "1"], "rehearse: got 1, expected 2 steps or more"),
            (["train", "--method", "natural", "--runs", "setup.py"], "runs: setup.py is not a folder"),
            (["train", "--method", "natural", "--dataset", "folder"], "data: got None"),
            (["train", "tests"], "config: tests is a folder"),
            (["train", "--method", "pgd", "--set", "training.objective.eps=8"], "is it in units of 1/255?"),
            (["tune", "--method", "pgd+lad", "--etas", "1", "--out", "tests"], "out: tests is a folder"),
            (["rerun", "setup.py"], "setup.py: is not JSON"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys, monkeypatch):
        monkeypatch.chdir(ROOT)
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert "usage: odeadv" in capsys.readouterr().out

    def test_a_diverged_run_is_exit_status_one(self, tmp_path, capsys):
        file = tmp_path / "run.json"
        file.write_text(json.dumps(small(lr=1e30).to_dict()))
        assert cli.main(["train", str(file), "--runs", str(tmp_path), "--accelerator", "cpu"]) == 1
        assert "lower lr" in capsys.readouterr().err


def test_eta_is_chosen_on_folds_of_the_training_set(digits, tmp_path):
    config = replace(small(epochs=1), data=DataConfig("digits", 96, 18))
    found = experiments.tune(
        config, digits, [0.0, 5.0], runs=tmp_path, folds=3, only=2, protocol="table1", log=StringIO()
    )
    assert [len(candidate["scores"]) for candidate in found["candidates"]] == [2, 2]
    best = max(found["candidates"], key=lambda candidate: candidate["mean"])
    assert found["chosen"] == best["eta"]
    records = experiments.load_records(tmp_path)
    assert {record["key"] for record in records} == {k for c in found["candidates"] for k in c["keys"]}
    assert len({record["data"]["fingerprint"] for record in records}) == 2
    test = {image.numpy().tobytes() for image in digits.test_images}
    for fold in range(3):
        part = digits.fold(fold, 3)
        assert not test & {image.numpy().tobytes() for image in part.test_images[:50]}
        assert len(part.train_labels) + len(part.test_labels) == len(digits.train_labels)


def test_a_run_that_diverges_raises_and_leaves_no_record(digits, tmp_path):
    with pytest.raises(TrainingDiverged):
        run(small(lr=1e30), digits, tmp_path, log=StringIO())
    assert not list(tmp_path.glob("*/record.json"))
    shutil.rmtree(tmp_path)
