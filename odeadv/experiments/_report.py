"""Make the report of a table from the JSON records of its runs."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from odeadv.evaluation import Evaluation
from odeadv.experiments._claims import CLAIMS, Claim
from odeadv.experiments._config import RunConfig, parse_method, passes
from odeadv.experiments._plots import has_picture, plot, plot_over_fitting, regimes
from odeadv.experiments._presets import PRESETS, Preset, Size, configurations
from odeadv.experiments._records import Record, load_records
from odeadv.experiments._results import Decision, Difference, Results, gather, ranges
from odeadv.experiments._tables import TABLES, Column, Row, Table
from odeadv.support import plain
from odeadv.support.files import replacing, write_text

_SHOWN = 4  # differences in the first line of a page, so that the picture stays near the top
# The paper does not say these.
_CHOICES = (
    "the last, smaller batch of an epoch is left out",
    "attacks run in evaluation mode",
    "noise has standard deviation 0.1",
)


def write_report(table: Table, preset: Preset, dataset: str | None, records: Path, out: Path) -> str:
    """Make ``out/TABLE.md`` and its figures from the records in a folder, and return the Markdown.

    The figures are ``TABLE.png``, if both rows of a primary contrast or three values of eta have been run, and
    ``TABLE-epochs.png``, if validation images were attacked in every epoch.

    Args:
        table: table to report.
        preset: size of the runs.
        dataset: name of the data set; the preset's if None.
        records: folder of records, see `odeadv.experiments.load_records`.
        out: folder for the page and the plot.

    Raises:
        ValueError: if none of the records belongs to this table.
    """
    results = gather(table, preset, dataset, load_records(records))
    markdown = render(results)
    write_text(out / f"{table.name}.md", markdown)
    if has_picture(results):
        with replacing(out / f"{table.name}.png") as path:
            plot(results, path)
    else:
        (out / f"{table.name}.png").unlink(missing_ok=True)  # of an earlier report
    if regimes(results):
        with replacing(out / f"{table.name}-epochs.png") as path:
            plot_over_fitting(results, path)
    return markdown


def render(results: Results) -> str:
    """Return the page as Markdown: title, differences from the paper, figure, table, then the details.

    Args:
        results: the runs of one table, read from their records.
    """
    table = results.table
    keys = ["acc", *(column.key for column in table.columns), *(["avg"] if table.average else [])]
    labels = ["Acc", *(column.label for column in table.columns), *(["Avg"] if table.average else [])]
    reason = _cannot_test(results)
    lines = [
        f"# {table.title}, {results.setting}",
        "",
        *([f"**Not a test of the paper's claim: {reason}.**", ""] if reason else []),
        "How robust are networks that were trained by each method? Which differences between the methods are seen?",
        "",
        *protocol(results),
        "",
        f"The preset is `{results.preset.name}`. All runs share one training subset and one test subset.",
        "",
        *_outcome(results),
        *([f"![Differences of the rows with 95 % intervals]({table.name}.png)", ""] if has_picture(results) else []),
        "Accuracy in %, of the clean test images and of the last iterates of the attacks (eps in 1/255). "
        + ("Avg is the mean of the robust accuracies. " if table.average else "")
        + "Rows with *here* are means ± sample standard deviations over the seeds.",
        "",
        *_parts(results),
        *_results(results, keys, labels),
        *_claims(results),
        *_over_fitting(results),
        *_folded("Every column", _columns(results, keys, labels)),
        *_folded("Worst so far", _stricter(results)),
        *_folded("AutoAttack", _autoattack(results)),
        *_folded("Best epoch", _best(results, keys, labels)),
        *_folded("Runs", _runs(results)),
    ]
    return "\n".join(lines) + "\n"


# What the names of rows mean, by the parts of their methods.
_MEANINGS = {
    "random": "*random*: pushes of the same size in random directions",
    "shuffled": "*shuffled*: pushes by the costates of other images",
    "input": "*input*: pushes the state before the first block only",
    "lad-symmetric": "*symmetric*: the scheme `strang-symmetric`",
    "matched": "*as many passes as LAD*: no push, but more epochs",
    "penalty": "*explicit penalty*: the term (eta/2) sum |a_n|^2 in the loss instead of a push",
    "eta0": "*eta0*: the mix of losses of the defence without a push",
    "damp": "*In-ResNet*: damped residual blocks",
    "noise": "*noise*: noise in every block",
}


def _parts(results: Results) -> list[str]:
    """Return a line that explains the parts of methods in the names of the rows; an empty list if there is none."""
    parts = {part for row in results.rows for part in row.method.split("+")}
    meanings = [text for part, text in _MEANINGS.items() if part in parts]
    return [f"Names of rows: {'; '.join(meanings)}.", ""] if meanings else []


def _outcome(results: Results) -> list[str]:
    """Return one sentence that counts the words of the primary contrasts; an empty list if there is none."""
    words = Counter(decision.word for decision in results.decided() if _elsewhere(results, decision) is None)
    if not words:
        return []
    counts = ", ".join(f"{number} *{word}*" for word, number in words.most_common())
    return [f"Of the differences that the paper states or implies: {counts} ([claims](#claims)).", ""]


def _elsewhere(results: Results, decision: Decision) -> Claim | None:
    """Return the claim of another table that the same runs decide, under the same attacks; None if there is none.

    The other table pools its error over other rows, so it may give another word. A difference has one word only.
    """
    for claim in CLAIMS:
        table = TABLES[claim.table]
        same = (claim.preset, claim.dataset, table.protocol) == (
            results.preset.name, results.dataset, results.table.protocol,
        )  # fmt: skip
        if same and table.name != results.table.name and _pair(decision) in ((claim.row, claim.other), claim.again):
            return claim
    return None


def _pair(decision: Decision) -> tuple[str, str]:
    return decision.row.name, decision.other.name


def _cannot_test(results: Results) -> str:
    """Return the reason why none of the defended rows can test the paper's claim; an empty string if one can."""
    reasons = [results.not_tested(row) for row in results.rows if parse_method(row.method).defended]
    return reasons[0] if reasons and all(reasons) else ""


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    """Return ``lines`` in a block that readers open with a click; an empty list if ``lines`` is empty."""
    if not lines:
        return []
    return ["", "<details>", f"<summary>{title}</summary>", *lines, "", "</details>"]


