"""The README is true: its programs run and print what it shows, and its table is the one of the report."""

import contextlib
import io
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", ["theory.md", "training.md"])
def test_the_programs_of_other_pages_run(page):
    names: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, names)
    assert names.keys() - {"__builtins__"}, f"{page} has no program"


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


@pytest.mark.parametrize("page", ["index.md", "solver.md"])
def test_each_program_of_a_page_runs_alone(page):
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
    assert programs
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, {})
