"""The reference has every public name once, and every page is reached. CI builds the pages."""

import doctest
import enum
import importlib
import inspect
import operator
import pkgutil
import re
import runpy
import typing
import warnings
from pathlib import Path

import pytest
import torch

import odeadv
from odeadv.cli import main

DOCS = Path(__file__).parents[1] / "docs"
# support is for the package itself, and docs/api/command.md shows the command line.
PACKAGES = sorted({info.name for info in pkgutil.iter_modules(odeadv.__path__) if info.ispkg} - {"support", "cli"})


reference = runpy.run_path(str(DOCS / "reference.py"))
docstrings = runpy.run_path(str(DOCS / "docstrings.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_each_public_object_once(package):
    assert package in reference["PACKAGES"]
    assert (DOCS / "api" / f"{package}.md").exists()
    module = importlib.import_module(f"odeadv.{package}")
    listed = {*reference["objects"](package), *reference["shared"](package)}
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert {name.rpartition(".")[2] for name in listed} == public
    assert not set(reference["objects"](package)) & set(reference["objects"]("odeadv"))


def test_no_two_pages_differ_in_case_alone():
    """A file system that ignores case would keep one of them."""
    pages = [reference["page_of"](full) for package in PACKAGES for full in reference["objects"](package)]
    assert len({page.lower() for page in pages}) == len(pages)


def test_the_reference_begins_with_solve():
    assert reference["objects"]("odeadv")[0] == "odeadv.solve"
    assert set(reference["objects"]("schemes")) == {
        f"odeadv.schemes.{name}" for name in odeadv.schemes.__all__ if name not in odeadv.__all__
    }
    page = reference["_page"]("odeadv.solve")
    assert ".. autofunction:: odeadv.solve\n" in page


# The most used names have an example in their docstring.
EXAMPLES = {
    "solve", "driven", "evaluate", "AdversarialField", "SplitField", "Operator", "Scheme", "Stage",
    "schemes.get", "schemes.names", "attacks.fgsm", "attacks.ifgsm", "attacks.pgd", "models.preact_resnet",
    "models.from_module",
    "models.from_blocks", "models.pretrained", "training.Layerwise", "training.train", "data.load",
}  # fmt: skip
# Every example runs as it stands, except that of `compile_solver`, which needs a compiler.
RUNS = {
    full.removeprefix("odeadv.")
    for package in reference["PACKAGES"]
    for full in reference["objects"](package)
    if "    >>> " in (inspect.getdoc(reference["_get"](full)) or "")
} - {"compile_solver"} | {"Operator.linear", "Operator.diagonal", "Solution.__call__"}


@pytest.mark.parametrize("name", sorted(EXAMPLES | RUNS))
def test_examples_run(name):
    value = operator.attrgetter(name)(odeadv)
    finder = doctest.DocTestFinder(recurse=False)
    examples = [test for test in finder.find(value, name, globs={"torch": torch, "odeadv": odeadv}) if test.examples]
    assert examples, f"{name} has no example"
    assert all(test.examples[-1].want for test in examples), f"the example of {name} shows no result"
    for example in examples:
        found = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=lambda text: None)
        assert not found.failed, f"the example of {name} does not print what it shows"


@pytest.mark.parametrize("package", ["odeadv", "schemes", *PACKAGES])
def test_described_parameters_exist(package):
    """A line that is indented wrongly would show as a parameter with a strange name."""
    for full in reference["objects"](package):
        value = reference["_get"](full)
        if typing.get_origin(value) or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # Python 3.10 calls Callable[[Tensor], Tensor] a class
        known = {*dir(value)}
        # Sphinx and inspect take the signature of an exception from BaseException.
        made = value.__init__ if inspect.isclass(value) and issubclass(value, Exception) else value
        known |= {*inspect.signature(made).parameters}
        if inspect.isclass(value):
            known |= {*re.findall(r"self\.(\w+)", inspect.getsource(value))}
            known |= {name for base in value.__mro__ for name in getattr(base, "__annotations__", {})}
        assert {*docstrings["texts"](docstrings["completed"](value))} <= known, full


def _callables(full):
    """Yield the callables of a page that have a docstring, with their names and the classes of methods."""
    value = reference["_get"](full)
    if inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, enum.Enum)):
        yield full, value, None
    for name in vars(value) if inspect.isclass(value) else ():
        member = getattr(value, name)
        if (name == "__call__" or name[0] != "_") and inspect.isroutine(member) and inspect.getdoc(member):
            yield f"{full}.{name}", member, value


@pytest.mark.parametrize("package", reference["PACKAGES"])
def test_every_parameter_has_a_text_on_its_page(package):
    """The build completes the docstrings, see docs/docstrings.py. A method may name a parameter in its sentences."""
    without, unread = {}, []
    for full in reference["objects"](package):
        for name, value, owner in _callables(full):
            lines = docstrings["completed"](value, owner)
            texts = docstrings["texts"](lines)
            named = {*re.findall(r"``(\w+)", "\n".join(lines))} if owner else set()
            lost = {*docstrings["arguments"](value)} - {*texts} - named
            if lost and "args" not in lost:  # a class whose page shows no signature
                without[name] = lost
            unread += [f"{name}: {text[0]}" for text in texts.values() if re.search("^$|^see `|as for `(?!`)", text[0])]
    assert not without
    assert not unread


