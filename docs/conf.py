"""Settings of Sphinx: `sphinx-build -W docs OUT` makes the pages and the reference of all public names."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.domains.python import PyObject

import odeadv
from odeadv.cli import main

sys.path.insert(0, str(Path(__file__).parent))  # docstrings.py, programs.py, reference.py
from reference import restructured

project = "odeadv"
author = "The odeadv contributors"
copyright = author
release = version = odeadv.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax",
    "sphinx_copybutton", "sphinx-mathjax-offline", "docstrings", "programs", "reference",
]  # fmt: skip
exclude_patterns = ["_build", "_pictures"]
html_theme = "furo"
smartquotes = False  # primes and the quotes of types are not quotation marks
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"odeadv {release}"

copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"  # not what programs print
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as page.md#heading
suppress_warnings = ["myst.header"]  # pages of results begin with a level that suits the table

default_role = "py:obj"  # `solve` in a docstring is a link where there is such a name
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are described once


class Schemes(Directive):
    """Show a table of all schemes, made from the schemes themselves."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        any_number = odeadv.schemes.names(operators=3)
        lines = [
            "| name | order | operators | compositions | stages | clocks (in steps) | source |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in odeadv.schemes.names():
            scheme = odeadv.schemes.get(name)
            operators = "any" if name in any_number else 2
            stages = sum(len(stages) for _, stages in scheme.compositions)
            clocks = "{:.3g} to {:.3g}".format(*scheme.reach)
            row = (f"`{name}`", scheme.order, operators, len(scheme.compositions), stages, clocks, scheme.source)
            lines.append(f"| {' | '.join(map(str, row))} |")
        content = nodes.Element()
        self.state.nested_parse(StringList(lines, source="schemes"), self.content_offset, content)
        return content.children


class Help(Directive):
    """Show what ``odeadv COMMAND --help`` prints."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the text as it is printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*self.arguments, "--help"])
        return [nodes.literal_block(out.getvalue(), out.getvalue(), language="text")]


def plain(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write the lines of a docstring as reStructuredText, except formulas in TeX."""
    lines[:] = [part for line in lines for part in line.split("\n")]  # napoleon joins the lines of an error's text
    inside = False
    for i, line in enumerate(lines):
        inside = line.startswith(".. math::") or (inside and line[:1] in ("", " "))
        lines[i] = line if inside else restructured(line)


def join(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Mend what napoleon takes apart: "The images: (n, 3, h, w)", read as a type and a text, and "rtol, atol"."""
    for kind, place in ((":type: ", ""), (":rtype: ", ":returns: ")):
        for line in [line for line in lines if line.startswith(kind)]:
            lines.remove(line)
            for i in [i for i, other in enumerate(lines) if other.startswith(place)][:1]:
                lines[i] = f"{place}{line.removeprefix(kind)}: {lines[i].removeprefix(place)}"
    types = getattr(obj, "__annotations__", {})
    for i, line in reversed([*enumerate(lines)]):
        if names := re.match(r":ivar (\w+(?:, \w+)+): ", line):
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith(" ")), len(lines))
            text, lines[i:end] = [line[names.end() :], *lines[i + 1 : end]], []
            for one in reversed(names[1].split(", ")):
                lines[i:i] = [f":ivar {one}: {text[0]}", *text[1:], f":vartype {one}: {types.get(one, '')}"]


def shorten(app: object, doctree: nodes.document) -> None:
    """Show types in lists of parameters without their modules."""
    for node in doctree.findall(addnodes.literal_emphasis):
        short = re.sub(r"~?(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", node.astext())
        node.children = [nodes.Text(short)]


def mark_cells(app: object, doctree: nodes.document) -> None:
    """Give classes to parts of tables for site.css: numbers stay on one line, long texts get a wide column."""
    for group in doctree.findall(nodes.tgroup):
        for cell in group.findall(nodes.entry):
            text = cell.astext()
            if group["cols"] > 1 and len(text) > 11:
                cell["classes"].append("wide" if len(text) > 60 else "middling")
            paragraph = cell.children[0] if len(cell.children) == 1 else None
            if isinstance(paragraph, nodes.paragraph) and re.match(r"[-+±≤≥<]? ?\d", text) and len(text) < 32:
                words = [*paragraph.children]
                if len(words) == 1 and isinstance(words[0], nodes.Text):  # "1.2 ± 0.1" and "1.2 [1.1, 1.3]"
                    parts = re.split(r" (?=[(\[])", text, maxsplit=1)
                    inlines = [nodes.inline(part, part, classes=["number"]) for part in parts]
                    paragraph.children = []
                    paragraph += [inlines[0], *(node for part in inlines[1:] for node in (nodes.Text(" "), part))]


def signature(app: object, what: str, name: str, obj: Any, options: object, shown: str, returned: str) -> Any:
    """Show 8/255 as a fraction and what a default factory makes; show no signature that says nothing."""
    if not shown:
        return None
    if shown == "(*args, **kwargs)":
        return "", returned
    for field in dataclasses.fields(obj) if what == "class" and dataclasses.is_dataclass(obj) else ():
        if field.init and field.default_factory is not dataclasses.MISSING:
            made = re.sub(r"<[\w.]*?(\w+) object at 0x\w+>", r"\1()", repr(default := field.default_factory()))
            if dataclasses.is_dataclass(default):  # its own page has its defaults
                made = f"{type(default).__name__}({'' if default == type(default)() else '...'})"
            shown = shown.replace("<factory>", made, 1)
    shown = re.sub(r"\d\.\d{12,}", lambda number: str(Fraction(number[0]).limit_denominator(1000)), shown)
    shown = shown.replace("PosixPath(", "Path(")
    return shown, returned


def skip(app: object, what: str, name: str, obj: Any, skipped: bool, options: object) -> bool | None:
    """Leave out fields of named tuples, which have no text of their own."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def elsewhere(app: Any, env: Any, reference: Any, content: nodes.Element) -> nodes.Element | None:
    """Resolve names that ``odeadv`` exports, which docstrings write without a prefix."""
    if reference.get("refdomain") != "py":
        return None
    target = f"odeadv.{reference['reftarget']}"
    found: nodes.Element | None = env.domains["py"].resolve_xref(
        env, reference["refdoc"], app.builder, "obj", target, reference, content
    )
    return found


def link_back(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    """Mend links from source code to the reference: viewcode takes the package of one name for all names of a file."""
    if pagename.startswith("_modules/"):
        wrong = r"(/objects/([\w.]+)\.(\w+?)(?:_class)?\.html)#(?!\2\.\3\b)odeadv\.(?:\w+\.)*?\3\b"
        context["body"] = re.sub(wrong, r"\1#\2.\3", context["body"])


def soften(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    """Let names such as ``experiments.first_process`` break after the module, and link pictures to their full size."""
    if pagename.startswith("api/objects/"):
        context["body"] = re.sub(r"(<h1>\w+\.)", r"\1<wbr/>", context["body"], count=1)
    picture = r'<p><img ([^>]*?src="([^"]+\.png)"[^>]*)></p>'
    context["body"] = re.sub(picture, r'<p><a class="picture" href="\2"><img \1></a></p>', context.get("body", ""))
    for neighbour in filter(None, (context.get("prev"), context.get("next"))):
        neighbour["title"] = re.sub(r"^(\w+\.)(?=\w+$)", r"\1<wbr/>", neighbour["title"])


def setup(app: Any) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.add_directive("odeadv-schemes", Schemes)
    app.add_directive("odeadv-help", Help)
    app.connect("missing-reference", elsewhere)
    app.connect("html-page-context", link_back)
    app.connect("html-page-context", soften)
    app.connect("autodoc-process-docstring", join)
    app.connect("autodoc-process-docstring", plain)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", shorten)
    app.connect("doctree-read", mark_cells)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
