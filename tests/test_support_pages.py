"""Pages of results: tables that stay tables, figures without pyplot, JSON without NaN."""

import json
import math
import sys
from dataclasses import dataclass

from odeadv.support.files import write_json
from odeadv.support.pages import finite, markdown_table, new_figure, save_figure


def test_bars_and_line_breaks_do_not_break_a_table():
    lines = markdown_table(["", "|x|"], [["a\nb", "1"]], numbers=1)
    assert lines == ["|  | \\|x\\| |", "| --- | ---: |", "| a b | 1 |"]


def test_json_has_no_nan(tmp_path):
    @dataclass
    class Point:
        x: float
        ys: tuple

    class Own:
        def to_dict(self):
            return {"value": math.inf}

    data = finite({"p": Point(math.nan, (1.0, -math.inf, 3)), 2: [Own()], "text": "nan"})
    write_json(tmp_path / "data.json", data)
    assert json.loads((tmp_path / "data.json").read_text()) == {
        "p": {"x": None, "ys": [1.0, None, 3]},
        "2": [{"value": None}],
        "text": "nan",
    }


def test_equal_figures_are_equal_files_and_pyplot_knows_none(tmp_path):
    for name in ("a.png", "b.png", "c.pdf"):
        figure = new_figure(2.0, 1.0)
        figure.add_subplot().plot([0.0, 1.0])
        save_figure(tmp_path / name, figure, dpi=50)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
