"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--out DIR] [--compare OLD] [--render]`."""

import argparse
import importlib
import importlib.util
import json
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import limits
from ._compare import report

NAMES = {  # with their headings on the pages
    "overhead": "Overhead of a step",
    "compiled": "Compiled solves",
    "orders": "Orders of convergence",
    "gradients": "Gradients against differences",
    "adaptive": "Errors of adaptive solves",
    "work_precision": "Work and precision",
    "converged": "Evaluations of a converged costate",
    "fisher_kpp": "Fisher-KPP equation",
    "stiff": "Stiff problems",
    "recording": "Cost of a recording",
    "training_step": "Training steps of ResNet-56",
    "own_network": "Training steps of a wrapped network",
    "schemes_training": "Schemes as training methods",
    "evaluation": "Time of a robust evaluation",
    "agreement": "Agreement with other attacks",
}
RESULTS, QUICK = Path("docs/results/benchmarks"), Path("build/benchmarks")

parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description="Runs benchmarks one after the other, writes JSON, pictures and pages, and compares with the last run.",
)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)} (default: all)")
parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that everything runs; no results")
parser.add_argument("--out", type=Path, help=f"folder for the output ({RESULTS}; with --quick {QUICK})")
parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON or folder of an earlier run (default: in --out)")
parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
parser.add_argument("--render", action="store_true", help="run nothing; make pages and pictures from the JSON again")


def module(name: str) -> ModuleType | None:
    """Return the benchmark called ``name``."""
    path = f"{__package__}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def read(path: Path) -> dict[str, Any]:
    """Read the data of one run of a benchmark."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def dump(data: Any, indent: str = "") -> str:
    """Return JSON in which every value that fits into 110 characters is on one line."""
    short = json.dumps(data, allow_nan=False)
    if not isinstance(data, dict | list) or not data or len(indent) + len(short) <= 110:
        return short if indent else f"{short}\n"
    inner = f"{indent} "
    if isinstance(data, dict):
        parts = [f"{inner}{json.dumps(key)}: {dump(value, inner)}" for key, value in data.items()]
    else:
        parts = [f"{inner}{dump(value, inner)}" for value in data]
    left, right = "{}" if isinstance(data, dict) else "[]"
    whole = f"{left}\n" + ",\n".join(parts) + f"\n{indent}{right}"
    return whole if indent else f"{whole}\n"


def write(path: Path, text: str) -> None:
    """Write ``text`` completely or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Read the results of all benchmarks that have a JSON file in ``out``."""
    return {name: read(out / f"{name}.json") for name in NAMES if (out / f"{name}.json").exists()}


def page(out: Path) -> str:
    """Return the page of all results in ``out``."""
    parts = ["# Benchmarks", "", "How fast odeadv is, and how accurate, compared with other packages."]
    parts += ["[How close to the limit](limits.md) compares the figures with their floors and targets."]
    parts += ["Made by `python -m benchmarks` from the JSON files in this folder."]
    for name, data in results(out).items():
        benchmark = module(name)
        if benchmark is None:
            continue
        about = (benchmark.__doc__ or "").strip()
        parts += ["", f"## {NAMES[name]}", "", about, "", benchmark.render(data)]
        if hasattr(benchmark, "plot"):
            parts += ["", f"![{NAMES[name]}]({name}.png)"]
        machine = ", ".join(f"{key} {value}" for key, value in data["machine"].items())
        took = f" Took {data['took']:.0f} s." if "took" in data else ""
        parts += ["", "<details>", "<summary>Run this again</summary>", ""]
        parts += ["```sh", f"python -m benchmarks {name}", "```", "", f"Machine: {machine}.{took}", "", "</details>"]
        if data.get("quick"):
            parts += ["", "**A quick run, at sizes that measure nothing.**"]
    return "\n".join(parts) + "\n"


def render(out: Path, names: list[str]) -> str:
    """Make the pages in ``out`` from its JSON files, and the pictures of ``names``; return the main page."""
    found = results(out)
    for name in names:
        benchmark = module(name)
        if name in found and hasattr(benchmark, "plot"):
            benchmark.plot(found[name], out / f"{name}.png")
    write(out / "limits.md", limits.render(found, module, NAMES))
    text = page(out)
    write(out / "README.md", text)
    return text


def earlier(name: str, out: Path, given: Path | None) -> dict[str, Any] | None:
    """Return the data of the earlier run that benchmark ``name`` is compared with; None without such a run."""
    path = out / f"{name}.json" if given is None else given / f"{name}.json" if given.is_dir() else given
    try:
        data = read(path) if path.exists() else None
    except ValueError as error:  # an unreadable old file must not discard the new measurements
        print(f"{path}: not compared, because it is not JSON ({error})", file=sys.stderr)
        return None
    if data is not None and data.get("benchmark", path.stem) != name:
        print(f"{path}: not compared, because it is of {data.get('benchmark', path.stem)}, not {name}", file=sys.stderr)
        return None
    return data


def run(name: str, benchmark: ModuleType, quick: bool) -> dict[str, Any]:
    """Run a benchmark and return its data with the seconds it took."""
    began = time.perf_counter()
    data = benchmark.run(quick)
    return {"benchmark": name, **data, "took": time.perf_counter() - began, **({"quick": True} if quick else {})}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in NAMES:
            parser.error(f"NAME: got {name!r}, expected some of {', '.join(NAMES)}")
    if args.compare is not None and not args.compare.exists():
        parser.error(f"--compare: {args.compare} does not exist; expected the JSON of a benchmark, or a folder of them")
    names = args.names or list(NAMES)
    out = args.out or (QUICK if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    changes, failed = [], []
    for name in [] if args.render else names:
        benchmark = module(name)
        if benchmark is None:
            continue
        print(f"{name} ...", end=" ", flush=True)
        try:
            data = run(name, benchmark, args.quick)
        except Exception:  # one benchmark that fails must not stop the others
            failed.append(name)
            print("failed")
            traceback.print_exc()
            continue
        print(f"{data['took']:.0f} s", flush=True)
        old = earlier(name, out, args.compare)
        write(out / f"{name}.json", dump(data))
        if old is not None:
            changes.append(report(name, old, read(out / f"{name}.json")))
    text = render(out, names)
    print(f"\n{text}")
    if changes:
        comparison = "\n\n".join(["# Compared with the run before", *changes]) + "\n"
        write(out / "comparison.md", comparison)
        print(comparison)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
