"""The tables as data: their rows, their columns and the numbers that the paper prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from odeadv.evaluation import AttackSpec, Protocol
from odeadv.evaluation.protocols import AUTOATTACK
from odeadv.experiments._config import parse_method


@dataclass(frozen=True)
class Column:
    """A column of a table: one attack of the table's protocol.

    Attributes:
        key: name of the column in ``paper_tables.json``.
        attack: ``"fgsm"`` or ``"ifgsm"``.
        eps_255: radius in units of 1/255.
        steps: number of attack steps.
    """

    key: str
    attack: str
    eps_255: float
    steps: int

    @property
    def label(self) -> str:
        """The name of the column on the pages."""
        return f"{self.attack.upper()}{f'-{self.steps}' if self.steps > 1 else ''} {self.eps_255:g}"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        method: name of the method; see `odeadv.experiments.parse_method`.
        factor: factor that multiplies the preset's eta.
        paper_key: name of the row in ``paper_tables.json``; if empty, the method.
        weight_decay: weight decay of the row; None for the preset's.
    """

    method: str
    factor: float = 1.0
    paper_key: str = ""
    weight_decay: float | None = None

    @property
    def name(self) -> str:
        """The row's name on the command line: the method, then the factor and the weight decay if they are set."""
        factor = "" if self.factor == 1.0 else f"@{self.factor:g}"
        return f"{self.method}{factor}{'' if self.weight_decay is None else f':wd{self.weight_decay:g}'}"

    @property
    def label(self) -> str:
        """The name of the row on the pages."""
        objective, *parts = self.method.split("+")
        words = {
            "pgd": "PGD",
            "trades": "TRADES",
            "lad": "LAD",
            "lad-sm": "LAD-SM",
            "lad-midpoint": "LAD exact midpoint",
        }
        words |= {"lad-symmetric": "LAD symmetric", "damp": "In-ResNet", "lambda-damp": "lambda-In-ResNet"}
        words |= {"matched": "as many passes as LAD", "penalty": "explicit penalty"}
        text = " + ".join(words.get(part, part) for part in (objective, *parts))
        text += "" if self.factor == 1.0 else f", eta x {self.factor:g}"
        return text if self.weight_decay is None else f"{text}, weight decay {self.weight_decay:g}"


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an ablation of such a table: its runs and their evaluation.

    Attributes:
        name: name such as ``"table1"``, also the key of the paper's numbers.
        title: heading of the page.
        protocol: name of the protocol for `odeadv.evaluate`.
        columns: the attacks that the table shows.
        rows: the methods that the table compares.
        datasets: the data sets for which the paper prints the table.
        average: True if the mean of the columns is a further column.
        autoattack_255: radius of AutoAttack in units of 1/255, if AutoAttack is requested. One column has this radius.
        like: name of the paper's table whose differences this table tests; if empty, the table of the same name.
        primary: pairs of row names whose differences decide (docs/results/rules.md). If empty, all compared pairs for
            which the paper prints a difference.
    """

    name: str
    title: str
    protocol: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    datasets: tuple[str, ...] = ("cifar10", "cifar100")
    average: bool = True
    autoattack_255: float = 8.0
    like: str = ""
    primary: tuple[tuple[str, str], ...] = ()

    def primary_pairs(self, dataset: str) -> list[tuple[str, str]]:
        """Return the pairs of row names whose differences decide on ``dataset``."""
        if self.primary:
            return list(self.primary)
        pairs = [(row, other) for row in self.rows for other in self.compared(row)]
        claimed = [(a, b) for a, b in pairs if self.paper_difference(a, b, dataset) is not None]
        return [(row.name, other.name) for row, other in claimed]

    def paper_difference(self, row: Row, other: Row, dataset: str) -> float | None:
        """Return the paper's value of ``row`` minus ``other`` in the mean accuracy under attack, in percentage points.

        The result is None if the paper does not print both rows for ``dataset``.
        """
        figures = paper_tables().get(self.like or self.name, {}).get(dataset, {})
        found = [figures.get(r.method if self.like else r.paper_key or r.method) for r in (row, other)]
        if None in found:
            return None
        means = []
        for values in found:
            robust = [value for key, value in values.items() if key not in ("acc", "avg")]
            means.append(sum(robust) / len(robust))
        return float(means[0] - means[1])

    @property
    def autoattack(self) -> Protocol:
        """The protocol that runs AutoAttack at the table's radius."""
        return Protocol(f"autoattack-{self.autoattack_255:g}", (AttackSpec(AUTOATTACK, self.autoattack_255 / 255),))

    def row(self, name: str) -> Row:
        """Return the row called ``name``.

        Raises:
            ValueError: if the row is unknown. The message lists the rows.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"methods: {name!r} is not a row of {self.name}; it has {', '.join(self.methods)}")

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the rows."""
        return tuple(row.name for row in self.rows)

    def baseline(self, row: Row) -> Row | None:
        """Return the undefended row with the objective and weight decay of ``row``; None if the table lacks it."""
        plain = Row(row.method.split("+")[0], weight_decay=row.weight_decay).name
        return None if row.name == plain else self.row(plain) if plain in self.methods else None

    def compared(self, row: Row) -> list[Row]:
        """Return the rows to compare with ``row``: its `baseline` and the rows that differ from it in one part.

        Rows with one part fewer (noise, an ablation, the defence) are always compared. If ``row`` has another form of
        LAD, the row with plain LAD is too. If ``row`` is a form of LAD, the undefended row with as many passes is too.
        """
        base, parts = self.baseline(row), row.method.split("+")
        less = ["+".join(parts[:k] + parts[k + 1 :]) for k in range(1, len(parts))]
        plain = "+".join("lad" if part.startswith("lad-") else part for part in parts)
        matched = [f"{parts[0]}+matched"] if len(parts) == 2 and parse_method(row.method).scheme is not None else []
        methods = (*less, plain, *matched)
        like = (row.factor, row.weight_decay)
        others = [r for method in methods for r in self.rows if (r.method, r.factor, r.weight_decay) == (method, *like)]
        return [r for r in dict.fromkeys([base, *others]) if r is not None and r != row]

    def paper(self, dataset: str) -> Mapping[str, Mapping[str, float]]:
        """Return the paper's numbers for ``dataset``: by row name, then by ``"acc"``, the column keys and ``"avg"``."""
        figures = paper_tables().get(self.name, {}).get(dataset, {})
        keys = ["acc", *(column.key for column in self.columns), *(["avg"] if self.average else [])]
        return {
            row.name: {
                key: figures[row.paper_key or row.method][key]
                for key in keys
                if key in figures[row.paper_key or row.method]
            }
            for row in self.rows
            if (row.paper_key or row.method) in figures
        }


