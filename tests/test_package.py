"""The package as a whole: what importing it costs, and that its imports go one way."""

import ast
import re
import subprocess
import sys
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


def test_import_is_light():
    code = (
        "import sys, odeadv; heavy = {'torchvision', 'torchdiffeq', 'matplotlib', 'sklearn', 'scipy', 'PIL', "
        "'lightning_fabric', 'safetensors', 'yaml'} & "
        "set(sys.modules); sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


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


def test_folders_are_imported_when_they_are_used():
    code = (
        "import sys, odeadv; names = {'audit', 'experiments', 'training'}; "
        "assert names | {'data', 'evaluation', 'fields'} <= set(dir(odeadv)); "
        "assert not {f'odeadv.{name}' for name in names} & set(sys.modules); "
        "assert odeadv.training.train and odeadv.experiments.run and odeadv.audit.audit and odeadv.data.load"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'trainnig'"):
        _ = odeadv.trainnig


def test_imports_go_one_way():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                parts = module.split(".")
                if parts[0] == "odeadv" and len(parts) > 1 and parts[1] != here and level[parts[1]] >= level[here]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_private_modules_are_imported_in_their_own_folder_only():
    wrong = []
    for path in ROOT.rglob("*.py"):
        folder = path.parent.relative_to(ROOT.parent).as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            owner, _, name = module.rpartition(".")
            if owner.startswith("odeadv") and name.startswith("_") and name != "_version" and owner != folder:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_only_the_package_itself_is_at_the_root():
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "_version.py", "py.typed"}


def test_no_import_is_circular():
    """Whole modules are compared, so imports within functions and for type checking count too."""
    trees = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    edges = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    edges[name].add(whole if whole in trees else node.module)
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


def test_every_extra_that_an_error_names_exists_and_is_explained():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {
        node.args[0].value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
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


def test_no_function_takes_more_than_eight_positional_parameters():
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > 8:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not wrong
