"""One page with all diagnostics of one or several fields."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import field as _field
from pathlib import Path
from typing import Any

from torch import Tensor

from odeadv._version import __version__
from odeadv.diagnostics._contraction import Contraction, contraction_of
from odeadv.diagnostics._costate import CostateResidual, costate_residual_of
from odeadv.diagnostics._energy import Energy, Hamiltonian, energy_of, hamiltonian_of
from odeadv.diagnostics._growth import Growth, Lipschitz, growth_of, lipschitz_of
from odeadv.diagnostics._perturbation import Perturbation, perturbation_of
from odeadv.diagnostics._result import Result
from odeadv.diagnostics._second_order import SecondOrder, second_order_of
from odeadv.diagnostics._trajectory import AnyField, posed, walk
from odeadv.fields import AdversarialField, VectorField
from odeadv.solver import SolveError
from odeadv.support.checks import integer
from odeadv.support.files import write_json, write_text
from odeadv.support.pages import finite, markdown_table, new_figure, save_figure

SCHEMES = ("lie", "strang", "strang-midpoint", "strang-symmetric")

_RESULTS: Mapping[str, type[Result]] = {
    "perturbation": Perturbation,
    "second_order": SecondOrder,
    "costate_residual": CostateResidual,
    "contraction": Contraction,
    "hamiltonian": Hamiltonian,
    "energy": Energy,
    "lipschitz": Lipschitz,
    "growth": Growth,
}


@dataclass(frozen=True)
class Diagnosis:
    """The results of `diagnose`.

    Attributes:
        title: title of the page.
        results: results by the name of the field, then by the name of the diagnostic.
        failures: reasons of failed diagnostics, by the name of the field, then by the name of the diagnostic.
        page: path of the Markdown file.
        about: the paragraph under the title.
    """

    title: str
    results: dict[str, dict[str, Result]]
    failures: dict[str, dict[str, str]] = _field(default_factory=dict)
    page: Path = Path()
    about: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all results as plain data that JSON can hold."""
        return {
            "title": self.title,
            "about": self.about,
            "odeadv": __version__,
            "fields": finite(self.results),
            "failures": self.failures,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | os.PathLike[str]) -> Diagnosis:
        """Return the diagnosis whose `to_dict` is ``data``; its page is in ``folder``.

        Example:
            Draw the pictures of a finished diagnosis again::

                data = json.loads(Path("diagnostics/diagnostics.json").read_text())
                odeadv.diagnostics.Diagnosis.from_dict(data, "diagnostics").write()

        Raises:
            ValueError: if ``data`` is not a diagnosis, or has a diagnostic that this version does not know.
        """
        try:
            results = {
                field: {name: _RESULTS[name](**_with_nan(values)) for name, values in measured.items()}
                for field, measured in data["fields"].items()
            }
            return cls(data["title"], results, data["failures"], Path(folder) / "diagnostics.md", data["about"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"data: got no diagnosis ({error}), expected what Diagnosis.to_dict returns") from error

    def write(self) -> None:
        """Write the page, ``diagnostics.json`` and the pictures into the folder of `page`, each file atomically."""
        pictures = _draw(self.results, self.page.parent)
        write_json(self.page.parent / "diagnostics.json", self.to_dict())
        write_text(self.page, _page(self, pictures))


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

    A field without a loss has only Lipschitz estimates and growth. The energy of a field with eta = 0 is not defined.
    If the solve of a diagnostic fails, the page gives the reason, and the other diagnostics are still computed. Each
    file is written atomically.

    Args:
        field: a field, such as ``net.field(images, labels, eta)``. Or a dict of several fields by name, which share the
            pictures: for example a network with the defence and a network without it, on the same images.
        folder: folder of the files; it is created if it does not exist.
        x0: as for `odeadv.solve`.
        t_span: as for `odeadv.solve`.
        dt: as for `odeadv.solve`.
        steps: as for `odeadv.solve`.
        substep: as for `odeadv.solve`. For a network give ``**net.solve_options``.
        start: a second initial state, such as ``net.stem(attacked_images)``, for all fields or by name. Growth follows
            its difference from the initial state; by default it follows a random direction.
        most: largest number of iterations of each power method. The page reports which of them have not converged.
        title: heading of the page.
        about: a paragraph under the heading, such as the data and the network.

    Returns:
        The results.

    Raises:
        TypeError, ValueError: if an argument does not fit, before a file is written. The message names the argument.
        SolveError: if the solve of a field without its perturbation fails.
    """
    fields: dict[str, AnyField] = dict(field) if isinstance(field, Mapping) else {"": field}
    if not fields or not all(isinstance(name, str) for name in fields):
        raise ValueError(
            "field: got a mapping without entries, or with names that are not text; expected fields by name"
        )
    integer("most", most)
    starts = _read_starts(start, fields)
    results: dict[str, dict[str, Result]] = {}
    failures: dict[str, dict[str, str]] = {}
    for name, one in fields.items():
        whole = posed(one, x0, t_span, dt, steps)
        results[name], failures[name] = _measure(whole, substep, starts.get(name), most)
    failed = {name: why for name, why in failures.items() if why}
    diagnosis = Diagnosis(title, results, failed, Path(folder) / "diagnostics.md", about)
    diagnosis.write()
    return diagnosis


def _read_starts(start: Tensor | Mapping[str, Tensor] | None, fields: Collection[str]) -> Mapping[str, Tensor | None]:
    """Return ``start`` as a mapping with one entry per field.

    Raises:
        ValueError: if ``start`` names an unknown field.
    """
    if not isinstance(start, Mapping):
        return dict.fromkeys(fields, start)
    for name in start:
        if name not in fields:
            raise ValueError(f"start: got one for {name!r}, expected names of the fields: {', '.join(fields)}")
    return start


def _measure(
    field: VectorField, substep: Any, start: Tensor | None, most: int
) -> tuple[dict[str, Result], dict[str, str]]:
    """Return the results of all diagnostics of ``field``, and the reasons of the failed diagnostics."""
    trajectory = walk(field, substep)
    measures: dict[str, Callable[[], Result]] = {}
    failures: dict[str, str] = {}
    if isinstance(field, AdversarialField):
        measures["perturbation"] = lambda: perturbation_of(trajectory, substep)
        measures["second_order"] = lambda: second_order_of(trajectory)
        measures["costate_residual"] = lambda: costate_residual_of(trajectory)
        measures["contraction"] = lambda: contraction_of(field, substep, most=most)
        measures["hamiltonian"] = lambda: hamiltonian_of(walk(field, substep, scheme="strang"))
        if field.eta:
            # Eq. 9 does not hold for a transformed costate, so the scheme with the exact midpoint is left out.
            names = [scheme for scheme in SCHEMES if not (field.transforms and scheme == "strang-midpoint")]
            measures["energy"] = lambda: energy_of(trajectory, names, substep)
        else:
            failures["energy"] = "it is relative to eta, which is 0 here"
    measures["lipschitz"] = lambda: lipschitz_of(trajectory, most=most)
    measures["growth"] = lambda: growth_of(field, substep, start=start)
    results: dict[str, Result] = {}
    for name, measure in measures.items():
        try:
            results[name] = measure()
        except SolveError as error:
            failures[name] = str(error)
    return results, failures


def _draw(results: Mapping[str, Mapping[str, Result]], folder: Path) -> dict[str, str]:
    """Draw one picture per diagnostic, with all fields in each picture, and return the names of the files."""
    pictures = {}
    for name in dict.fromkeys(name for measured in results.values() for name in measured):
        figure = new_figure(6.0, 3.6)
        axes = figure.subplots()
        for label, measured in results.items():
            if name in measured:
                measured[name].plot(axes, label=label)
        pictures[name] = f"{name}.png"
        save_figure(folder / pictures[name], figure, dpi=110)
    return pictures


def _with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with NaN in the places where JSON holds null."""

    def restored(value: Any) -> Any:
        return math.nan if value is None else [restored(item) for item in value] if isinstance(value, list) else value

    return {name: restored(value) for name, value in values.items()}


def _page(diagnosis: Diagnosis, pictures: Mapping[str, str]) -> str:
    lines = [f"# {diagnosis.title}", ""]
    lines += [diagnosis.about, ""] if diagnosis.about else []
    lines += [
        f"Made by odeadv {__version__}. All numbers are in `diagnostics.json`; norms are 2-norms over the batch.",
        "",
    ]
    for name, picture in pictures.items():
        measured = {label: of[name] for label, of in diagnosis.results.items() if name in of}
        one = next(iter(measured.values()))
        rows = {label: result.summary() for label, result in measured.items()}
        lines += [f"## {one.heading}", "", one.reading, ""]
        cells = [[key, *(_number(row.get(key)) for row in rows.values())] for key in next(iter(rows.values()))]
        lines += markdown_table(["quantity", *(label or "value" for label in rows)], cells, numbers=len(rows))
        lines += ["", f"![{one.heading}]({picture})", ""]
    failed = [
        f"- {label + ', ' if label else ''}{name}: {why}"
        for label, reasons in diagnosis.failures.items()
        for name, why in reasons.items()
    ]
    lines += ["## Not measured", "", *failed, ""] if failed else []
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