def test_phrases_of_docstrings_are_replaced():
    def model():
        """Return a model. The arguments are described in `solve`."""

    def steps(dt):
        """Return a model.

        Args:
            dt: as for `odeadv.solve`. It is a number.
        """

    def lost(speed):
        """Return a model.

        Args:
            speed: as for `odeadv.solve`.
        """

    completed, texts = docstrings["completed"], docstrings["texts"]
    assert completed(model) == ["Return a model."]
    text = texts(completed(steps))["dt"]
    assert text[:-1] == texts(completed(odeadv.solve))["dt"]
    assert text[-1].strip() == "It is a number."
    with pytest.raises(LookupError, match="no text for speed"):
        completed(lost)
    networks = completed(odeadv.models.resnet56)
    assert texts(networks)["noise"] == texts(completed(odeadv.models.PreActResNet))["noise"]
    here, there = (completed(owner.advance, owner) for owner in (odeadv.RungeKutta, odeadv.SubStep))
    assert here[0] == there[0]
    assert texts(here) == texts(there) != {}


@pytest.mark.parametrize("name", ["training.Layerwise", "training.Penalty", "SubStep"])
def test_fields_are_described_once(name):
    fields = reference["attributes"](operator.attrgetter(name)(odeadv))
    assert f":exclude-members: {', '.join(fields)}" in reference["_page"](f"odeadv.{name}")


def test_the_guide_shows_what_its_programs_print():
    """Except docs/training.md, which trains, and two pages that say what their programs print."""
    pytest.importorskip("matplotlib")
    programs = runpy.run_path(str(DOCS / "programs.py"))
    others = {"diagnostics", "reaction_diffusion", "training"}
    printing = {
        path.stem
        for path in DOCS.glob("*.md")
        if any("print(" in block for block in programs["BLOCK"].findall(path.read_text(encoding="utf-8")))
    }
    assert printing - others == {*programs["GUIDE"]}


def test_symbols_of_docstrings_are_set_as_formulas():
    restructured = reference["restructured"]
    assert restructured("The sum_{n >= 1} |a_n|^2 of f_n(x_n).") == (
        r"The :math:`\sum_{n \ge 1}` :math:`|a_n|^2` of :math:`f_n`\ (\ :math:`x_n`)."
    )
    assert restructured("L_LAD is ||x_0||, see `a_b` or ``x_0``; J^T a") == (
        r":math:`L_{\mathrm{LAD}}` is \|\|\ :math:`x_0`\ \|\|, see `a_b` or ``x_0``; :math:`J^\top` a"
    )
    assert restructured("is eta sum |a_n|^2 / L.") == r"is :math:`\eta \sum |a_n|^2 / L`."
    assert restructured(">>> x_0 = my_x | a_n") == ">>> x_0 = my_x | a_n"


def test_pages_of_constants_show_values_or_names():
    page = reference["_page"]
    assert "('pgd', 'pgd+lad', 'pgd+lad-sm')" in page("odeadv.experiments.METHODS")
    assert all(f"- ``{name}``: " in page("odeadv.experiments.PRESETS") for name in odeadv.experiments.PRESETS)
    assert page("odeadv.experiments.CLAIMS").count("\n   1") >= 1


def test_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ {4}(\w+)", capsys.readouterr().out, re.M)
    page = (DOCS / "api" / "command.md").read_text(encoding="utf-8")
    assert re.findall(r"\{odeadv-help\} (\w+)", page) == commands


def test_the_index_reaches_every_page():
    listed = {
        path
        for page in ("index.md", "all_results.md")
        for line in (DOCS / page).read_text(encoding="utf-8").splitlines()
        if re.fullmatch(r"[\w/*-]+", line)
        for path in DOCS.glob(f"{line}.md")
    }
    assert listed == {path for path in DOCS.rglob("*.md") if "_build" not in path.parts} - {DOCS / "index.md"}


def test_the_lines_of_the_questions_run():
    """Block after block, as a reader would paste them."""
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    for block in blocks:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            exec(block, names)
    assert len(blocks) == page.count("\n### ")  # one for each question, one for the names, none for the command line


@pytest.mark.parametrize("page", ["comparison", "faq", "evaluation", "attacks"])
def test_links_between_pages_lead_somewhere(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for file, part in re.findall(r"\]\((?!http)([\w/.]*)(?:#([\w-]*))?\)", text):
        target = (DOCS / (file or f"{page}.md")).read_text(encoding="utf-8")
        titles = {
            re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)", target, re.M)
        }
        assert not part or part in titles, f"{file}#{part}"


def test_pages_have_no_marks_of_a_merge():
    """A line of ``====`` that a merge leaves makes a heading of the line above it."""
    for path in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        marked = re.findall(r"^(?:<{4,}|={4,}|>{4,}|\|{4,}).*", path.read_text(encoding="utf-8"), re.M)
        assert not marked, f"{path.relative_to(DOCS.parent)}: {marked}"
