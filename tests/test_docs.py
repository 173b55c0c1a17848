"""The reference has every public name once, and every page is reached. CI builds the pages."""

import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

import odeadv
from odeadv.cli import main

DOCS = Path(__file__).parents[1] / "docs"
# support is for the package itself, and docs/api/command.md shows the command line.
PACKAGES = sorted({info.name for info in pkgutil.iter_modules(odeadv.__path__) if info.ispkg} - {"support", "cli"})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_leaves_out_what_is_described_elsewhere_only(package):
    page = (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    assert f"automodule:: odeadv.{package}" in page
    module = importlib.import_module(f"odeadv.{package}")
    shared = {name for name in module.__all__ if getattr(odeadv, name, None) is getattr(module, name)}
    left_out = {name for line in re.findall(r":exclude-members: (.*)", page) for name in line.split(", ")}
    assert left_out == shared & set(odeadv.__all__)
    assert left_out == set(re.findall(r"`odeadv\.(\w+)`", page))


def test_functions_of_schemes():
    page = (DOCS / "api" / "schemes.md").read_text(encoding="utf-8")
    names = set(odeadv.schemes.__all__) - set(odeadv.__all__)
    assert set(re.findall(r"autofunction:: odeadv\.schemes\.(\w+)", page)) == names


def test_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ {4}(\w+)", capsys.readouterr().out, re.M)
    page = (DOCS / "api" / "command.md").read_text(encoding="utf-8")
    assert re.findall(r"\{odeadv-help\} (\w+)", page) == commands


def test_the_index_reaches_every_page():
    listed = {
        path
        for line in (DOCS / "index.md").read_text(encoding="utf-8").splitlines()
        if re.fullmatch(r"[\w/*]+", line)
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
