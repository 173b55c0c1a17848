"""The package as a whole: what importing it costs, and that its imports go one way."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import odeadv

ROOT = Path(odeadv.__file__).parent
# A folder may import from those before it in this order, and from itself.
LAYERS = (
    ("_version", "support"),
    ("fields",),
    ("splitting",),
    ("costate",),
    ("solver",),
    ("diagnostics",),
    ("models", "attacks", "data"),
    ("evaluation",),
    ("audit",),
    ("training",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)


# What a user does in turn, and what it must not import yet.
IMPORTS = {
    "import odeadv": "torchvision torchdiffeq matplotlib sklearn scipy PIL lightning_fabric safetensors yaml "
    "odeadv.audit odeadv.experiments odeadv.training",
    "odeadv.data.load": "sklearn PIL torchvision",
    "trace = odeadv.diagnostics.Trace(); trace.add(0, 1e6)": "matplotlib",
    "trace.plot()": "matplotlib.pyplot",
    "odeadv.training.train, odeadv.experiments.run, odeadv.audit.audit": "odeadv.cli",
}


def test_each_use_imports_what_it_needs():
    """Every use in one new process, because a process takes seconds to import torch."""
    code = "import sys\n" + "\n".join(
        f"{use}\nfound = set({names.split()!r}) & set(sys.modules); assert not found, ({use!r}, found)"
        for use, names in IMPORTS.items()
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"audit", "data", "evaluation", "experiments", "fields", "training"} <= set(dir(odeadv))
    with pytest.raises(AttributeError, match="no attribute 'trainnig'"):
        _ = odeadv.trainnig


OPTIONAL = "filelock jaxtyping lightning_fabric matplotlib numpy safetensors scipy torchdiffeq torchvision tqdm yaml"
WITH_TORCH_ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL.split()}))  # None: as if it were not installed
import torch, odeadv

field = odeadv.AdversarialField(lambda t, x: -x, lambda x: (x**2).sum(), eta=0.1)
sol = odeadv.solve(field, torch.ones(2), (0.0, 1.0), scheme="strang", dt=0.1)
net, images, labels = odeadv.models.resnet20(), torch.rand(2, 3, 8, 8), torch.tensor([1, 2])
odeadv.solve(net.field(images, labels, eta=1.0), scheme="lie").loss.backward()
odeadv.attacks.fgsm(net, images, labels, eps=0.1)
for name, use in (
    ("plot", sol.plot),
    ("torchdiffeq", lambda: odeadv.TorchDiffEq("dopri5")),
    ("evaluate", lambda: odeadv.evaluate(net, (images, labels), protocol="table1")),
    ("train", odeadv.training.make_fabric),
    ("evaluate", lambda: odeadv.audit.audit(net, (images, labels))),
):
    try:
        use()
    except ModuleNotFoundError as error:
        assert f"pip install 'odeadv[{{name}}]'" in str(error), error
    else:
        raise AssertionError(name)
from odeadv.cli import main
assert main(["--help"]) == 2  # in one line, not as a traceback
"""


def test_solving_networks_and_attacks_need_torch_alone_and_errors_name_the_extra():
    code = [sys.executable, "-W", "ignore", "-c", WITH_TORCH_ALONE]
    done = subprocess.run(code, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr
        == "odeadv: error: numpy: is not installed; expected the extra 'train': pip install 'odeadv[train]'\n"
    )


def sources() -> dict[str, Path]:
    """Return the files of the package by the names of their modules; a folder's ``__init__.py`` has the folder's."""
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


SOURCES = sources()
SURE = {"", "filelock", "mpmath", "odeadv", "torch", *sys.stdlib_module_names}  # torch brings filelock and mpmath
DISTRIBUTIONS = {"PIL": "torchvision", "sklearn": "scikit-learn", "yaml": "pyyaml"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(name: str, tree: ast.AST | None = None) -> set[str]:
    """Return the modules of the package that the module ``name`` imports anywhere in its text, however written."""
    folder = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[name] if tree is None else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = folder.split(".")
            owner = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (owner, node.module) if part)
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in SOURCES else module)
    return {module for module in found if module.split(".")[0] == "odeadv"}


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("from odeadv.solver._run import Run", "odeadv.solver._run"),
        ("from odeadv.solver import _run", "odeadv.solver._run"),
        ("import odeadv.solver._run", "odeadv.solver._run"),
        ("from ..solver._run import Run", "odeadv.solver._run"),
        ("if TYPE_CHECKING:\n    from ..solver import _run", "odeadv.solver._run"),
        ("def f():\n    from ._scheme import Scheme", "odeadv.splitting._scheme"),
        ("from . import schemes", "odeadv.splitting.schemes"),
    ],
)
def test_every_form_of_an_import_is_read(text: str, module: str):
    assert imported("odeadv.splitting.method", ast.parse(text)) == {module}


