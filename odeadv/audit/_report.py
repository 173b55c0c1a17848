"""The result of an audit, and its forms: a checklist, JSON and a page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from odeadv.support.files import write_json, write_text
from odeadv.support.pages import finite, markdown_table, new_figure, save_figure
from odeadv.support.statistics import wilson_interval

SCHEMA = "odeadv.audit/1"
Mark = Literal["pass", "fail", "not applicable"]

_MARKS: dict[Mark, str] = {"pass": "pass", "fail": "**fail**", "not applicable": "not applicable"}


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: name of the check.
        status: the verdict.
        figures: the figures behind the verdict, JSON-ready.
        found: one sentence with the figures.
        meaning: one sentence that explains what a failure means.
    """

    name: str
    status: Mark
    figures: Mapping[str, Any]
    found: str
    meaning: str


@dataclass(frozen=True, repr=False)
class Audit:
    """The result of `audit`; prints as a checklist.

    Attributes:
        checks: the lines, in order.
        n: number of examples.
        eps: radius of the ball, in pixel units of [0, 1].
        against_eps: pairs (eps, worst-so-far accuracy under IFGSM).
        against_steps: pairs (steps, worst-so-far accuracy under IFGSM at ``eps``).
        settings: the other settings.
        norm: norm of the ball.
        clean_correct: number of examples that are correct without an attack; None if it is unknown.
        robust_correct: number of examples that are correct under every attack within ``eps``; None if the model is
            random or cannot be attacked.
    """

    checks: tuple[Check, ...]
    n: int
    eps: float
    against_eps: tuple[tuple[float, float], ...] = ()
    against_steps: tuple[tuple[int, float], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "linf"
    clean_correct: int | None = None
    robust_correct: int | None = None

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def clean_accuracy(self) -> float | None:
        """``clean_correct`` as a fraction."""
        return None if self.clean_correct is None else self.clean_correct / self.n

    @property
    def robust_accuracy(self) -> float | None:
        """``robust_correct`` as a fraction. Quote this figure; it is an upper bound of the robust accuracy."""
        return None if self.robust_correct is None else self.robust_correct / self.n

    def __getitem__(self, name: str) -> Check:
        """Return the check called ``name``; raise KeyError for an unknown name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r}: expected one of {', '.join(check.name for check in self.checks)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the whole audit as JSON-ready data; figures that are not finite become None."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "n": self.n,
            "norm": self.norm,
            "eps": self.eps,
            "eps_255": round(255 * self.eps, 9) if self.norm == "linf" else None,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_accuracy_interval": self._interval(),
            "settings": dict(self.settings),
            "checks": [
                {
                    "name": check.name,
                    "status": check.status,
                    "figures": finite(check.figures),
                    "found": check.found,
                    "meaning": check.meaning,
                }
                for check in self.checks
            ],
            "against_eps": [list(point) for point in self.against_eps],
            "against_steps": [list(point) for point in self.against_steps],
        }

    def to_markdown(self, about: str = "") -> str:
        """Return a page of Markdown: verdict, headline, table, failures; ``about`` says which model was audited."""
        lines = [
            "# Audit of a robustness evaluation",
            "",
            *([about, ""] if about else []),
            f"{self._counts()}; {self.n} examples, eps = {self._radius(self.eps)}.",
            "",
            f"{self._headline()}.",
            "",
            *markdown_table(
                ("check", "verdict", "found"),
                [(check.name, _MARKS[check.status], check.found) for check in self.checks],
            ),
        ]
        if self.failures:
            lines += ["", "## What the failures mean", ""]
            lines += [f"- **{check.name}**: {check.meaning}" for check in self.failures]
        if self.against_eps:
            lines += ["", "## Accuracy against eps and against steps", ""]
            lines += ["![accuracy against eps](accuracy_against_eps.png)", ""]
            lines += ["![accuracy against steps](accuracy_against_steps.png)", ""]
            lines += _curve(self._axis, [(self._scale * eps, accuracy) for eps, accuracy in self.against_eps])
            lines += ["", *_curve("steps", self.against_steps)]
        lines += ["", "## What every check is for", ""]
        lines += [f"- **{check.name}**: {check.meaning}" for check in self.checks]
        return "\n".join(lines) + "\n"

    def write(self, folder: str | Path, about: str = "") -> None:
        """Write ``audit.json``, ``audit.md`` and, if there are curves, two plots into ``folder``, each atomically.

        Args:
            folder: created if it does not exist.
            about: a sentence that says which model was audited.
        """
        folder = Path(folder)
        write_json(folder / "audit.json", self.to_dict() | {"about": about})
        if self.against_eps:
            points = [(self._scale * eps, accuracy) for eps, accuracy in self.against_eps]
            _plot(folder / "accuracy_against_eps.png", points, self._axis, mark=self._scale * self.eps)
            _plot(folder / "accuracy_against_steps.png", self.against_steps, "steps of IFGSM")
        write_text(folder / "audit.md", self.to_markdown(about))

    def __repr__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [
            f"audit: n = {self.n}, eps = {self._radius(self.eps)}; {self._counts()}",
            self._headline(),
        ]
        for check in self.checks:
            texts = (check.found, check.meaning) if check.status == "fail" else (check.found,)
            # 66 characters after names of up to 35 and a verdict of 15 make lines of less than 120.
            first, *more = [row for text in texts for row in textwrap.wrap(text, 66, break_on_hyphens=False) or [""]]
            lines.append(f"{check.status:<15}{check.name:<{width}}  {first}")
            lines += [f"{'':{17 + width}}{row}" for row in more]
        return "\n".join(lines)

    def _counts(self) -> str:
        counts = {status: sum(check.status == status for check in self.checks) for status in _MARKS}
        return f"{counts['pass']} checks passed, {counts['fail']} failed, {counts['not applicable']} not applicable"

    def _headline(self) -> str:
        interval = self._interval()
        if self.robust_accuracy is None or self.clean_accuracy is None or interval is None:
            return "accuracy under everything tried: unknown (the model is random or cannot be attacked)"
        low, high = interval
        return (
            f"accuracy under everything tried: {100 * self.robust_accuracy:.1f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f}); clean {100 * self.clean_accuracy:.1f} %"
        )

    def _interval(self) -> tuple[float, float] | None:
        return None if self.robust_correct is None else wilson_interval(self.robust_correct, self.n)

    @property
    def _scale(self) -> float:
        """The factor from an L-infinity radius to grey levels (255); 1 for L2 radii."""
        return 255 if self.norm == "linf" else 1

    @property
    def _axis(self) -> str:
        return "eps (1/255)" if self.norm == "linf" else "eps in L2"

    def _radius(self, eps: float) -> str:
        return f"{255 * eps:g}/255" if self.norm == "linf" else f"{eps:g} in L2"


def _curve(label: str, points: Sequence[tuple[float, float]]) -> list[str]:
    return markdown_table((label, "accuracy, %"), [(f"{x:g}", f"{100 * accuracy:.1f}") for x, accuracy in points])


def _plot(path: Path, points: Sequence[tuple[float, float]], label: str, mark: float | None = None) -> None:
    figure = new_figure(5, 3.2)
    axes = figure.add_subplot()
    x, y = zip(*points, strict=True)
    axes.plot(x, [100 * value for value in y], marker="o")
    axes.set_xscale("symlog", linthresh=1.0)  # the scale is linear below 1, so that it shows eps = 0
    axes.set_xticks(x, [f"{value:g}" for value in x])
    if mark is not None:
        axes.axvline(mark, color="0.7", linestyle="--", zorder=0)
    axes.set(xlabel=label, ylabel="accuracy, worst so far (%)", ylim=(-3, 103))
    save_figure(path, figure)
