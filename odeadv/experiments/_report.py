"""The report of a table, made of nothing but the JSON of its runs."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odeadv.experiments._files import replacing, write_text
from odeadv.experiments._run import load_records
from odeadv.experiments._tables import PRESETS, Row, Table, configurations

Record = Mapping[str, Any]


def write_report(table: Table, folder: Path) -> str:
    """Make ``folder/NAME.md`` and ``folder/NAME.png`` from the records in ``folder``; returns the Markdown.

    Args:
        table: the table they belong to.
        folder: where the runs' JSON files are.

    Raises:
        ValueError: if there are none, or they do not belong together.
    """
    records = load_records(folder)
    markdown = render(table, records)
    write_text(folder / f"{table.name}.md", markdown)
    with replacing(folder / f"{table.name}.png") as path:
        _plot(table, records, path)
    return markdown


def render(table: Table, records: Sequence[Record]) -> str:
    """The table as Markdown: what differs from the paper first, then its figures and the measured ones.

    Measured figures are means over the seeds with the sample standard deviation; differences are paired by seed.

    Args:
        table: rows and the paper's figures.
        records: finished runs, of one data set and protocol.

    Raises:
        ValueError: if there are no records, or they differ in more than method and seed.
    """
    by_method = _grouped(table, records)
    config = records[0]["config"]
    columns = ["Acc", *(_attack_label(attack) for attack in records[0]["evaluation"]["attacks"]), "Avg"]
    paper = table.paper(config["dataset"])
    lines = [
        f"**{_differences(table, records)}**",
        "",
        f"# {table.title}, {config['dataset']}",
        "",
        "Accuracy in %, of the clean test images and of the last iterates of the attacks (eps in 1/255); Avg is the "
        "mean of the four robust accuracies. Measured: mean ± sample standard deviation over the seeds.",
        "",
        *_header(["Method", "", *columns]),
    ]
    rows = [table.row(method) for method in by_method]
    for row in rows:
        runs = by_method[row.method]
        if row.paper_key in paper:
            figures = paper[row.paper_key]
            lines.append(_line([row.label, "paper", *(f"{value:.2f}" for value in figures.values())]))
        values = zip(*(_accuracies(run) for run in runs), strict=True)
        lines.append(_line([row.label, f"here, {_seeds(runs)}", *(_mean(value) for value in values)]))
    lines += _paired(table.rows[0], rows, by_method, paper, columns)
    lines += _worst_so_far(rows, by_method, columns[1:-1])
    lines += _runs(rows, by_method)
    return "\n".join(lines) + "\n"


def _grouped(table: Table, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records by method, in the order of the table's rows, each sorted by seed."""
    if not records:
        raise ValueError("records: got none, expected the JSON of at least one finished run")
    for record in records[1:]:
        if _shared(record) != _shared(records[0]):
            raise ValueError(
                f"records: {record['config']['method']} seed {record['config']['training']['seed']} was run at another "
                "size or on other data than the first record; keep one table's runs in one folder"
            )
    _check_methods(table, records)
    found = {
        method: sorted(
            (record for record in records if record["config"]["method"] == method),
            key=lambda record: int(record["config"]["training"]["seed"]),
        )
        for method in table.methods
    }
    return {method: runs for method, runs in found.items() if runs}


def _shared(record: Record) -> dict[str, Any]:
    config = dict(record["config"])
    training = {k: v for k, v in config.pop("training").items() if k not in ("seed", "scheme", "eta")}
    return {**config, **training, "method": None, "fingerprint": record["data"]["fingerprint"]}


def _check_methods(table: Table, records: Sequence[Record]) -> None:
    """One configuration a method, one record a seed, no method that is not a row."""
    seen: dict[str, tuple[Any, Any]] = {}
    runs: set[tuple[str, int]] = set()
    for record in records:
        method, training = record["config"]["method"], record["config"]["training"]
        table.row(method)
        defence = (training["scheme"], training["eta"])
        if seen.setdefault(method, defence) != defence:
            raise ValueError(f"records: {method} was run with (scheme, eta) = {seen[method]} and with {defence}")
        if (method, training["seed"]) in runs:
            raise ValueError(f"records: {method} seed {training['seed']} is there twice")
        runs.add((method, training["seed"]))


