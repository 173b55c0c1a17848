"""Configurations: to and from plain data, and the messages for values that do not fit."""

import json
from dataclasses import dataclass, replace

import pytest
import yaml

from odeadv.experiments import (
    PRESETS,
    TABLES,
    DataConfig,
    ModelConfig,
    RunConfig,
    configurations,
    load_config,
    method_of,
    parse_method,
)
from odeadv.support import plain as configuration
from odeadv.training import Layerwise, Natural, Objective, Pgd, Trades, TrainConfig, Undefended

ALL = [
    (row, config)
    for table in TABLES.values()
    for preset in PRESETS.values()
    for row, config in configurations(table, preset, dataset=table.datasets[0])
]


def test_every_run_of_every_table_survives_plain_data():
    for _, config in ALL:
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = ALL[0][1]
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_equal_keys_are_equal_runs():
    by_key = {}
    for _, config in ALL:
        assert by_key.setdefault(config.key, config) == config
    by_name = {config.name for config in by_key.values()}
    assert len(by_name) == len(by_key)


def test_keys_of_committed_runs_never_change():
    """The default of a new field must not change earlier runs."""
    natural = RunConfig(
        model=ModelConfig(depth=8),
        training=TrainConfig(epochs=8, milestones=(4, 6), precision="bf16"),
    )
    assert natural.key.startswith("311527a2")
    assert natural.name == "cifar10-natural-seed0-311527a2"


def test_a_key_survives_plain_data_and_other_spellings():
    for _, config in ALL:
        assert RunConfig.from_dict(config.to_dict()).key == config.key
    one = RunConfig(training=TrainConfig(lr=1, defence=Layerwise("lad-sm", 200)))
    other = RunConfig(training=TrainConfig(lr=1.0, defence=Layerwise("strang", 200.0)))
    assert one == other
    assert one.key == other.key == RunConfig.from_dict(json.loads(json.dumps(one.to_dict()))).key


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TrainConfig(epochs=1.5), TypeError, "^epochs: got 1.5, expected an integer"),
        (lambda: TrainConfig(epochs=5, milestones=(9,)), ValueError, r"^milestones: got \(9,\) for 5 epochs"),
        (lambda: TrainConfig(milestones=("a",)), ValueError, "^milestones: got"),
        (lambda: TrainConfig(lr="fast"), TypeError, "^lr: got 'fast'"),
        (lambda: Pgd(steps=True), TypeError, "^steps: got True"),
        (lambda: Layerwise("lie", sweeps="converge", perturbation="random"), ValueError, "^sweeps: got 'converge'"),
        (lambda: Layerwise("strang-midpoint", perturbation="random"), ValueError, "^scheme: got 'strang-midpoint'"),
    ],
)
def test_constructors_check_as_files_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_choices_that_no_file_could_name_are_refused():
    with pytest.raises(ValueError, match=r"^name: 'pgd' is taken by odeadv\.training\._objectives\.Pgd"):
        type("Other", (Objective,), {"__module__": "elsewhere"}, name="pgd")

    @dataclass(frozen=True)
    class Local(Objective, name="test-local"):
        pass

    with pytest.raises(ValueError, match="is defined in a function or class"):
        RunConfig(training=TrainConfig(objective=Local())).to_dict()

    plain = type("Plain", (Objective,), {"__module__": __name__}, name="test-plain")
    with pytest.raises(TypeError, match="is not a dataclass"):
        RunConfig(training=TrainConfig(objective=plain())).key  # noqa: B018


def test_tables_share_runs():
    keys = {
        name: {config.key for _, config in configurations(TABLES[name], PRESETS["paper"], dataset="cifar10")}
        for name in ("table2", "table3", "table4", "table6")
    }
    assert keys["table6"] < keys["table2"] | keys["table3"]
    assert len(keys["table2"] & keys["table4"]) == 9


def test_methods_are_named_after_what_they_do():
    for row, config in ALL:
        assert method_of(config) == row.method.replace("+matched", "")
    assert parse_method("pgd+lad-sm+noise").scheme == "strang"
    own = RunConfig(training=TrainConfig(defence=Layerwise("yoshida4", 1.0, ascent=2)))
    assert method_of(own) == "natural+yoshida4+ascent2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpd", "^method: got 'gpd', expected one that begins with natural, pgd, trades"),
        ("pgd+lap", "'lap' in 'pgd\\+lap' is not known; did you mean 'lad'"),
        ("pgd+lad+lad-sm", "two parts that set its scheme"),
        ("pgd+lad+matched", "has a defence, whose passes"),
        ("pgd+random", "changes a defence it does not have"),
        ("pgd+sweeps0+lad", "'sweeps0'"),
    ],
)
def test_methods_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