def _results(results: Results, keys: Sequence[str], labels: Sequence[str]) -> list[str]:
    paper = results.table.paper(results.dataset)
    lines = _header(["Method", "", *labels])
    for row in results.table.rows:
        figures = paper.get(row.name)
        there, here = results.etas(row)
        if figures:
            lines.append(_line([row.label, f"paper{there}", *(_two(figures.get(key)) for key in keys)]))
        if row.name in results.runs:
            runs = results.runs[row.name]
            values = [results.accuracies(run) for run in runs.values()]
            seeds = f"here{here}, {_count(runs, 'seed')}"
            lines.append(_line([row.label, seeds, *(_mean(v[key] for v in values) for key in keys)]))
    return lines


def _claims(results: Results) -> list[str]:
    """Return the primary contrasts, each with its word from the rules."""
    found = results.decided()
    if not found:
        return []
    lines = []
    for decision in found:
        paper = "positive" if decision.paper is None else f"{decision.paper:+.2f}"
        p = "" if decision.p is None else "< 0.001" if decision.p < 0.001 else f"{decision.p:.2g}"
        said = f"{decision.word} ({decision.why})" if decision.why else decision.word
        if decision.word == "not tested":
            p = ""
        if (claim := _elsewhere(results, decision)) is not None:
            p, said = "", f"decided [by all rows of these runs](../{claim.page}#claims)"
        label = f"{decision.row.label} minus {decision.other.label}"
        lines.append(_line([label, paper, str(decision.contrast), p, str(len(decision.seeds)), said]))
    return [
        "",
        "## Claims",
        "",
        "Differences of the mean accuracy under the attacks, in percentage points, with 95 % intervals. The standard "
        "error comes from one residual that is pooled over all rows and seeds. It is never below the sampling error of "
        "the test images. p is adjusted by Holm's method. [The rules](../rules.md) define the words.",
        "",
        *_header(["Difference", "paper", "here", "p", "seeds", "word"]),
        *lines,
    ]