def _differences(table: Table, records: Sequence[Record]) -> str:
    """What sets these runs apart from the paper's protocol, in a sentence."""
    config = records[0]["config"]
    paper = configurations(table, PRESETS["paper"], dataset=config["dataset"])
    here, there = config["training"], paper[0].training
    parts = []
    if not table.paper(config["dataset"]):
        parts.append(f"data set {config['dataset']}, which the paper does not use")
    if (config["depth"], config["width"]) != (paper[0].depth, paper[0].width):
        parts.append(
            f"ResNet-{config['depth']} of width {config['width']} instead of ResNet-{paper[0].depth} of width "
            f"{paper[0].width}"
        )
    for name, label in (("epochs", "epochs"), ("batch_size", "images a batch"), ("precision", "training")):
        if here[name] != getattr(there, name):
            parts.append(f"{here[name]} instead of {getattr(there, name)} {label}")
    for name in ("lr", "momentum", "weight_decay"):
        if here[name] != getattr(there, name):
            parts.append(f"{name} {here[name]:g} instead of {getattr(there, name):g}")
    if [m / here["epochs"] for m in here["milestones"]] != [m / there.epochs for m in there.milestones]:
        parts.append(f"learning rate drops after {', '.join(map(str, here['milestones']))} epochs")
    if config["protocol"] != paper[0].protocol:
        parts.append(f"evaluated by {config['protocol']}")
    etas = {run.method: run.training.eta for run in paper}
    for method, eta in sorted({(r["config"]["method"], r["config"]["training"]["eta"]) for r in records}):
        if eta != etas[method]:
            parts.append(f"eta {eta:g} instead of {etas[method]:g} for {table.row(method).label}")
    for name in ("train_images", "test_images"):
        if config[name] is not None:
            parts.append(f"{config[name]} {name.replace('_', ' ')}")
    seeds = {record["config"]["training"]["seed"] for record in records}
    if len(seeds) < len(PRESETS["paper"].seeds):
        parts.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} instead of {len(PRESETS['paper'].seeds)}")
    if not parts:
        return "The paper's protocol."
    return f"Not the paper's protocol: {'; '.join(parts)}."


def _paired(
    table_base: Row,
    rows: Sequence[Row],
    by_method: Mapping[str, Sequence[Record]],
    paper: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
) -> list[str]:
    """Differences to the first row, seed by seed."""
    base, others = table_base, [row for row in rows if row is not table_base]
    if table_base.method not in by_method or not others:
        return []
    lines = [
        "",
        f"## Difference to {base.label}",
        "",
        "In percentage points; measured ones are paired by seed (same initial weights, same batches).",
        "",
        *_header(["Method", "", *columns]),
    ]
    base_runs = {run["config"]["training"]["seed"]: run for run in by_method[base.method]}
    for row in others:
        if row.paper_key in paper and base.paper_key in paper:
            figures = zip(paper[row.paper_key].values(), paper[base.paper_key].values(), strict=True)
            lines.append(_line([row.label, "paper", *(f"{a - b:+.2f}" for a, b in figures)]))
        pairs = [
            (run, base_runs[run["config"]["training"]["seed"]])
            for run in by_method[row.method]
            if run["config"]["training"]["seed"] in base_runs
        ]
        if pairs:
            by_seed = [[a - b for a, b in zip(_accuracies(x), _accuracies(y), strict=True)] for x, y in pairs]
            cells = [_mean(values, "+.2f") for values in zip(*by_seed, strict=True)]
            lines.append(_line([row.label, f"here, {len(pairs)} pair{'s' if len(pairs) > 1 else ''}", *cells]))
    return lines


