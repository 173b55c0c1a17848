import pytest
import torch

from odeadv import data, models
from odeadv.experiments import RunConfig
from odeadv.models import _pretrained


@pytest.mark.parametrize("name", models.pretrained_names())
def test_each_network_has_its_record(name):
    net, record = models.pretrained(name), models.pretrained_record(name)
    assert not net.training
    assert net.config == record["model"]
    config = RunConfig.from_dict(record["run"])
    assert name == f"{config.data.name}-{config.method.replace('+', '-')}"
    assert len(record["robust_accuracy"]) == 4
    assert (_pretrained._FILES / f"{name}.safetensors").stat().st_size <= 300_000
    size = record["image_size"]
    assert net(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_there_are_both_data_sets_and_all_methods():
    methods = ("natural", "natural-lad-sm", "pgd", "pgd-lad-sm")
    assert set(models.pretrained_names()) == {
        f"{data}-{method}" for data in ("digits", "cifar10") for method in methods
    }


def test_the_recorded_accuracy_is_that_of_the_weights():
    digits = data.load("digits").resized(16)
    net = models.pretrained("digits-natural")
    with torch.no_grad():
        right = net(data.to_float(digits.test_images)).argmax(1) == digits.test_labels
    expected = models.pretrained_record("digits-natural")["clean_accuracy"]
    assert right.float().mean().item() == pytest.approx(expected, abs=1.5 / len(right))  # a tie may fall either way


def test_unknown_names_and_damaged_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^name: got 'digits-pdg', .* did you mean 'digits-pgd'"):
        models.pretrained("digits-pdg")
    content = bytearray((_pretrained._FILES / "digits-pgd.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "digits-pgd.safetensors").write_bytes(content)
    monkeypatch.setattr(_pretrained, "_FILES", tmp_path)
    with pytest.raises(ValueError, match="checksum does not match"):
        models.pretrained("digits-pgd")