def _over_fitting(results: Results) -> list[str]:
    """Return the over-fitting of the undefended rows, with the curves; an empty list without curves."""
    if not regimes(results):
        return []
    lines = []
    for rows in regimes(results):
        for row in rows:
            courses = results.validation(row)
            training = [100 * run["epochs"][-1]["accuracy"] for run in results.runs[row.name].values()]
            best = [100 * max(course) for course in courses]
            last = [100 * course[-1] for course in courses]
            lines.append(_line([row.label, _count(courses, "seed"), *(_mean(v) for v in (training, last, best))]))
    return [
        "",
        "## Over-fitting",
        "",
        "Robust accuracy in %. Training images are under the attack of the training, validation images under IFGSM-10 "
        "of the same radius. Validation images are neither trained nor tested on. A defence can be tested if "
        "the undefended row has a wide gap between the two, and loses after its best epoch.",
        "",
        f"![Robust accuracy over the epochs]({results.table.name}-epochs.png)",
        "",
        *_header(["Method", "", "training, last epoch", "validation, last epoch", "validation, best epoch"]),
        *lines,
    ]


def _columns(results: Results, keys: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the differences between rows for every column, next to the differences in the paper."""
    paper = results.table.paper(results.dataset)
    lines: list[str] = []
    pairs = [(row, other) for row in results.rows for other in results.table.compared(row)]
    for row, other in pairs:
        for key, label in zip(keys, labels, strict=True):
            contrast = results.contrast(row, other, key)
            if contrast is None:
                continue
            there = paper.get(row.name, {}).get(key), paper.get(other.name, {}).get(key)
            claimed = "" if there[0] is None or there[1] is None else f"{there[0] - there[1]:+.2f}"
            if key == "avg" and claimed:  # the mean of the columns, not of the rounded averages that the paper prints
                claimed = f"{results.table.paper_difference(row, other, results.dataset):+.2f}"
            seeds = results.runs[row.name].keys() & results.runs.get(other.name, {}).keys()
            lines.append(_line([f"{row.label} minus {other.label}", label, claimed, str(contrast), str(len(seeds))]))
    if not lines:
        return []
    return [
        "",
        "Each row minus the undefended one, and minus the rows that differ from it in one part. The differences are in "
        "percentage points with 95 % intervals as above. They are not adjusted for looking at many of them.",
        "",
        *_header(["Difference", "Column", "paper", "here", "seeds"]),
        *lines,
    ]


def _stricter(results: Results) -> list[str]:
    lines = [
        "",
        "This count is stricter and cannot be compared with the one above. An example is lost as soon as the clean "
        "image or any iterate is misclassified. The paper does not give it.",
        "",
        *_header(["Method", *(column.label for column in results.table.columns)]),
    ]
    for row in results.rows:
        worst = [results.accuracies(run, score="worst_so_far_accuracy") for run in results.runs[row.name].values()]
        lines.append(_line([row.label, *(_mean(v[column.key] for v in worst) for column in results.table.columns)]))
    return lines


def _autoattack(results: Results) -> list[str]:
    """Return the accuracies under AutoAttack on some test images, next to the IFGSM accuracies on these images."""
    table, lines = results.table, list[str]()
    name = table.autoattack.name
    nearby = [c for c in table.columns if c.attack == "ifgsm" and math.isclose(c.eps_255, table.autoattack_255)]
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in results.rows:
        for seed, run in results.runs[row.name].items():
            for key, evaluation in run["evaluations"]["last"].items():
                if key.split("@")[0] == name:
                    by_seed = found.setdefault((key, row.name), {})
                    by_seed[seed] = _on_the_same_images(
                        Evaluation.from_dict(evaluation),
                        Evaluation.from_dict(run["evaluations"]["last"][table.protocol]),
                        nearby,
                    )
    if not found:
        return []
    labels = [label for column in nearby for label in (column.label, f"{column.label}, worst so far")]
    for (key, row_name), by_seed in found.items():
        row = table.row(row_name)
        base = table.baseline(row)
        against = found.get((key, base.name), {}) if base is not None else {}
        common = sorted(by_seed.keys() & against.keys())
        difference = Difference(tuple(by_seed[s]["auto"] - against[s]["auto"] for s in common)) if common else None
        values = list(by_seed.values())
        cells = [row.label, _count(values, "seed"), f"{values[0]['images']:.0f}"]
        cells += [_mean(v[k] for v in values) for k in values[0] if k != "images"]
        lines.append(_line([*cells, "" if difference is None else str(difference)]))
    return [
        "",
        "The strongest of four attacks, one of them without gradients (Croce and Hein 2020; version standard of "
        f"pyautoattack). The radius is {table.autoattack_255:g}/255. All figures are of the first test images. "
        "AutoAttack counts an example as lost once anything breaks it, so compare it with the worst so far. "
        "Differences to the undefended row are in percentage points and paired, as above. The paper does not give it.",
        "",
        *_header(["Method", "", "images", "Acc", *labels, f"AutoAttack {table.autoattack_255:g}", "difference"]),
        *lines,
    ]


def _on_the_same_images(auto: Evaluation, whole: Evaluation, columns: Sequence[Column]) -> dict[str, float]:
    """Return the accuracies in % of ``whole`` on the images of ``auto``, which are its first images."""
    n = auto.n

    def percent(outcomes: Tensor | None) -> float:
        assert outcomes is not None
        return 100 * int(outcomes[:n].sum()) / n

    values = {"images": float(n), "acc": percent(auto.clean_outcomes)}
    for column in columns:
        attack = next(
            a
            for a in whole.attacks
            if (a.name, a.steps) == (column.attack, column.steps)
            and isinstance(a.eps, float)
            and math.isclose(255 * a.eps, column.eps_255)
        )
        values[column.key] = percent(attack.outcomes)
        values[f"{column.key} worst"] = percent(attack.worst_so_far_outcomes)
    return {**values, "auto": percent(auto.attacks[0].worst_so_far_outcomes)}


def _best(results: Results, keys: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the accuracies of the weights from the epoch with the best validation accuracy."""
    lines = []
    for row in results.rows:
        runs = [
            run
            for run in results.runs[row.name].values()
            if results.table.protocol in run["evaluations"].get("best", {})
        ]
        if runs:
            values = [results.accuracies(run, "best") for run in runs]
            epochs = ", ".join(str(run["best_epoch"]) for run in runs)
            lines.append(
                _line([row.label, _count(runs, "seed"), epochs, *(_mean(v[key] for v in values) for key in keys)])
            )
    if not lines:
        return []
    return [
        "",
        "As the first table, for the weights of the best epoch. This is the epoch with the highest accuracy on "
        "validation images, which are neither trained nor tested on. For adversarial objectives it is the accuracy "
        "under IFGSM-10 at the radius of the training.",
        "",
        *_header(["Method", "", "epochs", *labels]),
        *lines,
    ]


def _runs(results: Results) -> list[str]:
    """Return one line per run, then the data sets, the versions and the rows without a run."""
    head = ["Run", "eta", "training loss", "training accuracy", "Eq. 16 ratio, first and last epoch", "passes per step"]
    lines = [
        "",
        "Training figures of the last epoch are those of the passes that are trained on (attacked images, perturbed "
        "states). Passes per step: forward, backward to activations and weight gradients count 1 each. Wall times are "
        "those of these runs, not a benchmark.",
        "",
        *_header([*head, "training, s", "evaluation, s", "threads"]),
    ]
    everything = [(row, seed, run) for row in results.rows for seed, run in sorted(results.runs[row.name].items())]
    for row, seed, run in everything:
        config, first, last = RunConfig.from_dict(run["config"], imports=False), run["epochs"][0], run["epochs"][-1]
        ratios = [f"{epoch['ratio']:.2g}" if epoch.get("ratio") else "" for epoch in (first, last)]
        lines.append(
            _line(
                [
                    f"{row.label}, seed {seed}",
                    f"{getattr(config.training.defence, 'eta', 0.0):g}",
                    f"{last['loss']:.4f}",
                    f"{100 * last['accuracy']:.2f}",
                    ", ".join(ratio for ratio in ratios if ratio),
                    f"{passes(config)}",
                    f"{run['seconds']['training']:.0f}",
                    f"{run['evaluations']['last'][results.table.protocol]['seconds']:.0f}",
                    str(run["machine"]["threads"]),
                ]
            )
        )
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for _, _, run in everything})
    data = sorted(
        {
            f"{results.dataset} ({run['data']['source']}), {run['data']['train_images']} training and "
            f"{run['data']['test_images']} test images, fingerprint {run['data']['fingerprint']}"
            for _, _, run in everything
        }
    )
    lines += ["", f"Data: {'; '.join(data)}. Versions: {'; '.join(versions)}."]
    without = [row.label for row in results.table.rows if not _size(results, row).can_run(row)]
    if without:
        model = results.preset.sizes["pgd"].model
        what = "a block to damp" if model == "preact_resnet" else "noise and a block to damp"
        lines += ["", f"Not at this size, because the network lacks {what}: {', '.join(without)}."]
    if results.missing:
        seeds: dict[str, list[int]] = {}
        for name in results.missing:
            row_name, _, number = name.rpartition(" seed ")
            seeds.setdefault(row_name, []).append(int(number))
        lines += [
            "",
            "Without a record, because they were not run or diverged:",
            "",
            *(f"- `{name}`, {_seeds(missing)}" for name, missing in seeds.items()),
        ]
    return lines


