import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import crossray

ROOT = Path(__file__).parent.parent.parent


def test_importing_it_loads_nothing() -> None:
    code = "import sys; import crossray; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"pipeline", "torch", "numpy", "pandas", "ray", "mlflow", "transformers", "altair", "pydantic"}


def test_a_finished_run_is_opened_without_ray_and_mlflow() -> None:
    code = "import sys, crossray; [getattr(crossray, own) for own in crossray.SURFACE]; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"ray", "mlflow"} & {name.split(".")[0] for name in ast.literal_eval(done.stdout)}


def test_the_surface_is_the_list() -> None:
    """What type checkers see, what `from crossray import *` gives and what is loaded are one list."""
    tree = ast.parse(Path(crossray.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(crossray.SURFACE) == set(crossray.__all__) == set(dir(crossray))
    for name in crossray.SURFACE:
        module, _, attribute = seen[name].rpartition(".")
        value = getattr(crossray, name)
        found = sys.modules.get(seen[name]) or getattr(sys.modules[module], attribute)
        assert value is found, name


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="load_pair"):
        crossray.train  # noqa: B018


@pytest.mark.parametrize("name", sorted(crossray.SURFACE))
def test_public_names_are_documented(name: str) -> None:
    value = getattr(crossray, name)
    assert inspect.getdoc(value)
    if inspect.ismodule(value):
        members = [getattr(value, own) for own in vars(value) if not own.startswith("_")]
        members = [own for own in members if inspect.isfunction(own) and own.__module__ == value.__name__]
        assert members
    elif inspect.isclass(value):
        own = [one for one in vars(value) if not one.startswith("_")]
        members = [getattr(value, one) for one in own]
        members = [one for one in members if inspect.isfunction(one) or isinstance(one, property)]
    else:
        members = []
        arguments = [own for own in inspect.signature(value).parameters if own not in ("self", "cls")]
        assert all(f"{argument}:" in (inspect.getdoc(value) or "") for argument in arguments), arguments
    assert all(inspect.getdoc(member) for member in members)


def test_refusals_are_public() -> None:
    assert issubclass(crossray.ArtifactError, crossray.InputError)
    assert issubclass(crossray.InputError, crossray.CrossrayError)


def test_types_ship_with_it() -> None:
    for package in ("crossray", "pipeline"):
        assert (ROOT / package / "py.typed").is_file()
