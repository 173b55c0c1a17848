"""The README is true: its programs run and print what it shows, and its table is the one of the report."""

import ast
import builtins
import contextlib
import io
import re
from pathlib import Path

import pytest
from helpers import COMPILES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_programs(text: str) -> tuple[list[str], str]:
    """Run the Python blocks of a page in turn; return what each prints, and the output that the page shows."""
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.S)
    names: dict[str, object] = {}
    printed = []
    for program in re.findall(r"```python\n(.*?)```", text, re.S):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(program, names)
        printed.append(output.getvalue())
    return printed, shown


def test_the_programs_of_the_readme_print_what_is_shown():
    printed, shown = run_programs(README)
    assert printed[0] == shown
    assert "average of the attacks" in printed[1]


def test_the_programs_of_the_tutorial_print_what_is_shown():
    printed, shown = run_programs((ROOT / "docs" / "reaction_diffusion.md").read_text(encoding="utf-8"))
    assert "".join(printed) == shown


# How the programs of each page are pasted. Those of tutorials run in order while the site is made (docs/programs.py).
ALONE = {"costate.md", "index.md", "solver.md", "speed.md"}
IN_ORDER = {"README.md", "reaction_diffusion.md", "theory.md"}
AFTER_THE_FIRST = {"attacks.md", "diagnostics.md", "evaluation.md", "faq.md", "models.md", "training.md"}
RUN_ELSEWHERE = {"README.md", "reaction_diffusion.md", "diagnostics.md", "faq.md", "models.md", *ALONE}


def programs_of(page: str) -> list[str]:
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def test_every_page_with_programs_is_run():
    pages = {
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts
    }
    found = {page for page in pages if not page.startswith("tutorials") and programs_of(page)} | {"README.md"}
    assert found == ALONE | IN_ORDER | AFTER_THE_FIRST


@pytest.mark.parametrize("page", sorted((IN_ORDER | AFTER_THE_FIRST) - RUN_ELSEWHERE))
def test_the_programs_of_other_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for program in programs_of(page):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(program, names)
    assert names.keys() - {"__builtins__"}, f"{page} has no program"


def names_in(program: str) -> tuple[set[str], set[str]]:
    """Return the names that a program uses and those that it binds."""
    used, bound = set(), set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    return used, bound


@pytest.mark.parametrize("page", sorted(AFTER_THE_FIRST))
def test_each_program_needs_the_first_of_its_page_at_most(page):
    first, *others = programs_of(page)
    for program in others:
        used, bound = names_in(program)
        missing = used - bound - names_in(first)[1] - set(dir(builtins))
        assert not missing, f"{page}: {missing} is not known in\n{program}"


@pytest.mark.parametrize("command", ["table1", "test"])
def test_each_command_is_one_line(command):
    (block,) = re.findall(rf"<!-- command: {command} -->\n```sh\n(.*?)```", README, re.S)
    assert len(block.splitlines()) == 1


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_claims_are_those_of_the_page():
    ((words, table),) = re.findall(r"<!-- claims: (.*?) -->\n(.*?)<!-- end of claims -->", README, re.S)
    page = (ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8")
    head, line, *claims = [line for line in page.splitlines() if line.startswith("|")]
    seen = [claim for claim in claims if any(f"**{word}**" in claim for word in words.split(", "))]
    assert seen
    assert table.split() == "\n".join([head, line, *seen]).replace("](", "](docs/results/").split()


@pytest.mark.parametrize("page", sorted(ALONE))
def test_each_program_of_a_page_runs_alone(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a program may save a picture
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
    assert programs
    for program in programs:
        if "compile_solver" in program and not COMPILES:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, {})
