"""What a sceptic asks: is it the costate that helps, or any perturbation of its size, or the perturbed input alone?

    python examples/ablations.py natural --preset smoke                                  # minutes, no download
    python examples/ablations.py pgd --preset cpu --dataset cifar10 --data DIR           # two cores, real CIFAR
    python examples/ablations.py trades --preset paper --dataset cifar10 --data DIR      # for a GPU

Rows: directions drawn at random with the costate's norm in every layer, costates of other examples, the perturbation at
the input only, other schemes, more sweeps; for TRADES the mix of the two losses alone (eta = 0). All other arguments
are those of the tables.
"""

import sys

from odeadv import experiments

NAMES = {"natural": "ablations", "pgd": "ablations-pgd", "trades": "ablations-trades"}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{__doc__}\nfirst argument: one of {', '.join(NAMES)}")
    sys.exit(experiments.main(NAMES[sys.argv[1]], __doc__, sys.argv[2:]))