@cache
def paper_tables() -> dict[str, Any]:
    """Read the paper's numbers, by table, data set, row and column."""
    text = files("odeadv.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    # The paper prints Table 5 by column and the other tables by row, so Table 5 is transposed here.
    fifth = tables["table5"]
    rows: dict[str, dict[str, float]] = {}
    for column, by_method in fifth["cifar100"].items():
        for method, values in by_method.items():
            for eta, value in zip(fifth["eta"], values, strict=True):
                if value is not None:
                    rows.setdefault(f"pgd+{method}:{eta}" if eta else "pgd", {})[column] = value
    tables["table5"] = {"cifar100": rows}
    return tables


def _rows(*methods: str) -> tuple[Row, ...]:
    return tuple(Row(method) for method in methods)


_SMALL = (
    Column("fgsm_0.5", "fgsm", 0.5, 1),
    Column("fgsm_1", "fgsm", 1, 1),
    Column("ifgsm_0.5", "ifgsm", 0.5, 20),
    Column("ifgsm_1", "ifgsm", 1, 20),
)
LARGE = (
    Column("fgsm_8", "fgsm", 8, 1),
    Column("fgsm_12", "fgsm", 12, 1),
    Column("ifgsm_8", "ifgsm", 8, 20),
    Column("ifgsm_12", "ifgsm", 12, 20),
)
_HALF = (
    Column("fgsm_4", "fgsm", 4, 1),
    Column("fgsm_6", "fgsm", 6, 1),
    Column("ifgsm_4", "ifgsm", 4, 20),
    Column("ifgsm_6", "ifgsm", 6, 20),
)
_STRONG = tuple(Column(f"ifgsm{steps}_8", "ifgsm", 8, steps) for steps in (20, 100, 1000))
_STRONG_HALF = tuple(Column(f"ifgsm{steps}_4", "ifgsm", 4, steps) for steps in (20, 100, 1000))
_ETAS = (1, 10, 100, 1000, 10000)
_DECAYS = (5e-3, 1e-2, 3e-2, 5e-2)  # tables also have the weight decay of the preset, and 2e-2, the best of the pilot
_FACTORS = (0.001, 0.01, 0.1, 1.0, 10.0, 30.0)
_NATURAL_FACTORS = (0.03, 0.1, 0.3, 1.0)


def _natural_contrasts(decay: str, factor: float) -> tuple[tuple[str, str], ...]:
    """Return the contrasts of LAD in natural training, for rows with one suffix of weight decay and one factor."""
    pairs = (
        ("lad", ""), ("lad-sm", ""), ("lad-sm", f"+lad@{factor:g}"), ("lad-sm", f"+lad-sm+random@{factor:g}"),
        ("lad", "+matched"),
    )  # fmt: skip
    return tuple((f"natural+{row}@{factor:g}{decay}", f"natural{other}{decay}") for row, other in pairs)


#: The tables of the paper and their ablations, by name: one `Table` each.
TABLES = {
    table.name: table
    for table in (
        Table(
            "table1", "Table 1: natural training", "table1", _SMALL,
            _rows("natural", "natural+damp", "natural+lambda-damp", "natural+lad", "natural+lad-sm"),
            autoattack_255=1.0,
        ),
        Table(
            "table2", "Table 2: PGD training", "table2", LARGE,
            _rows("pgd", "pgd+damp", "pgd+lambda-damp", "pgd+lad", "pgd+lad-sm", "pgd+lad-midpoint"),
        ),
        Table(
            "table3", "Table 3: TRADES", "table2", LARGE,
            _rows("trades", "trades+lad", "trades+lad-sm"),
        ),
        Table(
            "table4", "Table 4: stochasticity", "table2", LARGE,
            _rows("pgd", "pgd+noise", "pgd+lad", "pgd+lad-sm", "pgd+lad+noise", "pgd+lad-sm+noise"),
            datasets=("cifar10",),
        ),
        Table(
            "table5", "Table 5: effect of eta", "table2", (LARGE[0], LARGE[2]),
            (
                Row("pgd"),
                *(Row(f"pgd+{m}", eta / 1000, f"pgd+{m}:{eta}") for m in ("lad", "lad-sm") for eta in _ETAS),
            ),
            datasets=("cifar100",), average=False,
        ),
        Table(
            "table6", "Table 6: stronger attacks", "table6", _STRONG,
            _rows("pgd", "pgd+lad", "pgd+lad-sm", "trades", "trades+lad", "trades+lad-sm"),
            average=False,
        ),
        Table(
            "table7", "Table 7: stochasticity on CIFAR-100", "table2", LARGE,
            _rows("pgd", "pgd+noise", "pgd+lad", "pgd+lad-sm", "pgd+lad+noise", "pgd+lad-sm+noise"),
            datasets=("cifar100",),
        ),
        Table(
            "ablations", "Ablations: what drives the state", "table1", _SMALL,
            _rows(
                "natural", "natural+matched", "natural+lad", "natural+lad+random", "natural+lad+shuffled",
                "natural+lad+input",
                "natural+lad-sm", "natural+lad-sm+random", "natural+lad-sm+shuffled", "natural+lad-symmetric",
                "natural+lad+sweeps2",
            ),
            autoattack_255=1.0, like="table1",
            primary=(
                ("natural+lad", "natural"), ("natural+lad-sm", "natural"), ("natural+lad-sm", "natural+lad"),
                ("natural+lad-sm", "natural+lad-sm+random"), ("natural+lad", "natural+matched"),
            ),
        ),
        Table(
            "ablations-pgd", "Ablations of PGD training", "table2", LARGE,
            _rows("pgd", "pgd+matched", "pgd+lad", "pgd+lad+random", "pgd+lad+shuffled", "pgd+lad+input"),
        ),
        Table(
            "ablations-trades", "Ablations of TRADES: the mix of losses alone", "table2", LARGE,
            _rows("trades", "trades+matched", "trades+lad", "trades+lad+eta0"),
        ),
        Table(
            "mechanism", "What LAD does to PGD training, and what else does it", "eps4", _HALF,
            (
                *_rows(
                    "pgd", "pgd+matched", "pgd+lad", "pgd+lad-sm", "pgd+lad-symmetric", "pgd+lad-sm+random",
                    "pgd+lad+input", "pgd+lad+eta0", "pgd+penalty",
                ),
                *(Row(method, 0.4) for method in ("pgd+lad", "pgd+lad-sm", "pgd+penalty")),
                *(
                    Row(method, weight_decay=2e-2)
                    for method in (
                        "pgd", "pgd+lad", "pgd+lad-sm", "pgd+lad-sm+random", "pgd+lad+input", "pgd+penalty",
                    )
                ),
                *(Row(method, 0.4, weight_decay=2e-2) for method in ("pgd+lad", "pgd+lad-sm")),
                Row("pgd+lad+input", 6.0, weight_decay=2e-2),  # s is about the s of LAD, which perturbs six times
                *(Row(method, weight_decay=decay) for decay in _DECAYS for method in ("pgd", "pgd+lad-sm")),
                Row("pgd+lad", weight_decay=5e-2),  # the best weight decay for plain PGD on validation images
            ),
            datasets=("cifar10",), autoattack_255=4.0, like="table2",
            primary=(
                ("pgd+lad:wd0.02", "pgd:wd0.02"), ("pgd+lad-sm:wd0.02", "pgd:wd0.02"),
                ("pgd+lad-sm:wd0.02", "pgd+lad:wd0.02"), ("pgd+lad-sm:wd0.02", "pgd+lad-sm+random:wd0.02"),
                ("pgd+lad:wd0.02", "pgd+lad+input@6:wd0.02"),
                ("pgd+lad:wd0.05", "pgd:wd0.05"), ("pgd+lad-sm:wd0.05", "pgd:wd0.05"),
            ),
        ),
        Table(
            "mechanism-conv", "What LAD does to PGD training of a ConvNet", "eps4", _HALF,
            (
                Row("pgd"),
                *(
                    Row(method, 0.1 if "lad" in method else 1.0, weight_decay=decay)
                    for decay, methods in (
                        (3e-2, ("pgd", "pgd+lad", "pgd+lad-sm")),
                        (2e-2, ("pgd", "pgd+lad", "pgd+lad-sm", "pgd+lad-sm+random")),
                    )
                    for method in methods
                ),
                Row("pgd+lad+input", 0.3, weight_decay=2e-2),  # three times LAD's eta: LAD perturbs three times
                Row("pgd+lad+input", 1.5, weight_decay=2e-2),  # s is about the s of LAD
            ),
            datasets=("cifar10",), autoattack_255=4.0, like="table2",
            primary=(
                ("pgd+lad@0.1:wd0.03", "pgd:wd0.03"), ("pgd+lad-sm@0.1:wd0.03", "pgd:wd0.03"),
                ("pgd+lad@0.1:wd0.02", "pgd:wd0.02"), ("pgd+lad-sm@0.1:wd0.02", "pgd:wd0.02"),
                ("pgd+lad-sm@0.1:wd0.02", "pgd+lad@0.1:wd0.02"),
                ("pgd+lad-sm@0.1:wd0.02", "pgd+lad-sm+random@0.1:wd0.02"),
                ("pgd+lad@0.1:wd0.02", "pgd+lad+input@1.5:wd0.02"),
            ),
        ),
        Table(
            "mechanism-noise", "What noise adds to LAD in PGD training of a ConvNet", "eps4", _HALF,
            (
                Row("pgd"),
                *(
                    Row(method, 0.1 if "lad" in method else 1.0, weight_decay=2e-2)
                    for method in ("pgd", "pgd+noise", "pgd+lad-sm", "pgd+lad-sm+noise")
                ),
            ),
            datasets=("cifar10",), autoattack_255=4.0, like="table4",
            primary=(
                ("pgd+lad-sm+noise@0.1:wd0.02", "pgd+noise:wd0.02"),
                ("pgd+lad-sm+noise@0.1:wd0.02", "pgd+lad-sm@0.1:wd0.02"),
            ),
        ),
        Table(
            "mechanism-steps", "PGD training with LAD under attacks of more steps", "eps4-steps", _STRONG_HALF,
            (Row("pgd"), *(Row(method, weight_decay=2e-2) for method in ("pgd", "pgd+lad", "pgd+lad-sm"))),
            datasets=("cifar10",), average=False, autoattack_255=4.0, like="table6",
            primary=(("pgd+lad:wd0.02", "pgd:wd0.02"), ("pgd+lad-sm:wd0.02", "pgd:wd0.02")),
        ),
        Table(
            "mechanism-eta", "What the strength of LAD does to PGD training", "eps4", _HALF,
            (
                Row("pgd"),
                *(Row(f"pgd+{m}", factor) for m in ("lad", "lad-sm") for factor in _FACTORS),
            ),
            datasets=("cifar10",), autoattack_255=4.0,
            primary=tuple(
                (Row(f"pgd+{m}", factor).name, "pgd")
                for m in ("lad", "lad-sm") for factor in _FACTORS
            ),
        ),
        Table(
            "mechanism-trades", "What LAD does to TRADES beyond the mix of losses", "eps4", _HALF,
            tuple(
                Row(method, 0.4 if lad else 1.0, weight_decay=decay)
                for decay in (2e-2, None)
                for method, lad in (
                    ("trades", False), ("trades+lad+eta0", False), ("trades+lad", True), ("trades+lad-sm", True)
                )
            ),
            datasets=("cifar10",), autoattack_255=4.0,
            primary=tuple(
                (f"{method}@0.4{decay}", f"trades+lad+eta0{decay}")
                for decay in (":wd0.02", "") for method in ("trades+lad", "trades+lad-sm")
            ),
        ),
        Table(
            "mechanism-natural", "What LAD does to natural training", "table1", _SMALL,
            tuple(
                Row(f"natural{part}", factor if "lad" in part else 1.0, weight_decay=decay)
                for decay, factor in ((2e-2, 0.4), (None, 0.1))
                for part in ("", "+matched", "+lad", "+lad-sm", "+lad-sm+random")
            ),
            datasets=("cifar10",), autoattack_255=1.0, like="table1",
            primary=(*_natural_contrasts(":wd0.02", 0.4), *_natural_contrasts("", 0.1)),
        ),
        Table(
            "mechanism-natural-conv", "What LAD does to natural training of a ConvNet", "table1", _SMALL,
            (
                *(
                    Row(f"natural{part}", factor if "lad" in part else 1.0, weight_decay=decay)
                    for decay, factor in ((2e-2, 0.1), (None, 0.03))
                    for part in ("", "+matched", "+lad", "+lad-sm", "+lad-sm+random")
                ),
                Row("natural+lad+input", 1.5, weight_decay=2e-2),  # s is a little below the s of LAD
                Row("natural+lad+input", 4.0, weight_decay=2e-2),  # the largest s of the pilots
            ),
            datasets=("cifar10",), autoattack_255=1.0, like="table1",
            primary=(
                *_natural_contrasts(":wd0.02", 0.1), *_natural_contrasts("", 0.03),
                ("natural+lad@0.1:wd0.02", "natural+lad+input@1.5:wd0.02"),
                ("natural+lad@0.1:wd0.02", "natural+lad+input@4:wd0.02"),
            ),
        ),
        Table(
            "mechanism-natural-eta", "What the strength of LAD does to natural training of a ConvNet", "table1", _SMALL,
            (Row("natural"), *(Row(f"natural+{m}", f) for m in ("lad", "lad-sm") for f in _NATURAL_FACTORS)),
            datasets=("cifar10",), autoattack_255=1.0,
            primary=tuple(
                (Row(f"natural+{m}", f).name, "natural") for m in ("lad", "lad-sm") for f in _NATURAL_FACTORS
            ),
        ),
    )
}  # fmt: skip
