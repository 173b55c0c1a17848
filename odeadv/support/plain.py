"""Convert typed dataclasses to plain data (JSON, YAML) and back. Errors name the path of an unknown or wrong key."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from odeadv.support.checks import integer
from odeadv.support.extras import extra

T = TypeVar("T")


class Choice:
    """Base of classes that a configuration chooses by name. ``class Pgd(Objective, name="pgd")`` registers itself.

    In plain data a choice is a mapping of its fields, with its name under ``"name"``. A name with a colon,
    ``"package.module:Class"``, is imported, so a choice can be defined outside this package.
    """

    name: ClassVar[str]
    choices: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            cls.choices = {}
            return
        known = cls.choices.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"name: {name!r} is taken by {known.__module__}.{known.__qualname__}; give another name")
        cls.name = name
        cls.choices[name] = cls


def to_dict(config: Any) -> Any:
    """Return ``config`` as plain data: dicts, lists, numbers, strings, booleans, None."""
    if isinstance(config, Choice) and not dataclasses.is_dataclass(config):
        _name(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        named = {"name": _name(config)} if isinstance(config, Choice) else {}
        return named | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(kind: type[T], data: Any, path: str = "", *, imports: bool = True) -> T:
    """Return an instance of the dataclass ``kind``, made from plain data.

    Numbers may be written as fractions in strings (``"8/255"``). Missing fields take their defaults.

    Args:
        kind: a dataclass, or a `Choice`.
        data: a mapping of the fields of ``kind``.
        path: the path of ``data`` in the whole configuration, for messages.
        imports: False imports none of the modules that ``data`` names. A choice ``"module:Class"`` then becomes a
            stand-in for listings. It has the name ``"module:Class"`` and the defaults of the base class.

    Raises:
        ValueError: if a key or name is unknown (the message lists similar names), or a value is out of range.
        TypeError: if a value has the wrong type.
    """
    result: T = _read(kind, data if imports else _without_imports(kind, data), path)
    return result


def read(kind: type[T], file: Path, *, imports: bool = True) -> T:
    """Read a .json, .yaml or .yml file with `from_dict`.

    Raises:
        ValueError: if the suffix or the syntax is wrong, or a key occurs twice.
        ValueError, TypeError: if the data do not fit ``kind``. The message names the file and the key.
        OSError: if the file cannot be read.
    """
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{file}: expected a .json, .yaml or .yml file")
    data = read_json(file) if file.suffix == ".json" else _read_yaml(file)
    try:
        return from_dict(kind, data, imports=imports)
    except (ValueError, TypeError) as error:
        kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
        raise kind_of_error(f"{file}: {error}") from None


def read_json(file: Path) -> Any:
    """Read a JSON file as plain data.

    Raises:
        ValueError: if the file is not UTF-8 or not JSON, or a mapping has a key twice. The message names the file.
        OSError: if the file cannot be read.
    """
    return _parsed(_text(file), str(file))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON mapping per line. The errors are those of `read_json`, and name the line."""
    found = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        value = _parsed(line, f"{file}: line {number}")
        if not isinstance(value, dict):
            raise ValueError(f"{file}: line {number}: got {type(value).__name__}, expected a mapping")
        found.append(value)
    return found


def _parsed(text: str, name: str) -> Any:
    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise ValueError(f"the key {twice!r} is there twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping, parse_constant=refused)
    except ValueError as error:
        raise ValueError(f"{name}: is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply") from None


def _read_yaml(file: Path) -> Any:
    with extra("train"):
        import yaml

    class Loader(yaml.SafeLoader):
        """Rejects a mapping with the same key twice. YAML's own loader would silently use the last value."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key))
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    text = _text(file)
    try:
        return yaml.load(text, Loader)  # safe, because Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{file}: is nested too deeply") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``data`` with assignments such as ``"training.lr=0.05"`` applied. Values are read as YAML.

    Raises:
        ValueError: if an assignment lacks "=", or a parent of its key is not a mapping, or its value is not YAML.
    """
    with extra("train"):
        import yaml

    result: dict[str, Any] = json.loads(json.dumps(data))
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise ValueError(f"set: got {assignment!r}, expected KEY=VALUE such as training.lr=0.05")
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"set: {key}: {parent} is not a mapping, but {place!r}")
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"set: {key}: {value!r} is not YAML: {error}") from None
    return result