def _size(results: Results, row: Row) -> Size:
    return results.preset.sizes[row.method.split("+")[0]]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) != 1 else ''} {ranges(seeds)}"


def differences(results: Results) -> str:
    """Return a sentence that lists how these runs differ from the paper's protocol."""
    head, items = _protocol(results)
    return f"{head}: {'; '.join(items)}."


def protocol(results: Results) -> list[str]:
    """Return the lines of a page that say how these runs differ from the paper's protocol: in short, and in full."""
    head, items = _protocol(results)
    more = len(items) - _SHOWN
    if more < 1:
        return [f"**{head}: {'; '.join(items)}.**"]
    first = "; ".join(re.sub(r" \([^()]*\)$", "", item) for item in items[:_SHOWN])  # without the names of rows
    short = f"**{head}: {first}; and {more} more.**"
    return [short, *_folded("All differences from the paper's protocol", ["", *(f"- {item}" for item in items)])]


def _protocol(results: Results) -> tuple[str, Sequence[str]]:
    table, dataset = results.table, results.dataset
    parts = []
    papers = {
        row.name: config
        for row, config in configurations(table, PRESETS["paper"], dataset=dataset, seeds=(0,))
        if row.name in results.runs
    }
    said: dict[str, list[str]] = {}
    for row in results.rows:
        for run in results.runs[row.name].values():
            config = RunConfig.from_dict(run["config"], imports=False)
            texts = _deviations(config, papers[row.name], run)
            for text in [*texts, *_eta_deviation(config, papers[row.name], as_factor=results.sweeps_eta)]:
                names = said.setdefault(text, [])
                if row.label not in names:
                    names.append(row.label)
    labels = [row.label for row in results.rows]
    methods = {row.label: parse_method(row.method) for row in results.rows}
    defended = [label for label, method in methods.items() if method.defended and not method.zero]
    for text, names in said.items():
        parts.append(text if names == labels else f"{text} ({_who(names, labels, defended)})")
    seeds = sorted({len(runs) for runs in results.runs.values()})
    if seeds[0] < len(PRESETS["paper"].seeds):
        counts = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        parts.append(f"{counts} instead of {len(PRESETS['paper'].seeds)} seeds")
    if not table.paper(dataset):
        elsewhere = any(table.paper(other) for other in ("cifar10", "cifar100"))
        parts.append("other data than in the paper" if elsewhere else "no such table in the paper")
    if not parts:
        return "The paper's protocol, with these choices of ours", _CHOICES
    return "Not the paper's protocol", parts


