"""Train the small networks of odeadv.models.pretrained and write their files.

    python examples/pretrained.py --data DIR            # all eight, about ten minutes on two cores
    python examples/pretrained.py digits-natural        # only this network

Each file holds the weights and the record: the configuration, the accuracies and the versions.
"""

import argparse
from pathlib import Path

from odeadv import data, evaluate, models
from odeadv.experiments import DataConfig, ModelConfig, RunConfig, load_model, run
from odeadv.experiments import load_record as read_record
from odeadv.support.files import write_tensors
from odeadv.training import Layerwise, Natural, Pgd, TrainConfig, Undefended

WEIGHTS = Path(models.__file__).parent / "weights"


def configurations():
    """Return the configuration of each network by its name."""
    sizes = {
        "digits": (DataConfig("digits", image_size=16), 8, 16, 8 / 255, 20.0),
        "cifar10": (DataConfig("cifar10", 3000, 2000, image_size=16), 12, 12, 4 / 255, 25.0),
    }
    found = {}
    for name, (images, width, epochs, eps, eta) in sizes.items():
        for objective in (Natural(), Pgd(eps=eps, alpha=eps / 4, steps=5)):
            for defence in (Undefended(), Layerwise("strang", eta=eta)):
                training = TrainConfig(
                    objective=objective, defence=defence, epochs=epochs, milestones=(epochs // 2, epochs * 3 // 4),
                    batch_size=64, augment="none" if name == "digits" else "crop-flip",
                )  # fmt: skip
                config = RunConfig(images, ModelConfig(depth=8, width=width), training)
                found[f"{name}-{config.method.replace('+', '-')}"] = config
    return found


def make(name, config, folder, runs):
    """Train one network, evaluate it and write its file."""
    images = data.load(config.data.name, folder)
    run(config, images, runs, label=name)
    net, _ = load_model(runs / config.name)
    subset, _ = config.data.take(images)
    found = evaluate(
        net, (subset.test_images, subset.test_labels), "table2" if config.data.name == "digits" else "eps4"
    )
    record = read_record(runs / config.name / "record.json")
    write_tensors(
        WEIGHTS / f"{name}.safetensors",
        net.state_dict(),
        {
            "schema": "odeadv.pretrained/1",
            "model": net.config,
            "image_size": config.data.image_size,
            "run": config.to_dict(),
            "images": [record["data"]["train_images"], record["data"]["test_images"]],
            "clean_accuracy": found.clean_accuracy,
            "robust_accuracy": {f"{a.label}": a.robust_accuracy for a in found.attacks},
            "versions": record["versions"],
        },
    )
    print(f"{name}: {found}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="some of the networks; all if none is given")
    parser.add_argument("--data", type=Path, help="folder with (or for) CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args()
    WEIGHTS.mkdir(exist_ok=True)
    for name, config in configurations().items():
        if not args.names or name in args.names:
            make(name, config, args.data, args.runs)
