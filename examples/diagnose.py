"""A diagnosis: how strong the perturbation of LAD is at each layer, and how good Theorem 3.2's midpoint is.

python examples/diagnose.py --out diagnosis
"""

import argparse
from pathlib import Path

import torch

from odeadv import data, models
from odeadv.diagnostics import diagnose


def main(arguments=None):
    """Diagnose a fresh network on 64 digits and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), help="folder for the page")
    args = parser.parse_args(arguments)
    digits = data.load("digits")
    net = models.preact_resnet(
        14, 8, mean=digits.mean, std=digits.std, generator=torch.Generator().manual_seed(0)
    ).eval()
    images, labels = data.to_float(digits.test_images[:64]), digits.test_labels[:64]
    diagnose(net.field(images, labels, eta=50.0), args.out, title="A ResNet-14 before training, eta 50")
    print(args.out / "diagnostics.md")


if __name__ == "__main__":
    main()