def test_imports_go_one_way():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for name in SOURCES.keys() - {"odeadv"}:
        here = name.split(".")[1]
        for module in imported(name):
            there = [*module.split("."), "__init__"][1]
            if there != here and level.get(there, 0) >= level[here]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_private_modules_are_imported_in_their_own_folder_only():
    wrong = []
    for name, path in SOURCES.items():
        folder = path.parent.relative_to(ROOT.parent).as_posix().replace("/", ".")
        for module in imported(name):
            owner, _, last = module.rpartition(".")
            if last.startswith("_") and last != "_version" and owner != folder:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_only_the_package_itself_is_at_the_root():
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "_version.py", "py.typed"}


def test_no_import_is_circular():
    """Whole modules are compared, so imports within functions and for type checking count too."""
    edges = {name: imported(name) for name in SOURCES}
    # A folder imports its own modules, which import the folder only if there is a circle.
    seen, done = [], set()

    def visit(name):
        if name in done or name not in edges:
            return
        assert name not in seen, " -> ".join([*seen[seen.index(name) :], name])
        seen.append(name)
        for other in sorted(edges[name]):
            visit(other)
        seen.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


def test_optional_packages_are_imported_where_an_error_names_an_extra_that_brings_them():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        needs = {re.split("[>=]", need)[0] for need in extras[extra]}
        more = [name for need in needs for name in re.findall(r"[a-z]+", need.partition("[")[2])]
        return needs.union(*map(brought, more))

    def visit(node: ast.AST, named: str | None) -> Iterator[str]:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            if getattr(call.func, "id", None) == "extra" and isinstance(call.args[0], ast.Constant):
                named = call.args[0].value
            elif getattr(call.func, "attr", None) == "suppress":
                return
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for module in {module.partition(".")[0] for module in modules} - SURE:
            package = DISTRIBUTIONS.get(module, module.replace("_", "-"))
            if named is None or package not in brought(named):
                yield f"{module} in line {node.lineno}, extra {named}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, named)

    wrong = [f"{name}: {text}" for name, tree in TREES.items() for text in visit(tree, None)]
    assert not wrong


def test_every_extra_that_an_error_names_exists_and_is_explained():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {
        node.args[0].value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "extra"
    }
    assert named
    assert named <= set(extras)
    page = (ROOT.parent / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert {extra for extra in extras if f"`{extra}`" not in page} == set()
    packages = {re.split("[>=]", need)[0] for needs in extras.values() for need in needs if ">=" in need}
    assert {package for package in packages if f"| {package} |" not in page} == set()


def test_the_citation_has_the_version():
    citation = (ROOT.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.M).group(1) == odeadv.__version__


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Return all functions and methods of the package, with where they are."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}:{node.lineno} {node.name}", node


def test_one_word_one_thing():
    """A class, or an alias of a type, shares its name with no other one; an underscore does not tell two apart."""
    places: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            for name in names:
                if name.lstrip("_")[:1].isupper() and not name.isupper():
                    places.setdefault(name.lstrip("_"), []).append(f"{module}:{node.lineno}")
    assert len(places) > 300
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_no_function_takes_more_than_eight_positional_parameters():
    wrong = []
    for place, node in functions():
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if len([name for name in names if name not in ("self", "cls")]) > 8:
            wrong.append(place)
    assert not wrong


def test_no_function_has_more_than_sixty_lines_of_code():
    """Docstrings, comments and empty lines do not count. The signature does."""
    lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in SOURCES.items()}
    wrong = []
    for place, node in functions():
        inside = set(range(node.lineno, node.end_lineno + 1))
        if ast.get_docstring(node):
            inside -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        code = [lines[place.split(":")[0]][number - 1].strip() for number in inside]
        if len([line for line in code if line and not line.startswith("#")]) > 60:
            wrong.append(place)
    assert not wrong


def changes_itself(node: ast.AST) -> bool:
    """Return True if a method assigns to an attribute of self, or to an item of one."""
    for part in ast.walk(node):
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        for target in targets:
            text = ast.unparse(target) if isinstance(target, ast.Attribute | ast.Subscript) else ""
            if text.startswith("self."):
                return True
    return False


def test_no_getter_has_a_side_effect():
    """Neither by itself nor by a method of its class. `Solution.costate` makes a recording when it is asked for."""
    wrong = set()
    for name, tree in TREES.items():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            methods = {node.name: node for node in owner.body if isinstance(node, ast.FunctionDef)}
            changing = {method for method, node in methods.items() if changes_itself(node)}
            for _ in methods:
                changing |= {method for method, node in methods.items() if asked(node) & changing}
            getters = {
                method
                for method, node in methods.items()
                if any("property" in ast.unparse(d) for d in node.decorator_list)
            }
            wrong |= {f"{name} {owner.name}.{method}" for method in getters & changing}
    assert wrong == {"odeadv.solver._solution Solution.costate"}


def asked(node: ast.AST) -> set[str]:
    """Return the names of the methods of self that a method uses."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self"
    }
