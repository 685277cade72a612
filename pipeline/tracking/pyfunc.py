"""A logged crosscoder as MLflow loads it back: `mlflow.pyfunc.load_model(uri).predict(x)`.

MLflow imports this module by name and hands it the folder that was logged, so nothing is unpickled. MLflow is not
needed here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.numerics.crosscoder import Crosscoder


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


def _load_pyfunc(path: str) -> _PyfuncCrosscoder:
    """Entry point that MLflow calls by name."""
    return _PyfuncCrosscoder(Path(path))
