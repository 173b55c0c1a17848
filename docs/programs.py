"""Run the programs of tutorials and of the guide while the site is made, and show what they print and draw.

Every ``python`` block of a tutorial runs in order, in one namespace per page and in a temporary folder. Printed text,
the value of a last expression, and matplotlib figures follow their block. On a page of the guide only the first block
runs, which the others may need, and the blocks that print. An error stops the build. What a page printed and drew is
kept in ``docs/_pictures`` until its text changes; remove that folder to run all pages again.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

pyplot.rcParams.update({"figure.figsize": (5.5, 3.4), "axes.formatter.min_exponent": 2})
HERE = Path(__file__).parent
# The pages whose programs print; docs/training.md trains, which takes too long.
GUIDE = ("evaluation", "faq", "index", "models", "solver")
PICTURES = HERE / "_pictures"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def run_pages(app: Any) -> None:
    """Run all tutorials and the guide, so that their pictures are there before any page is read."""
    for path in sorted([*(HERE / "tutorials").glob("*.md"), *(HERE / f"{name}.md" for name in GUIDE)]):
        outputs(path.stem, path.read_text(encoding="utf-8"))


def add_outputs(app: Any, docname: str, source: list[str]) -> None:
    """Put what the blocks of a page print and draw after each of them."""
    if docname == "gallery":
        source[0] += gallery()
    folder, _, name = docname.rpartition("/")
    if folder != "tutorials" and docname not in GUIDE:
        return
    found = iter(outputs(name, source[0]))
    source[0] = BLOCK.sub(lambda block: block.group(0) + next(found), source[0])


def gallery() -> str:
    """Return the pictures of all tutorials, each with a link to its page."""
    lines = []
    order = re.findall(r"^tutorials/(\w+)$", (HERE / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    for path in (HERE / "tutorials" / f"{name}.md" for name in order):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        pictures = sorted(PICTURES.glob(f"{path.stem}-*.png"))
        if pictures:
            lines += ["", f"## [{title}](tutorials/{path.name})", ""]
            lines += [f"[![{title}](_pictures/{picture.name})](tutorials/{path.name})" for picture in pictures]
    return "\n".join(lines) + "\n"


def outputs(name: str, text: str) -> list[str]:
    """Return the Markdown that follows each block of the page ``name``."""
    digest, kept = hashlib.sha256(text.encode()).hexdigest(), PICTURES / f"{name}.json"
    if kept.exists() and (read := json.loads(kept.read_text(encoding="utf-8")))["page"] == digest:
        return list(read["outputs"])
    PICTURES.mkdir(exist_ok=True)
    module = types.ModuleType("tutorial")  # dataclasses look their module up
    sys.modules["tutorial"] = module
    names = module.__dict__
    drawn: list[Path] = []
    found = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in GUIDE:
            torch.manual_seed(0)
        for number, block in enumerate(BLOCK.finditer(text)):
            if name in GUIDE and not runs(number, block.group(1)):
                found.append("")
                continue
            line = text[: block.start()].count("\n") + 2
            try:
                printed, figures = run(block.group(1), names, f"{name}.md", line, values=name not in GUIDE)
            except Exception as error:
                error.add_note(f"{name}.md, block {number + 1}, line {line}")
                raise
            shown = f"\n```text\n{printed.rstrip()}\n```\n" if printed.strip() else ""
            for figure in figures:
                drawn.append(PICTURES / f"{name}-{len(drawn) + 1}.png")
                figure.savefig(drawn[-1], dpi=160, bbox_inches="tight", metadata={"Software": None})
                shown += f"\n![{described(figure)}](../_pictures/{drawn[-1].name})\n"
            found.append(shown)
    kept.write_text(json.dumps({"page": digest, "outputs": found}), encoding="utf-8")
    return found


def runs(number: int, program: str) -> bool:
    """Return True if a block of the guide runs. A tutorial shows what a whole audit prints, which takes long."""
    return number == 0 or ("print(" in program and "report.write(" not in program)


def run(program: str, names: dict[str, Any], file: str, line: int, *, values: bool = True) -> tuple[str, list[Figure]]:
    """Run one block as a notebook would; return what it prints and the figures it draws.

    With ``values`` the value of a last expression is printed too.
    """
    tree = ast.parse("\n" * (line - 1) + program, file)
    last = tree.body.pop() if values and tree.body and isinstance(tree.body[-1], ast.Expr) else None
    figures = []
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, file, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), file, "eval"), names)
            if isinstance(value, Figure):
                figures.append(value)
            elif value is not None and not type(value).__module__.startswith("matplotlib"):
                print(repr(value))
    figures += [pyplot.figure(number) for number in pyplot.get_fignums() if pyplot.figure(number) not in figures]
    pyplot.close("all")
    return output.getvalue(), figures


def described(figure: Figure) -> str:
    """Return the titles and labels of a figure, for readers who do not see it."""
    panels = [(axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) for axes in figure.axes]
    words = [" against ".join(filter(None, labels)) or title for title, *labels in panels]
    kind = "Wide picture" if figure.get_figwidth() > 7 else "Picture"  # site.css shows the wide ones in full width
    return f"{kind}: {'; '.join(filter(None, words))}".replace("[", "(").replace("]", ")")


def setup(app: Any) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.connect("builder-inited", run_pages)
    app.connect("source-read", add_outputs)