def _who(names: Sequence[str], labels: Sequence[str], defended: Sequence[str]) -> str:
    """Return a short text for ``names``, which are some of the row names ``labels``."""
    if list(names) == list(defended) and len(names) > 3:
        return "all with LAD"
    others = [label for label in labels if label not in names]
    if others and all("weight decay" in label for label in others):
        return "unless the row says another"
    return f"all but {', '.join(others)}" if len(names) > 3 * len(others) else ", ".join(names)


def _eta_deviation(here: RunConfig, paper: RunConfig, *, as_factor: bool) -> list[str]:
    """Return one sentence on the difference in eta, also for batches of the paper's size; none if eta is equal.

    ``as_factor`` gives eta as a multiple of the paper's eta.
    """
    mine, theirs = (getattr(config.training.defence, "eta", 0.0) for config in (here, paper))
    if mine == theirs:
        return []
    batch = paper.training.batch_size
    in_batches = batch / here.training.batch_size
    if math.isclose(mine * in_batches, theirs):
        return [f"the paper's eta, scaled to batches of {here.training.batch_size}"]
    unit = mine / theirs if as_factor else mine
    times = " times" if as_factor else ""
    same = f" ({unit * in_batches:g}{times} in batches of {batch})" if in_batches != 1 else ""
    nearby = "the paper's" if as_factor else f"instead of {theirs:g}"
    return [f"eta {unit:g}{times}{same} {nearby}"]


