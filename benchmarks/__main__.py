"""Run benchmarks: `python -m benchmarks [NAME ...] [--out DIR] [--render]`."""

import argparse
import importlib
import json
from pathlib import Path

NAMES = ("overhead", "compiled", "fisher_kpp", "recording", "training_step")

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)} (default: all)")
parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"), help="folder for JSON and the page")
parser.add_argument("--render", action="store_true", help="only make the page again from the JSON files")


def page(out: Path) -> str:
    """The page of all results in ``out``."""
    parts = ["# Benchmarks", "", "Made by `python -m benchmarks` from the JSON files beside it."]
    for name in NAMES:
        path = out / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            module = importlib.import_module(f"benchmarks.{name}")
            machine = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
            about = " ".join((module.__doc__ or "").split())
            parts += ["", f"## {name}", "", about, "", module.table(data), "", f"Machine: {machine}."]
    return "\n".join(parts) + "\n"


def main() -> None:
    args = parser.parse_args()
    for name in args.names or NAMES:
        if name not in NAMES:
            parser.error(f"NAME: got {name!r}, expected some of {', '.join(NAMES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.render:
        for name in args.names or NAMES:
            print(f"{name} ...", flush=True)
            data = importlib.import_module(f"benchmarks.{name}").run()
            (args.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = page(args.out)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