def test_a_file_says_what_differs_from_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {name: cifar100, train_images: 500}\n"
        "training:\n"
        "  objective: {name: trades, eps: 8/255, steps: 7}\n"
        "  defence: {name: layerwise, scheme: strang, sweeps: converge}\n"
        "  lr: 1\n"
    )
    config = load_config(file)
    assert config.data == DataConfig("cifar100", 500)
    assert config.training.objective == Trades(steps=7, eps=8 / 255)
    assert config.training.defence == Layerwise("strang", sweeps="converge")
    assert config.training.lr == 1.0
    assert isinstance(config.training.lr, float)
    assert config.model == ModelConfig()
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.to_dict()))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", b"training: {lr: 1}\nmodel: {}\ntraining: {epochs: 2}\n", r"'training' is there twice.*line 3"),
        ("run.yaml", b"training: {lr: 1, lr: 2}\n", r"the key 'lr' is there twice"),
        ("run.json", b'{"training": {"lr": 1, "lr": 2}}', r"the key 'lr' is there twice"),
        ("run.yaml", b"data: {name: caf\xe9}\n", r"is not UTF-8 text \(byte 16\)"),
        ("run.json", b"\xff\xfe", r"is not UTF-8 text \(byte 0\)"),
        ("run.json", b'{"training": {"lr": NaN}}', r"NaN is not a JSON number"),
        ("run.yaml", b"[" * 1200, r"is nested too deeply"),
        ("run.yaml", b"a: [", r"is not YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file}: .*{message}"):
        load_config(file)


def test_yaml_keeps_its_anchors_and_merges(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: &d {test_images: 5}\nmodel: {options: {<<: *d}}\n")
    assert load_config(file).model.options == {"test_images": 5}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"trainign": {}}, ValueError, r"^trainign: is not a key of RunConfig \(did you mean 'training'\?\)"),
        ({"training": {"epoch": 3}}, ValueError, r"^training\.epoch: is not a key .*did you mean 'epochs'"),
        ({"training": {"epochs": "3"}}, TypeError, r"^training\.epochs: got '3', expected an integer"),
        ({"training": {"epochs": True}}, TypeError, r"^training\.epochs: got True"),
        ({"training": {"epochs": 0}}, ValueError, r"^training\.epochs: got 0"),
        ({"training": {"lr": "nan"}}, ValueError, r"^training\.lr: got nan"),
        ({"training": {"lr": "a/b"}}, TypeError, r"^training\.lr: got 'a/b', expected a number"),
        ({"training": {"milestones": 3}}, TypeError, r"^training\.milestones: got 3, expected a list"),
        ({"training": {"milestones": [1, "x"]}}, TypeError, r"^training\.milestones\[1\]: got 'x'"),
        ({"training": {"precision": "fp8"}}, ValueError, r"^training\.precision: got 'fp8', expected one of 'fp32'"),
        ({"training": {"objective": {"name": "gpd"}}}, ValueError, r"^training\.objective\.name: got 'gpd' \(did you"),
        ({"training": {"objective": {"eps": 1}}}, TypeError, r"^training\.objective: .*expected a mapping with a name"),
        (
            {"training": {"objective": {"name": "pgd", "epz": 1}}},
            ValueError,
            r"^training\.objective\.epz: is not a key",
        ),
        ({"training": {"objective": {"name": "pgd", "eps": -1}}}, ValueError, r"^training\.objective\.eps: got -1"),
        ({"training": {"objective": "no.such:Thing"}}, ValueError, "cannot be imported"),
        ({"training": {"objective": "json:JSONDecoder"}}, TypeError, "is not a subclass of Objective"),
        ({"data": {"validation_images": -1}}, ValueError, r"^data\.validation_images: got -1"),
        ({"data": {"folds": 1}}, ValueError, r"^data\.folds, fold: got 1 and 0"),
        ([], TypeError, r"^config: got \[\], expected a mapping"),
    ],
)
def test_what_does_not_fit_is_an_error_by_its_path(data, error, message):
    with pytest.raises(error, match=message):
        RunConfig.from_dict(data)


def test_names_alone_and_instances_are_taken_too():
    config = RunConfig.from_dict({"training": {"objective": "pgd", "defence": "none"}})
    assert (config.training.objective, config.training.defence) == (Pgd(), Undefended())
    assert configuration.from_dict(TrainConfig, {"objective": Natural()}).objective == Natural()


def test_overrides_are_read_as_yaml():
    data = RunConfig().to_dict()
    changed = configuration.override(
        data, ["training.lr=0.05", "training.defence={name: layerwise, eta: 3}", "model.damping=damp"]
    )
    config = RunConfig.from_dict(changed)
    assert config.training.lr == 0.05
    assert config.training.defence == Layerwise(eta=3.0)
    assert config.model == replace(ModelConfig(), damping="damp")
    with pytest.raises(ValueError, match=r"^set: got 'lr'"):
        configuration.override(data, ["lr"])
    with pytest.raises(ValueError, match=r"^set: training\.lr: '\[' is not YAML"):
        configuration.override(data, ["training.lr=["])
    with pytest.raises(ValueError, match="lr is not a mapping"):
        configuration.override(data, ["training.lr.x=1"])
    with pytest.raises(ValueError, match=r"expected a \.json, \.yaml or \.yml file"):
        load_config_of("run.toml")


def load_config_of(name):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text("")
        return load_config(Path(folder) / name)