def _deviations(here: RunConfig, paper: RunConfig, run: Record) -> list[str]:
    """Return the differences from the paper's run, those that change the task most first."""
    parts = []
    mine, theirs = plain.to_dict(here.training), plain.to_dict(paper.training)
    steps, radii = ([o["objective"].get(key) for o in (mine, theirs)] for key in ("steps", "eps"))
    if here.model.label != paper.model.label:
        parts.append(f"{here.model.label} instead of ResNet-{paper.model.depth}")
    if here.data.train_images or here.data.validation_images:
        aside = f" and {here.data.validation_images} to validate" if here.data.validation_images else ""
        parts.append(f"{run['data']['train_images']} training images{aside}")
    if here.data.image_size:
        parts.append(f"images of {here.data.image_size} x {here.data.image_size} pixels")
    if radii[0] != radii[1]:
        parts.append(f"eps {255 * radii[0]:g}/255 instead of {255 * radii[1]:g}/255 in training")
    for name, label in (("epochs", "epochs"), ("batch_size", "images per batch"), ("precision", "training")):
        if mine[name] != theirs[name]:
            parts.append(f"{mine[name]} instead of {theirs[name]} {label}")
    for name in ("lr", "momentum", "weight_decay"):
        if mine[name] != theirs[name]:
            parts.append(f"{name} {mine[name]:g} instead of {theirs[name]:g}")
    if [m / mine["epochs"] for m in mine["milestones"]] != [m / theirs["epochs"] for m in theirs["milestones"]]:
        parts.append(f"learning rate drops after {', '.join(map(str, mine['milestones']))} epochs")
    if steps[0] != steps[1]:
        parts.append(f"{steps[0]} instead of {steps[1]} attack steps in training")
    if mine["augment"] != theirs["augment"]:
        parts.append("no augmentation" if mine["augment"] == "none" else f"augmentation by {mine['augment']}")
    if here.model.passes != paper.model.passes:
        parts.append(f"{here.model.passes} instead of {paper.model.passes} noisy passes averaged")
    if here.data.test_images:
        parts.append(f"{run['data']['test_images']} test images")
    return parts


def _count(things: Iterable[Any], noun: str) -> str:
    number = len(list(things))
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    mean = f"{statistics.fmean(found):.2f}"
    return f"{mean} ± {statistics.stdev(found):.2f}" if len(found) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]