def key(config: Any) -> str:
    """Return a name for ``config``: 16 hex digits of the SHA-256 of its fields that differ from their defaults.

    A new field does not change the name if its default keeps the old behaviour. If the default of a new field changes
    the behaviour, declare the field with ``metadata={"before": value}``, with the value that keeps the old behaviour.
    That value then leaves the name unchanged, and the new default changes the name.
    """
    text = json.dumps(_essential(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _essential(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        result = {"name": _name(config)} if isinstance(config, Choice) else {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != field.metadata.get("before", default):
                result[field.name] = _essential(value)
        return result
    return to_dict(config)


def _hints(kind: Any) -> Mapping[str, Any]:
    """Return the types of the fields of the dataclass ``kind``."""
    return _evaluated_hints(kind)


@lru_cache(512)
def _evaluated_hints(kind: Hashable) -> Mapping[str, Any]:
    # get_type_hints evaluates all annotations again on each call, which takes 0.3 ms.
    return types.MappingProxyType(get_type_hints(kind))


def _name(choice: Choice) -> str:
    """Return the name that leads to the class of ``choice``: its registered name, or ``module:Class`` for other code.

    Raises:
        TypeError: if the class is not a dataclass.
        ValueError: if the class cannot be imported, because it is defined in a program, a function or a class.
    """
    kind: Any = type(choice)
    if not hasattr(kind, "__dataclass_fields__"):
        raise TypeError(f"{kind.__name__}: is not a dataclass; decorate it with @dataclass(frozen=True)")
    if kind.__module__.startswith("odeadv."):
        return str(kind.name)
    module = str(kind.__module__)
    if module == "__main__":  # a module that was started as python -m module can be imported by its own name
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = module if spec is None else spec.name
    if module == "__main__" or "." in kind.__qualname__:
        raise ValueError(
            f"{kind.__name__}: is defined in {'a program' if module == '__main__' else 'a function or class'}, where "
            "a configuration cannot find it again; put it at the top of a module that can be imported"
        )
    return f"{module}:{kind.__qualname__}"


def with_floats(config: Any) -> None:
    """Convert the float and int fields of the frozen dataclass ``config`` to their declared types.

    Two configurations with 1 and 1.0 in the same field are then equal and have the same `key`.

    Raises:
        TypeError: if a field is declared as a number and holds another type. The message names the field.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name, None)
        if hint is float and not isinstance(value, float):
            object.__setattr__(config, name, _read_scalar(float, value, name))
        elif hint is int and type(value) is not int:
            object.__setattr__(config, name, integer(name, value, least=None))


def identity(config: Any) -> Any:
    """Return the fields of ``config`` that differ from their defaults, as plain data. `key` is a hash of this data."""
    return _essential(config)


def _read(kind: Any, data: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _read_union(arguments, data, path)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{path}: got {data!r}, expected one of {', '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise TypeError(f"{path}: got {data!r}, expected a list")
        return tuple(_read(arguments[0], value, f"{path}[{i}]") for i, value in enumerate(data))
    if origin is dict or kind is dict or origin is Mapping:
        if not isinstance(data, Mapping):
            raise TypeError(f"{path}: got {data!r}, expected a mapping")
        return dict(data)
    if isinstance(kind, type) and dataclasses.is_dataclass(data) and isinstance(data, kind):
        return data
    if isinstance(kind, type) and issubclass(kind, Choice) and not dataclasses.is_dataclass(kind):
        return _read_choice(kind, data, path)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, data, path)
    return _read_scalar(kind, data, path)


def _read_union(kinds: Sequence[Any], data: Any, path: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None) and get_origin(kind) is not Callable]  # plain data only
    for kind in rest[:-1]:
        try:
            return _read(kind, data, path)
        except (TypeError, ValueError):
            continue
    return _read(rest[-1], data, path)


def _read_choice(base: type[Choice], data: Any, path: str) -> Any:
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise TypeError(f"{path}: got {data!r}, expected a mapping with a name, one of {', '.join(base.choices)}")
    name = data["name"]
    rest = {key: value for key, value in data.items() if key != "name"}
    found = _imported(base, name, path) if ":" in name else base.choices.get(name)
    if found is None:
        near = _near(name, base.choices)
        raise ValueError(f"{path}.name: got {name!r}{near}, expected one of {', '.join(base.choices)}")
    return _read_fields(found, rest, path)


def _without_imports(kind: Any, data: Any) -> Any:
    """Return ``data``, plain data of a ``kind``, with a stand-in for each choice that would be imported."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), None)
    if not isinstance(kind, type) or not isinstance(data, Mapping | str):
        return data
    name = data if isinstance(data, str) else data.get("name")
    if issubclass(kind, Choice) and not dataclasses.is_dataclass(kind):
        if isinstance(name, str) and ":" in name:
            return _stand_in(kind, name)
        kind = kind.choices.get(name) if isinstance(name, str) else None
    if not dataclasses.is_dataclass(kind) or isinstance(data, str):
        return data
    hints = _hints(kind)
    return {key: _without_imports(hints.get(key), value) for key, value in data.items()}


def _stand_in(base: type[Choice], name: str) -> Any:
    def unusable(*_: Any, **__: Any) -> None:
        raise TypeError(f"{name}: was not imported, so it can be listed only")

    methods = {method: unusable for method, value in vars(base).items() if isinstance(value, types.FunctionType)}
    kind: Any = type(base.__name__, (base,), {**methods, "name": name})
    return dataclasses.dataclass(frozen=True)(kind)()


def named(name: str) -> Any:
    """Return the object ``"module:name"``; raise what importing the module or looking up the name raises."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _imported(base: type[Choice], name: str, path: str) -> type[Any]:
    try:
        found = named(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}.name: {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, base) and hasattr(found, "__dataclass_fields__")):
        raise TypeError(f"{path}.name: {name!r} is not a subclass of {base.__name__} that is a dataclass")
    return found


def _read_fields(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{path or 'config'}: got {data!r}, expected a mapping of {kind.__name__}'s fields")
    hints = _hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    dot = f"{path}." if path else ""
    for name in data:
        if name not in names:
            near = _near(str(name), names) or _deeper(kind, str(name), dot)
            raise ValueError(f"{dot}{name}: is not a key of {kind.__name__}{near}; keys are {', '.join(names)}")
    values = {name: _read(hints[name], value, f"{dot}{name}") for name, value in data.items()}
    added = {field.name: field.metadata["before"] for field in dataclasses.fields(kind) if "before" in field.metadata}
    if set(names) - set(data) <= added.keys():
        # Records contain every field. If only newer fields are missing, the record is older than these fields.
        values = added | values
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{dot}{missing[0]}: is missing; {kind.__name__} needs {', '.join(missing)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{dot}{error}") from None


def _read_scalar(kind: Any, data: Any, path: str) -> Any:
    if kind is float:
        if isinstance(data, str):
            try:
                data = float(Fraction(data.replace(" ", ""))) if "/" in data else float(data)
            except (ValueError, ZeroDivisionError):
                raise TypeError(f"{path}: got {data!r}, expected a number") from None
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise TypeError(f"{path}: got {data!r}, expected a number")
        if not math.isfinite(data):
            raise ValueError(f"{path}: got {data!r}, expected a finite number")
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        expected = {int: "an integer", str: "a string", bool: "true or false"}.get(kind, str(kind))
        raise TypeError(f"{path}: got {data!r}, expected {expected}")
    return data


def _deeper(kind: Any, name: str, dot: str, above: tuple[Any, ...] = ()) -> str:
    """Return a hint for the message if ``name`` is a key inside one of the fields of ``kind``, else ``""``."""
    for field, hint in get_type_hints(kind).items():
        parts = get_args(hint) or (hint,)
        below = [*parts, *(each for part in parts for each in getattr(part, "choices", {}).values())]
        for part in below:
            if not (isinstance(part, type) and dataclasses.is_dataclass(part)):
                continue
            if part in above:  # avoids an endless recursion: an objective may contain an objective
                continue
            if name in (inner.name for inner in dataclasses.fields(part)):
                return f" (did you mean '{dot}{field}.{name}'?)"
            if found := _deeper(part, name, f"{dot}{field}.", (*above, part)):
                return found
    return ""


def _near(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def pack(outcomes: Tensor) -> str:
    """Return the bool tensor ``outcomes`` as base64 text.

    The entries, in row-major order, are packed eight per byte. The first entry is the highest bit.
    """
    with extra("evaluate"):
        import numpy

    bits = numpy.packbits(outcomes.detach().cpu().reshape(-1).numpy())
    return base64.b64encode(bits.tobytes()).decode("ascii")


def unpack(text: object, *shape: int) -> Tensor:
    """Return the bool tensor of shape ``shape`` from ``text``, the result of `pack`.

    Raises:
        ValueError: if ``text`` is not base64, or its size does not fit ``shape``.
    """
    with extra("evaluate"):
        import numpy

    count = math.prod(shape)
    try:
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__}")
        raw = numpy.frombuffer(base64.b64decode(text, validate=True), dtype=numpy.uint8)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"outcomes: {error}, expected base64 of packed bits") from None
    if len(raw) != (count + 7) // 8:
        raise ValueError(f"outcomes: got {len(raw)} bytes, expected {(count + 7) // 8} for {count} outcomes")
    return torch.from_numpy(numpy.unpackbits(raw, count=count).astype(bool)).reshape(shape)
