"""A logged crosscoder as MLflow loads it back: `mlflow.pyfunc.load_model(uri).predict(x)`.

MLflow imports this module by name and hands it the folder that was logged, so nothing is unpickled. A logged model
carries the files that this module needs (`copy_code`), because no package index has them. MLflow is not needed here.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from pipeline.numerics.crosscoder import Crosscoder

_PACKAGES = ("numpy", "safetensors", "torch")
"""Third-party packages that `predict` needs."""
_CODE = (
    "__init__.py",
    "errors.py",
    "schema.py",
    "numerics",
    "checkpoints",
    "tracking/__init__.py",
    "tracking/pyfunc.py",
)
"""What this module needs of the package: numerics and checkpoints import nothing else (tests/test_layers.py)."""


class Interface(NamedTuple):
    """What a model takes and gives."""

    example_BMD: np.ndarray
    """float32 rows: the mean of the training activations, and one standard deviation above it in every dimension."""
    num_latents: int
    """F."""


class _PyfuncCrosscoder:
    """What `mlflow.pyfunc.load_model` returns for a logged crosscoder: `predict(x)` gives dense codes [rows, F]."""

    def __init__(self, folder: Path) -> None:
        self.crosscoder = Crosscoder.from_pretrained(folder)

    def predict(self, model_input: np.ndarray, params: Mapping[str, Any] | None = None) -> np.ndarray:  # noqa: ARG002
        """Dense codes float32 [rows, F] of activations [rows, M, D] (or flattened to [rows, M * D])."""
        shape = (-1, self.crosscoder.num_models, self.crosscoder.activation_dim)
        x_BMD = torch.from_numpy(np.asarray(model_input, dtype=np.float32).reshape(shape))
        with torch.no_grad():
            codes_BF: np.ndarray = self.crosscoder.encode(x_BMD).to_dense().numpy()
        return codes_BF


def interface_of(folder: Path) -> Interface:
    """Shapes and an example from a crosscoder's folder; the weights themselves are not read."""
    with safe_open(str(folder / "model.safetensors"), framework="np") as file:
        _, F, _ = file.get_slice("decoder.weight").get_shape()
        mean_MD, std_MD = file.get_tensor("activation_mean"), file.get_tensor("activation_std")
    if np.isnan(mean_MD).any():  # of a crosscoder that was fitted on raw activations
        mean_MD, std_MD = np.zeros_like(mean_MD), np.ones_like(std_MD)
    return Interface(np.stack([mean_MD, mean_MD + std_MD]).astype(np.float32), int(F))


def requirements() -> list[str]:
    """Packages that a loaded model needs, in the versions of this process, as pip takes them from an index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]


def copy_code(folder: Path) -> Path:
    """Copy what this module needs of the package below `folder`; the copy."""
    package = Path(__file__).parent.parent
    target = folder / package.name
    for name in _CODE:
        source, copy = package / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    return target


def _load_pyfunc(path: str) -> _PyfuncCrosscoder:
    """Entry point that MLflow calls by name."""
    return _PyfuncCrosscoder(Path(path))
