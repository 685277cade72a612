"""The architecture, checked: who may import what, what needs no Ray and no MLflow, and how large a piece may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = ("numerics", "operators", "analyses", "stages")

BLOCKER = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this test")

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocked())
for name in sys.argv[2].split(","):
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        if not found.name.rsplit(".", 1)[-1].startswith("kernels_triton_programs"):
            importlib.import_module(found.name)
loaded = sorted(BLOCKED & {name.split(".")[0] for name in sys.modules})
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, type checking aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("blocked", "modules"),
    [
        ("ray,mlflow,transformers,pydantic,pandas,yaml,fsspec", "pipeline.numerics"),
        ("ray,mlflow,pydantic", "pipeline.operators"),
        ("ray,mlflow,pydantic", "pipeline.analyses"),
        ("ray,mlflow,torch,transformers,pandas,fsspec", "pipeline.config,pipeline.sections,pipeline.schema"),
        ("ray,mlflow,torch,transformers", "pipeline.cli"),
    ],
)
def test_a_layer_imports_where_the_packages_above_it_are_missing(blocked: str, modules: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKER, blocked, modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_only_to_the_right_and_ray_and_mlflow_stay_at_the_rim(path: Path) -> None:
    imported = imports_of(path)
    place = path.relative_to(PACKAGE).parts
    tops = {name.split(".")[0] for name in imported}
    if "ray" in tops:
        assert place[0] in ("stages", "cluster.py", "jobs.py")
    if "mlflow" in tops:
        assert place == ("tracking_mlflow.py",)
    if "httpx2" in tops:
        assert place == ("endpoint.py",)
    if place[0] in LAYERS:
        above = LAYERS[LAYERS.index(place[0]) + 1 :]
        assert not {name for name in imported if name.startswith(tuple(f"pipeline.{layer}" for layer in above))}
    if place[0] in ("numerics", "operators", "analyses", "formats", "report"):
        forbidden = ("pipeline.config", "pipeline.sections", "pipeline.storage", "pipeline.tracking", "pipeline.runner")
        assert not {name for name in imported if name.startswith(forbidden)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert text.isascii() or path.parent.name == "report"
    assert text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 55, node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert path.name == "cli.py"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, "an __init__ holds its docstring alone"


def test_only_the_flow_and_the_rim_see_the_whole_configuration() -> None:
    seeing = {path.name for path in FILES if "pipeline.config" in imports_of(path)}
    rim = {"flow.py", "runner.py", "runlog.py", "estimate.py", "durations.py", "sizes.py", "jobs.py", "cli.py"}
    assert seeing <= rim
