"""What an audit found, and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from odeadv.support.files import replacing, write_json, write_text

SCHEMA = "odeadv.audit/1"
Status = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what is checked.
        status: the verdict.
        figures: what it rests on, JSON-ready.
        found: one sentence with the figures.
        meaning: one sentence on what failure means.
    """

    name: str
    status: Status
    figures: Mapping[str, Any]
    found: str
    meaning: str


@dataclass(frozen=True, repr=False)
class Audit:
    """The result of `audit`; prints as a checklist.

    Attributes:
        checks: the lines, in order.
        n: number of examples.
        eps: radius of the L-infinity ball, in pixel units of [0, 1].
        against_eps: (eps, accuracy) pairs: worst-so-far accuracy under IFGSM.
        against_steps: (steps, accuracy) pairs at ``eps``: the same.
        settings: what else was set.
    """

    checks: tuple[Check, ...]
    n: int
    eps: float
    against_eps: tuple[tuple[float, float], ...] = ()
    against_steps: tuple[tuple[int, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no line failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The lines that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def __getitem__(self, name: str) -> Check:
        """The line called ``name``; KeyError if there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r}: expected one of {', '.join(check.name for check in self.checks)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data (figures that are not finite as None)."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "n": self.n,
            "eps": self.eps,
            "eps_255": round(255 * self.eps, 9),
            "settings": dict(self.settings),
            "checks": [
                {
                    "name": check.name,
                    "status": check.status,
                    "figures": _finite(check.figures),
                    "found": check.found,
                    "meaning": check.meaning,
                }
                for check in self.checks
            ],
            "against_eps": [list(point) for point in self.against_eps],
            "against_steps": [list(point) for point in self.against_steps],
        }

    def to_markdown(self, about: str = "") -> str:
        """A page: verdict, table, and what failed; ``about`` says what was audited."""
        counts = {status: sum(check.status == status for check in self.checks) for status in _MARKS}
        lines = [
            "# Audit of a robustness evaluation",
            "",
            *([about, ""] if about else []),
            f"{counts['pass']} checks passed, {counts['fail']} failed, {counts['not applicable']} not applicable; "
            f"{self.n} examples, eps = {255 * self.eps:g}/255.",
            "",
            "| check | verdict | found |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {check.name} | {_MARKS[check.status]} | {_cell(check.found)} |" for check in self.checks]
        if self.failures:
            lines += ["", "## What the failures mean", ""]
            lines += [f"- **{check.name}**: {check.meaning}" for check in self.failures]
        if self.against_eps:
            lines += ["", "## Accuracy against eps and against steps", ""]
            lines += ["![accuracy against eps](accuracy_against_eps.png)", ""]
            lines += ["![accuracy against steps](accuracy_against_steps.png)", ""]
            lines += ["| eps (1/255) | accuracy, % |", "| --- | --- |"]
            lines += [f"| {255 * eps:g} | {100 * accuracy:.1f} |" for eps, accuracy in self.against_eps]
            lines += ["", "| steps | accuracy, % |", "| --- | --- |"]
            lines += [f"| {steps} | {100 * accuracy:.1f} |" for steps, accuracy in self.against_steps]
        lines += ["", "## What every check is for", ""]
        lines += [f"- **{check.name}**: {check.meaning}" for check in self.checks]
        return "\n".join(lines) + "\n"

    def write(self, folder: str | Path, about: str = "") -> None:
        """Write ``audit.json``, ``audit.md`` and, if there are curves, two plots into ``folder``, each atomically.

        Args:
            folder: made if it is not there.
            about: a sentence on what was audited.
        """
        folder = Path(folder)
        write_json(folder / "audit.json", self.to_dict() | {"about": about})
        if self.against_eps:
            points = [(255 * eps, accuracy) for eps, accuracy in self.against_eps]
            _plot(folder / "accuracy_against_eps.png", points, "eps (1/255)", mark=255 * self.eps)
            _plot(folder / "accuracy_against_steps.png", self.against_steps, "steps of IFGSM")
        write_text(folder / "audit.md", self.to_markdown(about))

    def __repr__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [
            f"audit: n = {self.n}, eps = {255 * self.eps:g}/255, {len(self.failures)} of {len(self.checks)} failed"
        ]
        for check in self.checks:
            lines.append(f"{check.status:<15}{check.name:<{width}}  {check.found}")
            if check.status == "fail":
                lines.append(f"{'':15}{'':{width}}  {check.meaning}")
        return "\n".join(lines)


_MARKS: dict[Status, str] = {"pass": "pass", "fail": "**fail**", "not applicable": "not applicable"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(path: Path, points: Sequence[tuple[float, float]], label: str, mark: float | None = None) -> None:
    from matplotlib.figure import Figure  # no pyplot: it keeps global state

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    x, y = zip(*points, strict=True)
    axes.plot(x, [100 * value for value in y], marker="o")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    if mark is not None:
        axes.axvline(mark, color="0.7", linestyle="--", zorder=0)
    axes.set(xlabel=label, ylabel="accuracy, worst so far (%)", ylim=(-3, 103))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)
