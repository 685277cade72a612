"""The architecture, checked: who may import what, what needs no Ray and no MLflow, and how large a piece may grow."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages, find_packages

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
    "analyses": {*_PLAIN, "models", "text", "extraction", "numerics"},
    "storage": {*_PLAIN, "numerics"},
    "report": {*_PLAIN, "analyses", "numerics", "terminal"},
    "explorer": {*_PLAIN, "library", "analyses", "report", "models", "text", "storage", "numerics"},
    "exports": {
        *(*_PLAIN, "library", "explorer", "report", "analyses"),
        *("checkpoints", "storage", "numerics", "cluster"),
    },
    "organisms": {"models"},
    "cluster": {*_PLAIN, "config"},
    "stages": {
        *(*_PLAIN, "terminal", "config", "storage", "cluster", "tracking", "checkpoints"),
        *("text", "models", "organisms", "extraction", "analyses", "numerics", "report"),
    },
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


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module imported anywhere in a file, type checking aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return frozenset(found)


@pytest.mark.parametrize(
    ("blocked", "modules"),
    [
        ("ray,mlflow,transformers,pydantic,pandas,yaml,fsspec", "pipeline.numerics"),
        ("ray,mlflow,pydantic", "pipeline.models,pipeline.text,pipeline.extraction"),
        ("ray,mlflow,pydantic", "pipeline.analyses"),
        ("ray,mlflow,torch,transformers,pandas,fsspec", "pipeline.config,pipeline.schema"),
        ("ray,mlflow,torch,transformers", "pipeline.cli,pipeline.commands"),
        ("ray,mlflow", "pipeline.library"),
        ("ray,mlflow,gradio", "pipeline.exports"),
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
    if "gradio" in tops:
        assert place == ("explorer", "app.py")
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
            assert path.name == "cli.py" or path.parent.name == "commands"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, "an __init__ holds its docstring alone"


def test_only_the_flow_and_the_rim_see_the_whole_configuration() -> None:
    seeing = {path for path in FILES if "pipeline.config.run_file" in imports_of(path)}
    rooms = {path.relative_to(PACKAGE).parts[0] for path in seeing}
    assert rooms <= {"cli.py", "commands", "run", "planning", "planted", "tracking", "cluster", "library"}
    assert {path.name for path in seeing if path.parent.name in ("tracking", "cluster")} == {"run_log.py", "jobs.py"}


def test_few_files_lie_outside_the_rooms_and_nothing_in_the_package_needs_a_workload() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7
    assert not [path for path in FILES if any(name.split(".")[0] == "workloads" for name in imports_of(path))]


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {name.split(".")[0] for name in found} == {"pipeline", "crossray"}
    assert set(find_packages(str(ROOT), include=["pipeline*"])) == {
        ".".join(path.parent.relative_to(ROOT).parts) for path in FILES
    }, "a folder without __init__.py"
    for package, patterns in settings["package-data"].items():
        assert all(list((ROOT / package.replace(".", "/")).glob(pattern)) for pattern in patterns), package


LOADED_BY_OTHERS = {
    "s3fs": "fsspec, for s3://",
    "psutil": "MLflow, for system metrics",
    "psycopg": "MLflow, for PostgreSQL",
    "gguf": "transformers, for models in GGUF files",
}
"""Declared packages that no file imports, and who does."""


def declared(*extras: str) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, asked)}


RUNTIME = ("hub", "lora", "spread", "gguf", "services", "explore", "triton")
DEVELOPMENT = ("test", "docs", "check")


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported() -> None:
    tops = {name.split(".")[0] for path in FILES for name in imports_of(path)}
    foreign = tops - set(sys.stdlib_module_names) - {"pipeline"}
    names = packages_distributions()
    missing = [
        name for name in foreign if not {canonicalize_name(own) for own in names[name]} & set(declared(*RUNTIME))
    ]
    assert not missing, f"imported and not declared in pyproject.toml: {sorted(missing)}"
    imported = {canonicalize_name(own) for name in foreign for own in names[name]}
    assert not set(declared(*RUNTIME)) - imported - set(LOADED_BY_OTHERS)
    assert not set(LOADED_BY_OTHERS) & imported


def pins(name: str) -> dict[str, set[str]]:
    """Versions by package in a file of pins; a package may have one per Python version."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), set()).add(specifier.version)
    return found


def test_everything_declared_is_pinned_in_the_lock_and_the_lock_has_no_torch() -> None:
    locked, direct = pins("requirements.lock"), pins("constraints.txt")
    asked = declared(*RUNTIME, *DEVELOPMENT)
    assert set(asked) - {"torch"} <= set(locked)
    assert "torch" not in locked and not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    for name, requirement in asked.items():
        assert name in direct, f"constraints.txt lacks {name}"
        versions = locked.get(name, direct[name])
        assert versions == direct[name], f"{name}: `make lock`"
        assert all(version in requirement.specifier for version in versions), name


def test_the_lock_serves_both_versions_of_python() -> None:
    """No package without a pin where the other version has one, and none with two."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    for version in ("3.11", "3.12"):
        names = [
            canonicalize_name(own.name)
            for own in map(Requirement, lines)
            if own.marker is None
            or own.marker.evaluate({"python_version": version, "python_full_version": f"{version}.1"})
        ]
        assert len(names) == len(set(names))
        assert set(declared(*RUNTIME, *DEVELOPMENT)) - {"torch"} <= set(names)
    assert not [line for line in lines if "://" in line or line.startswith("-")], "a lock names no host"
