"""All diagnostics of one field, or of several side by side, on one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as _field
from pathlib import Path
from typing import Any

from torch import Tensor

from odeadv._version import __version__
from odeadv.diagnostics._contraction import contraction
from odeadv.diagnostics._costate import costate_residual_of
from odeadv.diagnostics._energy import energy_of, hamiltonian
from odeadv.diagnostics._growth import growth, lipschitz_of
from odeadv.diagnostics._linear import check_iteration
from odeadv.diagnostics._path import AnyField, walk
from odeadv.diagnostics._perturbation import perturbation_of
from odeadv.diagnostics._result import Result, new_axes, plain
from odeadv.diagnostics._second_order import second_order_of
from odeadv.fields import AdversarialField
from odeadv.solver import SolveError
from odeadv.support.files import replacing, write_json, write_text

SCHEMES = ("lie", "strang", "strang-midpoint", "strang-symmetric")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured.

    Attributes:
        title: of the page.
        results: for each field by name, its results by the name of the diagnostic.
        failures: for each field by name, why a diagnostic could not be measured, by the diagnostic's name.
        page: the Markdown file.
    """

    title: str
    results: dict[str, dict[str, Result]]
    failures: dict[str, dict[str, str]] = _field(default_factory=dict)
    page: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """All results as plain data that JSON can hold."""
        return {"title": self.title, "odeadv": __version__, "fields": plain(self.results), "failures": self.failures}


def diagnose(
    field: AnyField | Mapping[str, AnyField],
    folder: str | os.PathLike[str],
    x0: Tensor | None = None,
    t_span: tuple[float, float] | None = None,
    *,
    dt: float | None = None,
    steps: int | None = None,
    substep: Any = None,
    start: Tensor | Mapping[str, Tensor] | None = None,
    most: int = 50,
    title: str = "Diagnostics",
    about: str = "",
) -> Diagnosis:
    """Run every diagnostic that ``field`` allows, and write ``diagnostics.md``, ``diagnostics.json`` and pictures.

    A field without a loss has Lipschitz estimates and growth only; without a perturbation (eta = 0) there is no
    energy. A diagnostic whose solve fails is reported on the page as such, and the others are still made. Each file is
    written atomically.

    Args:
        field: a field, ``net.field(images, labels, eta)`` for a network; or several by name, to be drawn side by side,
            such as one network trained with and one without the defence, on the same images.
        folder: where to write; made if it is not there.
        x0: see `odeadv.solve`.
        t_span: see `odeadv.solve`.
        dt: see `odeadv.solve`.
        steps: see `odeadv.solve`.
        substep: see `odeadv.solve`; for a network give ``**net.solve_options``.
        start: another initial state, whose difference is followed in place of a random direction, such as
            ``net.stem(attacked_images)``; one for all fields, or by name.
        most: iterations of each power method at the most; what has not converged by then says so.
        title: heading of the page.
        about: a paragraph under it: what was measured, on which data.

    Returns:
        The results.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, before anything is written.
        SolveError: if a field cannot even be solved without its perturbation.
    """
    fields: dict[str, AnyField] = dict(field) if isinstance(field, Mapping) else {"": field}
    if not fields or not all(isinstance(name, str) for name in fields):
        raise ValueError(
            "field: got a mapping without entries, or with names that are not text; expected fields by name"
        )
    check_iteration(0.5, most)
    starts = start if isinstance(start, Mapping) else dict.fromkeys(fields, start)
    unknown = [name for name in starts if name not in fields]
    if unknown:
        raise ValueError(f"start: got one for {unknown[0]!r}, expected names of the fields: {', '.join(fields)}")
    results: dict[str, dict[str, Result]] = {}
    failures: dict[str, dict[str, str]] = {}
    for name, one in fields.items():
        results[name], failures[name] = _measure(one, x0, t_span, dt, steps, substep, starts.get(name), most)
    out = Path(folder)
    diagnosis = Diagnosis(title, results, {name: why for name, why in failures.items() if why}, out / "diagnostics.md")
    pictures = _draw(results, out)
    write_json(out / "diagnostics.json", diagnosis.to_dict())
    write_text(diagnosis.page, _page(diagnosis, about, pictures))
    return diagnosis


def _measure(
    field: AnyField,
    x0: Tensor | None,
    t_span: tuple[float, float] | None,
    dt: float | None,
    steps: int | None,
    substep: Any,
    start: Tensor | None,
    most: int,
) -> tuple[dict[str, Result], dict[str, str]]:
    path = walk(field, x0, t_span, dt=dt, steps=steps, substep=substep)
    again: dict[str, Any] = {"x0": x0, "t_span": t_span, "dt": dt, "steps": steps, "substep": substep}
    measures: dict[str, Callable[[], Result]] = {}
    if isinstance(field, AdversarialField):
        measures["perturbation"] = lambda: perturbation_of(path, substep)
        measures["second_order"] = lambda: second_order_of(path)
        measures["costate_residual"] = lambda: costate_residual_of(path)
        measures["contraction"] = lambda: contraction(field, most=most, **again)
        measures["hamiltonian"] = lambda: hamiltonian(field, **again)
        if field.eta:
            # A transformed costate has no midpoint from Eq. 9.
            names = [scheme for scheme in SCHEMES if not (field.transforms and scheme == "strang-midpoint")]
            measures["energy"] = lambda: energy_of(path, field, x0, t_span, names, dt, steps, substep, None)
    measures["lipschitz"] = lambda: lipschitz_of(path, most=most)
    measures["growth"] = lambda: growth(field, start=start, **again)
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    for name, measure in measures.items():
        try:
            results[name] = measure()
        except SolveError as error:
            failures[name] = str(error)
    return results, failures


def _draw(results: Mapping[str, Mapping[str, Result]], folder: Path) -> dict[str, str]:
    """One picture a diagnostic, all fields in it; returns their file names."""
    pictures = {}
    for name in dict.fromkeys(name for measured in results.values() for name in measured):
        axes = new_axes()
        for label, measured in results.items():
            if name in measured:
                figure = measured[name].plot(axes, label=label)
        pictures[name] = f"{name}.png"
        with replacing(folder / pictures[name]) as partial:
            figure.savefig(partial, dpi=110)
    return pictures


def _page(diagnosis: Diagnosis, about: str, pictures: Mapping[str, str]) -> str:
    lines = [f"# {diagnosis.title}", ""]
    lines += [about, ""] if about else []
    lines += [
        f"Made by odeadv {__version__}. All numbers are in `diagnostics.json`; norms are 2-norms over the batch.",
        "",
    ]
    for name, picture in pictures.items():
        measured = {label: of[name] for label, of in diagnosis.results.items() if name in of}
        one = next(iter(measured.values()))
        rows = {label: result.summary() for label, result in measured.items()}
        lines += [f"## {one.heading}", "", one.reading, ""]
        lines += ["| | " + " | ".join(label or "value" for label in rows) + " |", "| --- |" + " ---: |" * len(rows)]
        for key in next(iter(rows.values())):
            lines.append(f"| {_cell(key)} | " + " | ".join(_number(row.get(key)) for row in rows.values()) + " |")
        lines += ["", f"![{one.heading}]({picture})", ""]
    failed = [
        f"- {label + ', ' if label else ''}{name}: {why}"
        for label, reasons in diagnosis.failures.items()
        for name, why in reasons.items()
    ]
    lines += ["## Not measured", "", *failed, ""] if failed else []
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
