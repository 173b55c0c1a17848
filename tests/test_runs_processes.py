"""Runs in other processes: kill -9, two processes of one run, Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from test_runs import small

from odeadv import cli
from odeadv.experiments import DataConfig, Job, ModelConfig, RunConfig, launch
from odeadv.support.files import read_tensors
from odeadv.training import Layerwise, Pgd

pytestmark = pytest.mark.filterwarnings("ignore:eta. .* is for the mean over batches:UserWarning")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train_in_a_process(runs: Path, *, processes: int = 1, extra: tuple[str, ...] = ()) -> subprocess.Popen:
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*python, "-m", "odeadv"]
    else:
        command = [*python, "-m", "odeadv"]
    command += ["train", str(runs / "run.json"), "--runs", str(runs), "--accelerator", "cpu", *extra]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def written(config: RunConfig, runs: Path) -> None:
    """Write the configuration into the new folder ``runs``."""
    runs.mkdir()
    (runs / "run.json").write_text(json.dumps(config.to_dict()))


def train_here(runs: Path) -> None:
    """Train as the other processes do: with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["train", str(runs / "run.json"), "--runs", str(runs), "--accelerator", "cpu"]) == 0
    finally:
        torch.set_num_threads(threads)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path, capsys):
    config = replace(
        small(epochs=3, objective=Pgd(steps=3)),
        data=DataConfig("digits", 160, 40, 40),  # long enough to be killed in the middle
        model=ModelConfig(depth=8, width=4, noise=0.1),
    )
    whole, runs = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, runs):
        written(config, folder)
    train_here(whole)
    process = train_in_a_process(runs)
    metrics = runs / config.name / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (runs / config.name / "record.json").exists(), "killed too late to prove anything"
    assert list((runs / config.name / "checkpoints").glob("*.safetensors"))
    train_here(runs)
    assert "resumes at epoch" in capsys.readouterr().err
    weights = [read_tensors(folder / config.name / "last.safetensors")[0] for folder in (whole, runs)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    """The same global batch: LAD's mean, batch statistics and the attack's start belong to the whole batch."""
    config = small(objective=Pgd(steps=2), defence=Layerwise("strang", 20.0), epochs=2)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        written(config, folder)
    train_here(one)
    finish(train_in_a_process(two, processes=2))
    records = [json.loads((runs / config.name / "record.json").read_text()) for runs in (one, two)]
    curves = [[(epoch["loss"], epoch["accuracy"]) for epoch in record["epochs"]] for record in records]
    assert [record["machine"]["processes"] for record in records] == [1, 2]
    for (loss, accuracy), (other_loss, other_accuracy) in zip(*curves, strict=True):
        assert loss == pytest.approx(other_loss, rel=2e-3)
        assert accuracy == pytest.approx(other_accuracy, abs=0.02)


@pytest.mark.slow
def test_runs_go_to_ray(tmp_path):
    pytest.importorskip("ray")
    jobs = [Job(small(seed=seed), ("table1",)) for seed in range(2)] + [Job(small(lr=1e30))]
    log = StringIO()
    records, failures = launch(jobs, tmp_path, launcher="ray", log=log)
    assert [record["key"] for record in records] == [job.config.key for job in jobs[:2]]
    assert "lower lr" in failures[0].reason
    local, _ = launch(jobs[:1], tmp_path / "local", log=StringIO())
    there = read_tensors(tmp_path / jobs[0].config.name / "last.safetensors")[0]
    here = read_tensors(tmp_path / "local" / jobs[0].config.name / "last.safetensors")[0]
    assert all(torch.allclose(value, here[name], atol=1e-5) for name, value in there.items())
    assert local[0]["key"] == records[0]["key"]
