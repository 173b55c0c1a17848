"""Diagnose LAD: how strong is its perturbation at each layer, and how good is the midpoint of Theorem 3.2?

python examples/diagnose.py --out diagnosis
"""

import argparse
from pathlib import Path

import torch

from odeadv import data, models
from odeadv.diagnostics import diagnose


def main(arguments=None):
    """Diagnose a fresh network on a few digits and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), help="folder for the page")
    parser.add_argument("--images", type=int, default=64, help="number of digits (default: 64)")
    args = parser.parse_args(arguments)
    digits = data.load("digits")
    net = models.preact_resnet(
        14, 8, mean=digits.mean, std=digits.std, generator=torch.Generator().manual_seed(0)
    ).eval()
    images, labels = data.to_float(digits.test_images[: args.images]), digits.test_labels[: args.images]
    diagnose(net.field(images, labels, eta=50.0), args.out, title="A ResNet-14 before training, eta 50")
    print(args.out / "diagnostics.md")


if __name__ == "__main__":
    main()
