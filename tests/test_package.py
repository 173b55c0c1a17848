"""The package as a whole: what importing it costs, and that its imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import odeadv

ROOT = Path(odeadv.__file__).parent
# A folder may import from those before it in this order, and from itself.
LAYERS = (
    ("_version", "_state", "_files", "_configuration", "_precision"),
    ("fields",),
    ("splitting",),
    ("costate",),
    ("_solution", "_arguments"),
    ("_solve",),
    ("_compile",),
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
