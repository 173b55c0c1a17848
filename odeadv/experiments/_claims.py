"""The page of claims: each claim of the paper, the result of the runs, and the word from the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from odeadv.experiments._campaign import planned
from odeadv.experiments._presets import PRESETS
from odeadv.experiments._records import load_records
from odeadv.experiments._tables import TABLES
from odeadv.support.files import write_json, write_text
from odeadv.support.pages import markdown_table

from ._results import Decision, NoRunsError, Results, gather, ranges

SCHEMA = "odeadv.claims/3"
# Digits of the JSON: the quantiles of different versions of SciPy agree to about nine.
_DIGITS = 6


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the contrast that decides it.

    Attributes:
        text: the claim in one sentence.
        source: the place in the paper; "implied" if the claim only follows from other statements of the paper.
        table, preset: names of the table and the preset whose runs decide the claim.
        row, other: names of the rows. The difference is ``row`` minus ``other``. Both are empty if the claim is about
            the shape of a table over eta.
        again: a second pair of rows that answers the same question. The weaker of the readings counts.
        best: a pair of rows whose weights of the best epoch are a further reading.
        dataset: name of the data set.
    """

    text: str
    source: str
    table: str
    preset: str
    row: str = ""
    other: str = ""
    again: tuple[str, str] | None = None
    best: tuple[str, str] | None = None
    dataset: str = "cifar10"

    @property
    def page(self) -> str:
        """The path of the table's page, relative to the folder of results."""
        return f"{self.table}-{self.dataset}-{self.preset}/{self.table}.md"


_DECAY = ":wd0.02"
_BEST = ":wd0.05"  # the weight decay that validation images choose for plain PGD


def _natural_claims(network: str, table: str, preset: str, factor: str, again: str) -> tuple[Claim, ...]:
    """Return the claims on natural training, read at weight decay 2e-2 and again at 5e-4.

    ``factor`` and ``again`` are the factors of eta at the two weight decays.
    """
    questions = (
        (f"LAD makes natural training of {network} more robust", "Table 1", "lad", ""),
        (f"LAD-SM makes natural training of {network} more robust", "Table 1", "lad-sm", ""),
        (f"LAD-SM is less robust than LAD after natural training of {network}", "Table 1", "lad-sm", "+lad@{}"),
        (f"The direction of the costate helps natural training of {network}", "implied", "lad-sm", "+lad-sm+random@{}"),
        (f"The gain of {network} in natural training is not bought by more compute", "implied", "lad", "+matched"),
    )
    return tuple(
        Claim(
            text, source, table, preset, f"natural+{row}@{factor}{_DECAY}", f"natural{other.format(factor)}{_DECAY}",
            again=(f"natural+{row}@{again}", f"natural{other.format(again)}"),
        )
        for text, source, row, other in questions
    )  # fmt: skip


