"""The architecture, checked: who may import what, what needs no Ray and no MLflow, and how large a piece may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"
FILES = sorted(PACKAGE.rglob("*.py"))
_PLAIN = {"errors", "schema"}
MAY_IMPORT = {
    "numerics": {"checkpoints"},
    "checkpoints": {*_PLAIN, "numerics"},
    "config": {*_PLAIN, "numerics"},  # rules of numbers that need no torch
    "text": _PLAIN,
    "models": {*_PLAIN, "text", "numerics"},
    "extraction": {*_PLAIN, "models", "text", "numerics"},
    "analyses": {*_PLAIN, "models", "text", "extraction", "numerics", "checkpoints"},
    "storage": {*_PLAIN, "numerics"},
    "report": {*_PLAIN, "analyses", "numerics", "terminal"},
}
"""Rooms that a room may import; rooms not named here see everything: they are what runs the others."""

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
        if not found.name.rsplit(".", 1)[-1].startswith("triton_programs"):
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
        ("ray,mlflow,pydantic", "pipeline.models,pipeline.text,pipeline.extraction"),
        ("ray,mlflow,pydantic", "pipeline.analyses"),
        ("ray,mlflow,torch,transformers,pandas,fsspec", "pipeline.config,pipeline.schema"),
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
        assert place[0] in ("stages", "cluster")
    if "mlflow" in tops:
        assert place == ("tracking", "mlflow_tracker.py")
    if "openai" in tops:
        assert place == ("models", "endpoint.py")
    if "rich" in tops:
        assert place == ("terminal.py",)
    room = place[0] if len(place) > 1 else ""
    entered = {name.split(".")[1] for name in imported if name.startswith("pipeline.")} - {room}
    assert entered <= MAY_IMPORT.get(room, entered), sorted(entered - MAY_IMPORT[room])


def import_graph() -> dict[str, set[str]]:
    """Every module of the package with those that it imports, also inside functions and under TYPE_CHECKING."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    graph = {}
    for path in FILES:
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = found & names
    return graph


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph()
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


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
    seeing = {path for path in FILES if "pipeline.config.run_file" in imports_of(path)}
    rooms = {path.relative_to(PACKAGE).parts[0] for path in seeing}
    assert rooms <= {"cli.py", "run", "planning", "planted", "tracking", "cluster"}
    assert {path.name for path in seeing if path.parent.name in ("tracking", "cluster")} == {"run_log.py", "jobs.py"}
