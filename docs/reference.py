"""Write one page per public object, and the lists of them, while the site is made.

The pages go to ``docs/api/objects``, which is not committed. `PACKAGES` gives the order. An object that ``odeadv``
exports has its page under that name only.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import odeadv

HERE = Path(__file__).parent
OBJECTS = HERE / "api" / "objects"
PACKAGES = (
    "odeadv", "fields", "schemes", "splitting", "costate", "solver", "models", "training", "attacks", "evaluation",
    "audit", "diagnostics", "data", "experiments",
)  # fmt: skip
# A symbol with an index in the text of a docstring: a_{n+1}, x_0, sum_p, |a_n|^2; also the transpose J^T.
SYMBOL = re.compile(
    r"((?:eta )?(?:sum )?\|[a-z]_\w\|\^2(?: / L)?"
    r"|(?<![\w.])(?:sum|max|mean|lambda|dx|[A-Za-z])_(?:\{[^}]*\}|LAD|[A-Za-z0-9])(?!\w)"
    r"|(?<!\w)[A-Z]\^T\b)"
)
FIRST = ("solve", "AdversarialField", "SplitField", "Operator", "Solution", "driven", "compile_solver", "evaluate")


def objects(package: str) -> list[str]:
    """Return the full names of the objects that the page of ``package`` lists, in its order."""
    module = _module(package)
    names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name)) and name != "__version__"]
    if package == "odeadv":
        names = [*FIRST, *(name for name in names if name not in FIRST)]
    else:
        names = [name for name in names if getattr(odeadv, name, None) is not getattr(module, name)]
    prefix = "odeadv" if package == "odeadv" else f"odeadv.{package}"
    return [f"{prefix}.{name}" for name in names]


def shared(package: str) -> list[str]:
    """Return the full names of the objects of ``package`` that ``odeadv`` exports, whose pages are there."""
    module = _module(package)
    own = {name.rpartition(".")[2] for name in objects(package)}
    public = [name for name in module.__all__ if name not in own and not inspect.ismodule(getattr(module, name))]
    return [f"odeadv.{name}" for name in public if name in odeadv.__all__]


def page_of(full: str) -> str:
    """Return the name of the page of an object. ``Energy`` and ``energy`` need two files where case does not count."""
    module, _, name = full.rpartition(".")
    alike = [other for other in dir(_module(module.rpartition(".")[2])) if other.lower() == name.lower()]
    return f"{full}_class" if len(alike) > 1 and inspect.isclass(_get(full)) else full


def write_objects(app: Any) -> None:
    """Write the page of each object. Pages of objects that are gone are removed."""
    OBJECTS.mkdir(exist_ok=True)
    wanted = {}
    for package in PACKAGES:
        for name in objects(package):
            wanted[OBJECTS / f"{page_of(name)}.rst"] = _page(name)
    for path in OBJECTS.glob("*.rst"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def add_lists(app: Any, docname: str, source: list[str]) -> None:
    """Put what a package is for below the title of its page, and the list of objects at the end."""
    folder, _, package = docname.rpartition("/")
    if folder != "api" or package not in PACKAGES:
        return
    name = "odeadv" if package == "odeadv" else f"odeadv.{package}"
    summary = (inspect.getdoc(_module(package)) or "").splitlines()
    about = ["```{eval-rst}", f".. py:module:: {name}", "", *map(restructured, summary), "", "```", ""]
    lines = ["| name | what it is |", "| --- | --- |"]
    lines += [
        f"| [`{full.rpartition('.')[2]}`](objects/{page_of(full)}) | {_first(full)} |" for full in objects(package)
    ]
    if package != "odeadv" and shared(package):
        lines += ["", f"Documented under `odeadv`: {', '.join(f'{{py:obj}}`{full}`' for full in shared(package))}."]
    lines += ["", "```{toctree}", ":hidden:", "", *(f"objects/{page_of(full)}" for full in objects(package)), "```"]
    title, _, text = source[0].partition("\n")
    source[0] = "\n".join([title, "", *about, text, *lines, ""])


def restructured(line: str) -> str:
    """Escape norms, |x|, which Sphinx would read as substitutions; set symbols; make links of names of pages."""
    if line.lstrip().startswith((">>>", ":type ")):
        return line
    parts = re.split(r"(``.*?(?:``|$)|`[^`]*`)", line)  # every other one is code or a link
    for i in range(0, len(parts), 2):
        pieces = SYMBOL.split(parts[i])
        pieces[::2] = [text.replace("|", r"\|") for text in pieces[::2]]
        pieces[1::2] = [rf":math:`{in_tex(text)}`" for text in pieces[1::2]]
        parts[i] = re.sub(r"docs/(\w+(?:/\w+)*)\.md", r":doc:`/\1`", "".join(pieces))
    line = re.sub(r"(?<=\S)(?=:math:`)", r"\\ ", "".join(parts))  # a role needs space around it, which is not shown
    return re.sub(r"(:math:`[^`]*`)(?=[^\s.,;:)\]])", r"\1\\ ", line)


def in_tex(symbol: str) -> str:
    """Return a symbol of a docstring, such as ``sum_{n >= 1}`` or ``x_0``, as TeX."""
    for word, tex in (("!=", r"\ne"), (">=", r"\ge"), ("^T", r"^\top")):
        symbol = symbol.replace(word, tex)
    symbol = re.sub(r"eta\b|sum|max|lambda", r"\\\g<0>", symbol)
    return re.sub("LAD|mean", r"{\\mathrm{\g<0>}}", symbol)


def _module(package: str) -> Any:
    """Return a package by its public name. ``odeadv.schemes`` is an attribute, whose file lies elsewhere."""
    return (
        odeadv
        if package == "odeadv"
        else getattr(odeadv, package, None) or importlib.import_module(f"odeadv.{package}")
    )


def attributes(value: type) -> list[str]:
    """Return the names in the section of attributes of a docstring."""
    section = re.search(r"^Attributes:\n((?: .*\n|\n)+)", f"{inspect.getdoc(value)}\n", re.MULTILINE)
    heads = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return [name for head in heads for name in head.split(", ")]


def _get(full: str) -> object:
    module, _, name = full.rpartition(".")
    return getattr(_module(module.rpartition(".")[2]), name)


def _first(full: str) -> str:
    """Return the first line of a docstring, or the comment on a constant, for a table."""
    value = _get(full)
    described = inspect.getdoc(value) if inspect.isclass(value) or inspect.isroutine(value) else _comment(full)
    return (described or "").partition("\n")[0].replace("``", "`").replace("|", "\\|")


def _comment(full: str) -> str:
    """Return the comment above a constant, whose lines begin with ``#:``."""
    package, _, name = full.rpartition(".")
    for path in sorted(Path(_module(package.rpartition(".")[2]).__file__).parent.glob("*.py")):
        if found := re.search(rf"((?:^#: .*\n)+){name}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            return " ".join(line.removeprefix("#: ") for line in found[1].splitlines())
    return ""


def _page(full: str) -> str:
    """Return the page of one object as reStructuredText."""
    value = _get(full)
    title = full.removeprefix("odeadv.")  # several packages have a Stage
    head = f"{title}\n{'=' * len(title)}\n\n"
    if inspect.isroutine(value):
        return f"{head}.. autofunction:: {full}\n"
    if not inspect.isclass(value):
        text = re.sub(r"[a-z_.]+[.](?=[A-Z])", "", str(value))  # types without their modules
        shown = [f"It is ``{text}``."]
        if isinstance(value, Mapping):
            says = {key: getattr(one, "says", "") or getattr(one, "title", "") for key, one in value.items()}
            shown = [f"- ``{key}``{f': {restructured(text)}' if text else ''}" for key, text in says.items()]
        elif isinstance(value, tuple) and not isinstance(value[0], str):
            shown = [f"{number}. {restructured(one.text)}" for number, one in enumerate(value, 1)]
        module, _, name = full.rpartition(".")  # the index then says "in module"
        body = "\n   ".join([_comment(full), "", *shown])
        return f"{head}.. py:currentmodule:: {module}\n\n.. py:data:: {name}\n\n   {body}\n"
    options = [":members:"]
    fields = [name for name in attributes(value) if not inspect.isroutine(getattr(value, name, None))]
    if fields:  # the docstring of the class describes them
        options.append(f":exclude-members: {', '.join(fields)}")
    if value.__bases__ != (object,):
        options.append(":show-inheritance:")
    if "__call__" in vars(value):
        options.append(":special-members: __call__")
    if issubclass(value, enum.Enum):
        options.append(":undoc-members:")
    return "\n   ".join([f"{head}.. autoclass:: {full}", *options, ""])


def setup(app: Any) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.connect("builder-inited", write_objects)
    app.connect("source-read", add_lists)