#: The claims of the paper, in the order of their page: one `Claim` each.
CLAIMS = (
    *(
        Claim(text, source, "ablations", "cpu", f"natural+{row}", f"natural{other}")
        for text, source, row, other in (
            ("LAD makes natural training of a ResNet more robust", "Table 1", "lad", ""),
            ("LAD-SM makes natural training of a ResNet more robust", "Table 1", "lad-sm", ""),
            ("LAD-SM is less robust than LAD after natural training of a ResNet", "Table 1", "lad-sm", "+lad"),
            ("The direction of the costate helps natural training of a ResNet", "implied", "lad-sm", "+lad-sm+random"),
            ("The gain of a ResNet in natural training is not bought by more compute", "implied", "lad", "+matched"),
        )
    ),
    *_natural_claims("a residual MLP", "mechanism-natural", "mlp", "0.4", "0.1"),
    *_natural_claims("a ConvNet", "mechanism-natural-conv", "overfit", "0.1", "0.03"),
    Claim(
        "Perturbing all layers of a naturally trained ConvNet is better than perturbing the input", "implied",
        "mechanism-natural-conv", "overfit", f"natural+lad@0.1{_DECAY}", f"natural+lad+input@1.5{_DECAY}",
        again=(f"natural+lad@0.1{_DECAY}", f"natural+lad+input@4{_DECAY}"),
    ),
    Claim("In-ResNet makes natural training more robust", "Table 1", "table1", "cpu", "natural+damp", "natural"),
    Claim(
        "lambda-In-ResNet makes natural training more robust", "Table 1", "table1", "cpu", "natural+lambda-damp",
        "natural",
    ),
    *(
        Claim(
            f"{name} improves PGD training of a residual MLP", "Table 2", "mechanism", "mlp",
            f"{row}{_DECAY}", f"pgd{_DECAY}", again=(f"{row}{_BEST}", f"pgd{_BEST}"),
        )
        for name, row in (("LAD", "pgd+lad"), ("LAD-SM", "pgd+lad-sm"))
    ),
    *(
        Claim(text, source, "mechanism", "mlp", f"{row}{_DECAY}", f"{other}{_DECAY}")
        for text, source, row, other in (
            (
                "LAD-SM is better than LAD for PGD training of a residual MLP", "Table 2", "pgd+lad-sm", "pgd+lad",
            ),
            (
                "The direction of the costate helps PGD training of a residual MLP", "implied", "pgd+lad-sm",
                "pgd+lad-sm+random",
            ),
            (
                "Perturbing all layers of a residual MLP is better than perturbing the input", "implied", "pgd+lad",
                "pgd+lad+input@6",
            ),
        )
    ),
    *(
        Claim(
            f"{name} improves PGD training of a ConvNet", "Table 2", "mechanism-conv", "overfit",
            f"{row}@0.1:wd0.03", "pgd:wd0.03", best=(f"{row}@0.1:wd0.02", "pgd:wd0.02"),
        )
        for name, row in (("LAD", "pgd+lad"), ("LAD-SM", "pgd+lad-sm"))
    ),
    *(
        Claim(text, source, "mechanism-conv", "overfit", *pair, best=pair)
        for text, source, pair in (
            (
                "LAD-SM is better than LAD for PGD training of a ConvNet", "Table 2",
                ("pgd+lad-sm@0.1:wd0.02", "pgd+lad@0.1:wd0.02"),
            ),
            (
                "The direction of the costate helps PGD training of a ConvNet", "implied",
                ("pgd+lad-sm@0.1:wd0.02", "pgd+lad-sm+random@0.1:wd0.02"),
            ),
            (
                "Perturbing all layers of a ConvNet is better than perturbing the input", "implied",
                ("pgd+lad@0.1:wd0.02", "pgd+lad+input@1.5:wd0.02"),
            ),
        )
    ),
    *(
        Claim(
            f"{name} improves TRADES, beyond the mix of losses", "Table 3", "mechanism-trades", "mlp",
            f"{row}@0.4{_DECAY}", f"trades+lad+eta0{_DECAY}",
            again=(f"{row}@0.4", "trades+lad+eta0"),
        )
        for name, row in (("LAD", "trades+lad"), ("LAD-SM", "trades+lad-sm"))
    ),
    *(
        Claim(text, "Tables 4 and 7", "mechanism-noise", "overfit", *pair, best=pair)
        for text, pair in (
            (
                "LAD-SM adds to noise in PGD training of a ConvNet",
                ("pgd+lad-sm+noise@0.1:wd0.02", "pgd+noise:wd0.02"),
            ),
            (
                "Noise adds to LAD-SM in PGD training of a ConvNet",
                ("pgd+lad-sm+noise@0.1:wd0.02", "pgd+lad-sm@0.1:wd0.02"),
            ),
        )
    ),
    Claim("A range of eta helps, and too large an eta harms", "Table 5", "mechanism-eta", "mlp"),
    *(
        Claim(
            f"{name} improves PGD training of a residual MLP under attacks of more steps", "Table 6",
            "mechanism-steps", "mlp", f"{row}{_DECAY}", f"pgd{_DECAY}",
        )
        for name, row in (("LAD", "pgd+lad"), ("LAD-SM", "pgd+lad-sm"))
    ),
)  # fmt: skip


