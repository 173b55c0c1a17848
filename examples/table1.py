"""Table 1 of the paper: natural training with and without layer-wise adversarial defence.

    python examples/table1.py --preset smoke                                   # minutes, no download
    python examples/table1.py --preset cpu --dataset cifar10 --data DIR        # two cores, real CIFAR-10
    python examples/table1.py --preset paper --dataset cifar100 --data DIR     # the paper's protocol, for a GPU

Writes one JSON a run, the table (table1.md) and a plot (table1.png) to --out. A run whose JSON is there is not run
again; --render only makes the table and the plot again from the JSON files.
"""

import argparse
from pathlib import Path

from odeadv import data, experiments

presets = "; ".join(f"{preset.name}: {preset.says}" for preset in experiments.PRESETS.values())
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", choices=experiments.PRESETS, default="smoke", help=presets)
parser.add_argument("--dataset", choices=data.names(), help="instead of the preset's")
parser.add_argument("--data", type=Path, metavar="DIR", help="folder with (or for) the data set")
parser.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
parser.add_argument("--methods", nargs="+", choices=experiments.TABLE1.methods, help="some of the rows")
parser.add_argument("--out", type=Path, help="folder for the results (default: runs/table1-DATASET-PRESET)")
parser.add_argument("--render", action="store_true", help="only make the table and plot again from the JSON in --out")


def main() -> None:
    args = parser.parse_args()
    out = args.out or Path("runs") / f"table1-{args.dataset or experiments.PRESETS[args.preset].dataset}-{args.preset}"
    if not args.render:
        runs = experiments.configurations(
            experiments.TABLE1,
            experiments.PRESETS[args.preset],
            dataset=args.dataset,
            methods=args.methods,
            seeds=args.seeds,
        )
        try:
            images = data.load(runs[0].dataset, args.data)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        for number, config in enumerate(runs, start=1):
            label = f"[{number}/{len(runs)} {config.method}, seed {config.training.seed}]"
            try:
                experiments.run(config, images, out, label=label)
            except (ValueError, FileExistsError) as error:
                parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        print(experiments.write_report(experiments.TABLE1, out))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
