"""Complete the docstrings of the reference while the site is made, so that in the code a text stands once.

A docstring names another object by one of three phrases, which may be recursive:

- "as for `fgsm`." begins the text of a parameter. The page has the text of the same parameter of `fgsm`.
- "The arguments are described in `OdeNet`." The page has the texts of these parameters.
- "See `SubStep.advance`." begins a docstring. The page has the summary of the other object, and its parameters.

A class or method also gets the texts of the parameters that only its base class describes.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from typing import Any, NamedTuple

import odeadv


class Section(NamedTuple):
    """The lines ``start`` to ``end`` of a docstring, with the names before each colon and the lines of each text."""

    start: int
    end: int
    entries: list[tuple[list[str], list[str]]]


def sections(lines: list[str]) -> list[Section]:
    """Return the sections of parameters of a docstring."""
    found = []
    for start, line in enumerate(lines):
        if line not in ("Args:", "Attributes:"):
            continue
        end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
        while not lines[end - 1].strip():
            end -= 1
        entries: list[tuple[list[str], list[str]]] = []
        for row in lines[start + 1 : end]:
            if row.startswith("     ") or not row.strip():
                entries[-1][1].append(row)
            else:
                names, _, text = row.strip().partition(":")
                entries.append((names.split(", "), [text.strip()]))
        found.append(Section(start, end, entries))
    return found


def texts(lines: list[str]) -> dict[str, list[str]]:
    """Return the texts of the parameters of a docstring by name."""
    entries = [entry for section in sections(lines) for entry in section.entries]
    return {name.lstrip("*"): text for names, text in entries for name in names}


def arguments(value: Any) -> list[str]:
    """Return the names of the parameters in the signature of ``value``, without ``self``."""
    try:
        names = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in ("self", "cls")]


def completed(value: Any, owner: object = None) -> list[str]:
    """Return the lines of the docstring of ``value`` with all texts that it takes from other docstrings.

    Args:
        value: a class, function, method or property.
        owner: the class of a method.

    Raises:
        LookupError: if the object that is named, or the text of the parameter there, does not exist.
    """
    lines = (inspect.getdoc(value) or "").splitlines()
    sources = []
    if lines and (see := re.match(r"See `([\w.]+)`\.", lines[0])):
        other = completed(*_named(see[1], value))
        summary = other[: other.index("")] if "" in other else other
        lines[:1] = [*summary, *filter(None, [lines[0][see.end() :].strip()])]
        sources.append(other)
    for i, line in enumerate(lines):
        if described := re.search(r" ?The arguments are described in `([\w.]+)`\.", line):
            lines[i] = line.replace(described[0], "")
            sources.append(completed(*_named(described[1], value)))
            if lost := {*arguments(value)} - {*texts(lines), *texts(sources[-1])}:
                raise LookupError(f"{described[1]} has no text for {', '.join(sorted(lost))} of {value}")
    sources += _inherited(value, owner)
    _add(lines, arguments(value), sources)
    for section in reversed(sections(lines)):
        entries = [entry for names, text in section.entries for entry in _resolved(names, text, value)]
        lines[section.start + 1 : section.end] = _written(entries)
    return lines


def _named(name: str, near: Any) -> tuple[Any, object]:
    """Return the object that the docstring of ``near`` calls ``name``, and the class or module that has it."""
    module = getattr(near, "fget", near).__module__
    for place in (module, module.rpartition(".")[0], "odeadv"):
        try:
            owner: Any = sys.modules[place]
            *path, last = name.removeprefix("odeadv.").split(".")
            for part in path:
                owner = getattr(owner, part)
            return getattr(owner, last), owner
        except (AttributeError, KeyError):  # a property made by functools or operator has no module here
            continue
    raise LookupError(f"{near} names {name}, which does not exist")


def _inherited(value: Any, owner: object) -> list[list[str]]:
    """Return the docstrings of the base classes of a class, or of a method in the bases of its class."""
    bases = [
        base
        for base in inspect.getmro(value if inspect.isclass(value) else owner if inspect.isclass(owner) else object)[1:]
        if base.__module__.startswith("odeadv")
    ]
    if inspect.isclass(value):
        return [completed(base) for base in bases]
    name = getattr(value, "__name__", "")
    return [completed(vars(base)[name], base) for base in bases if name in vars(base)]


def _add(lines: list[str], names: list[str], sources: list[list[str]]) -> None:
    """Add the texts of those ``names`` that ``lines`` lack, from the first of ``sources`` that has them."""
    missing = [name for name in names if name not in texts(lines)]
    added = []
    for names_there, text in (entry for other in sources for part in sections(other) for entry in part.entries):
        if taken := [name for name in names_there if name.lstrip("*") in missing]:
            missing = [name for name in missing if name not in [one.lstrip("*") for one in taken]]
            added.append((taken, text))
    if not added:
        return
    if not sections(lines):
        at = next((i for i, line in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", line)), len(lines))
        lines[at:at] = ["Args:", ""] if at < len(lines) else ["", "Args:"]
    section = sections(lines)[0]
    place = {name: number for number, name in enumerate(names)}
    entries = sorted([*section.entries, *added], key=lambda entry: place.get(entry[0][0].lstrip("*"), len(place)))
    lines[section.start + 1 : section.end] = _written(entries)


def _resolved(names: list[str], text: list[str], near: Any) -> list[tuple[list[str], list[str]]]:
    """Return the entries for one entry: more than one if several names have the text "as for `Layerwise`."."""
    if not text[0].startswith("as for "):
        return [(names, text)]
    phrase = re.match(r"as for `([\w.]+)`\.(?: |$)", text[0])
    if phrase is None:
        raise ValueError(f"{near}: got {text[0]!r}, expected 'as for `NAME`.', then more sentences")
    there = texts(completed(*_named(phrase[1], near)))
    if lost := {*names} - {*there}:
        raise LookupError(f"{phrase[1]} has no text for {', '.join(sorted(lost))} of {near}")
    rest = text[0][phrase.end() :]
    own = [f"        {rest}", *text[1:]] if rest else text[1:]
    return [([name], [*there[name], *own]) for name in names]


def _written(entries: list[tuple[list[str], list[str]]]) -> list[str]:
    return [line for names, text in entries for line in (f"    {', '.join(names)}: {text[0]}", *text[1:])]


def complete(app: object, what: str, name: str, obj: Any, options: object, lines: list[str]) -> None:
    """Complete one docstring. Sphinx calls this before the sections become lists of fields."""
    if what in ("class", "exception", "function", "method", "property"):
        path = ".".join(name.split(".")[1:-1])
        found = completed(obj, operator.attrgetter(path)(odeadv) if path else odeadv)
        if found != (inspect.getdoc(obj) or "").splitlines():
            lines[:] = [*found, ""]


def setup(app: Any) -> None:
    """Connect the function above; Sphinx calls this."""
    app.connect("autodoc-process-docstring", complete, priority=400)  # napoleon has 500