def decide(claim: Claim, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the decision of the records on ``claim``, as plain data.

    The hypotheses come from the seeds of the pilots. These seeds are left out if there are at least two others.
    """
    return _decide(claim, _gather(claim, records))


def _decide(claim: Claim, results: Results | None) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "word": "not tested",
        "why": "these rows have not been run",
        "seeds": [],
        "difference": None,
    }
    table = TABLES[claim.table]
    rows = f"{table.row(claim.row).label} minus {table.row(claim.other).label}" if claim.row else "best eta minus none"
    result: dict[str, Any] = {"claim": claim.text, "source": claim.source, "rows": rows, "page": claim.page, **nothing}
    if results is None:
        return {**result, "page": None}
    if not claim.row:
        return result | _shape(results)
    readings = _readings(results, ((claim.row, claim.other), claim.again))
    at_best = _readings(_at_best(results), (claim.best,)) if claim.best else {}
    readings |= {f"{label}, at the best epoch": decision for label, decision in at_best.items()}
    if not readings:
        return result
    weaker = min(readings, key=lambda label: _support(readings[label]))
    result |= _found(readings[weaker])
    result["rows"] = weaker
    result["why"] = "; ".join(filter(None, [result["why"], _unfinished(claim, readings)]))
    result["other_readings"] = [
        {"rows": label} | _numbers(decision) for label, decision in readings.items() if label != weaker
    ]
    return result


def _unfinished(claim: Claim, readings: Mapping[str, Decision]) -> str:
    """Return how many seeds or readings of ``claim`` there are so far; empty if all runs have been made."""
    expected = 1 + (claim.again is not None) + (claim.best is not None)
    if len(readings) < expected:
        return f"{len(readings)} of {expected} readings so far"
    for decision in readings.values():
        rows, done = (decision.row.name, decision.other.name), set(decision.seeds)
        seeds = set.intersection(*(planned(claim.table, claim.preset, row) or set() for row in rows))
        if done < seeds:
            return f"{len(done)} of {len(seeds)} seeds so far"
    return ""


def _readings(results: Results, pairs: Sequence[tuple[str, str] | None]) -> dict[str, Decision]:
    """Return the decisions on the ``pairs`` of rows that have runs, keyed by a text that names the comparison."""
    if not results.runs:
        return {}
    found = {(decision.row.name, decision.other.name): decision for decision in results.decided()}
    chosen = [found[pair] for pair in pairs if pair in found]
    return {f"{decision.row.label} minus {decision.other.label}": decision for decision in chosen}


def _at_best(results: Results) -> Results:
    """Return the results at the weights of the best epoch, of the runs that have been evaluated there."""
    protocol = results.table.protocol
    runs = {
        name: {seed: run for seed, run in by_seed.items() if protocol in run["evaluations"].get("best", {})}
        for name, by_seed in results.runs.items()
    }
    return replace(results, runs={name: kept for name, kept in runs.items() if kept}, weights="best")


def _gather(claim: Claim, records: Sequence[Mapping[str, Any]]) -> Results | None:
    """Return the results of the table of ``claim``; None if no record belongs to it."""
    try:
        return gather(TABLES[claim.table], PRESETS[claim.preset], claim.dataset, records)
    except NoRunsError:
        return None


def _support(decision: Decision) -> float:
    """Return the end of the interval that supports the claim least, or the difference itself without an interval.

    If the paper's difference is negative, the sign is changed, so a larger number always supports the claim more.
    """
    sign = -1.0 if decision.paper is not None and decision.paper < 0.0 else 1.0
    return min(sign * end for end in decision.contrast.interval or (decision.contrast.mean,))


def _numbers(decision: Decision) -> dict[str, Any]:
    return {"difference": round(decision.contrast.mean, _DIGITS), "interval": _ends(decision.contrast.interval)}


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [round(end, _DIGITS) for end in interval]


def _found(decision: Decision) -> dict[str, Any]:
    return _numbers(decision) | {
        "alone": _ends(decision.alone.interval),
        "paper": decision.paper,
        "p": None if decision.p is None else float(f"{decision.p:.{_DIGITS}g}"),
        "strength": decision.strength,
        "seeds": list(decision.seeds),
        "word": decision.word,
        "why": decision.why,
    }


def _shape(results: Results) -> dict[str, Any]:
    """Decide the claim about the shape over eta, by the rule of stage 4 in docs/results/rules.md."""
    found = [decision for decision in results.decided() if len(decision.seeds) > 1]
    if not found:
        return {"why": "fewer than two seeds"}
    why = results.over_fitting()[1]
    best = max(found, key=lambda decision: decision.contrast.mean)
    largest = max(decision.row.factor for decision in found)
    harmed = all(f.contrast.mean < best.contrast.mean for f in found if f.row.factor == largest)
    seen = [f for f in found if f.p is not None and f.p < 0.05 and f.contrast.mean > 0]
    within = all(f.contrast.interval is not None and max(map(abs, f.contrast.interval)) <= 1.0 for f in found)
    said = "confirmed" if seen and harmed else "absent" if not seen and within else "undecided"
    return _found(best) | {
        "word": "not tested" if why else said,
        "why": why or f"the best of {len(found)} is {best.row.label}",
    }


def write_claims(records: Path, out: Path) -> str:
    """Write ``out/claims.json`` and ``out/claims.md`` from the folder ``records``, and return the Markdown.

    A claim links to the page of its table if the page exists next to the folder of records.

    Args:
        records: folder of records, see `load_records`.
        out: folder for ``claims.json`` and ``claims.md``.

    Raises:
        ValueError: if a JSON file is not a record of a run.
        NotADirectoryError: if the folder does not exist.
    """
    loaded = load_records(records)
    # Several claims share a table. Its runs are read once.
    tables = {(claim.table, claim.preset, claim.dataset): claim for claim in CLAIMS}
    gathered = {key: _gather(claim, loaded) for key, claim in tables.items()}
    claims = [_decide(claim, gathered[claim.table, claim.preset, claim.dataset]) for claim in CLAIMS]
    for claim in claims:
        if claim["page"] is not None and not (records.parent / claim["page"]).is_file():
            claim["page"] = None  # the page of this table has not been written yet
    data = {"schema": SCHEMA, "claims": claims}
    write_json(out / "claims.json", data)
    text = render_claims(data)
    write_text(out / "claims.md", text)
    return text


def render_claims(data: Mapping[str, Any]) -> str:
    """Return the page of claims as Markdown, from the data that `write_claims` writes."""
    rows, notes = [], []
    for claim in data["claims"]:
        text, paper, s = claim["claim"], claim.get("paper"), claim.get("strength")
        said = f"**{claim['word']}**" + (f" ({claim['why']})" if claim["why"] else "")
        link = text if claim["page"] is None else f"[{text}]({claim['page']})"
        shown = "" if paper is None else f"{paper:+.2f}"
        here = _number(claim)
        if alone := claim.get("alone"):
            here += f" ({alone[0]:+.2f} to {alone[1]:+.2f})"
        rows.append([link, claim["source"], shown, here, ranges(claim["seeds"]), said])
        notes.append(f"- **{text}**: {claim['rows']}." + ("" if s is None else f" Strength: s = {100 * s:.2g} %."))
        if others := claim.get("other_readings"):
            notes[-1] += " The other reading: " if len(others) == 1 else " The other readings: "
            notes[-1] += "; ".join(f"{other['rows']}: {_number(other)}" for other in others) + "."
    lines = [
        "# The claims of the paper, one by one",
        "",
        "*Paper* and *here* are differences of the mean accuracy under the attacks of the table, in percentage points. "
        "They are of last iterates, and of last weights unless the list below says the best epoch.",
        "",
        "*Here* has two 95 % intervals. The one in square brackets pools one error over all rows of a page; by "
        "[the rules](rules.md) it decides the word. The one in round brackets is Student's t interval of the "
        "differences of these two rows, seed by seed. It does not assume that all rows vary alike, but has fewer "
        "degrees of freedom. If only one of the two contains 0, the word depends on the choice of the error.",
        "",
        "The rules also say what was changed after results were seen. Each claim links to its page, which has the "
        "runs. All runs of a page share one training subset and one test subset of CIFAR-10, and the networks are "
        "small.",
        "",
        *markdown_table(["Claim", "Source", "Paper", "Here", "Seeds", "Word"], rows),
        "",
        "## Which rows were compared?",
        "",
        "s is the strength of the defence in the middle of the training: the relative rise of the loss that the "
        'perturbation makes, to first order. "eta x 0.1" is a tenth of the preset\'s eta. If a claim has two readings, '
        "the weaker one is in the table and the other one is here.",
        "",
        *notes,
        "",
        "Made by `odeadv report claims docs/results/runs --out docs/results`.",
    ]
    return "\n".join(lines) + "\n"


def _number(found: Mapping[str, Any]) -> str:
    """Return a difference and its interval as text."""
    if found["difference"] is None:
        return ""
    interval = found.get("interval")
    return f"{found['difference']:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")