def _worst_so_far(rows: Sequence[Row], by_method: Mapping[str, Sequence[Record]], columns: Sequence[str]) -> list[str]:
    """The stricter count, in a table of its own."""
    lines = [
        "",
        "## Worst so far",
        "",
        "A stricter count, not comparable with the one above: an example is lost as soon as the clean image or any "
        "iterate is misclassified. The paper does not give it.",
        "",
        *_header(["Method", *columns]),
    ]
    for row in rows:
        worst = [
            [100 * attack["worst_so_far_accuracy"] for attack in run["evaluation"]["attacks"]]
            for run in by_method[row.method]
        ]
        lines.append(_line([row.label, *(_mean(value) for value in zip(*worst, strict=True))]))
    return lines


def _runs(rows: Sequence[Row], by_method: Mapping[str, Sequence[Record]]) -> list[str]:
    """One line a run, and what they have in common."""
    lines = [
        "",
        "## Runs",
        "",
        "Training figures of the last epoch are those of the passes trained on (perturbed ones for LAD and LAD-SM). "
        "Wall times are as the runs happened to go, not a benchmark.",
        "",
        *_header(["Run", "eta", "training loss", "training accuracy", "training, s", "evaluation, s", "threads"]),
    ]
    records = [(row, run) for row in rows for run in by_method[row.method]]
    for row, run in records:
        training, last = run["config"]["training"], run["epochs"][-1]
        cells = [
            f"{row.label}, seed {training['seed']}",
            f"{training['eta']:g}",
            f"{last['loss']:.4f}",
            f"{100 * last['accuracy']:.2f}",
            f"{run['seconds']['training']:.0f}",
            f"{run['seconds']['evaluation']:.0f}",
            str(run["machine"]["threads"]),
        ]
        lines.append(_line(cells))
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for _, run in records})
    config, data = records[0][1]["config"], records[0][1]["data"]
    lines += [
        "",
        f"Data: {config['dataset']} ({data['source']}), {data['train_images']} training and {data['test_images']} test "
        f"images, fingerprint {data['fingerprint']}. Versions: {'; '.join(versions)}.",
    ]
    return lines


def _accuracies(record: Record) -> list[float]:
    evaluation = record["evaluation"]
    robust = [attack["robust_accuracy"] for attack in evaluation["attacks"]]
    return [100 * value for value in (evaluation["clean_accuracy"], *robust, evaluation["average"])]


def _attack_label(attack: Mapping[str, Any]) -> str:
    steps = f"-{attack['steps']}" if attack["name"] == "ifgsm" else ""
    return f"{attack['name'].upper()}{steps} {attack['eps_255']:g}"


def _seeds(runs: Sequence[Record]) -> str:
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _mean(values: Sequence[float], form: str = ".2f") -> str:
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _plot(table: Table, records: Sequence[Record], path: Path) -> None:
    """Bars of the measured accuracies with standard deviations, the paper's as open circles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_method = _grouped(table, records)
    paper = table.paper(records[0]["config"]["dataset"])
    labels = ["clean", *(_attack_label(attack) for attack in records[0]["evaluation"]["attacks"]), "average"]
    figure = Figure(figsize=(8.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(by_method)
    for i, (method, runs) in enumerate(by_method.items()):
        row = table.row(method)
        values = list(zip(*(_accuracies(run) for run in runs), strict=True))
        at = [j + (i - (len(by_method) - 1) / 2) * width for j in range(len(labels))]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        means = [statistics.fmean(v) for v in values]
        axes.bar(at, means, 0.92 * width, yerr=spread, capsize=2, color=f"C{i}", label=f"{row.label} ({_seeds(runs)})")
        if row.paper_key in paper:
            axes.plot(at, list(paper[row.paper_key].values()), "o", mfc="white", mec="black", ms=4.5, zorder=3)
    if paper:
        axes.plot([], [], "o", mfc="white", mec="black", ms=4.5, label="the paper's figure")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")
    about = textwrap.fill(_differences(table, records), 120)
    axes.set_title(f"{table.title}, {records[0]['config']['dataset']}\n{about}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
