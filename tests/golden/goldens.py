"""The golden numbers: how they are computed, stored, compared and tied to the changelog.

Three CSV files beside this one hold loss curves in float32 and float64 and the verdict of every latent of a planted
benchmark. `make golden` computes them anew; test_golden.py compares. The tolerances leave room for the rounding of
another processor and for nothing else: on processors with AVX2 or AVX-512 all numbers were equal bit for bit.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipeline.config.run_file import load_as
from pipeline.planted.settings import BenchmarkConfig
from tests.golden.curves import curves
from tests.planted.conftest import made

FOLDER = Path(__file__).parent


class Golden(NamedTuple):
    """One file of golden numbers."""

    name: str
    keys: tuple[str, ...]
    """Columns that name a row."""
    rtol: float
    atol: float
    digits: int
    """Significant digits in the file."""
    max_outside: int = 0
    """How many numbers may lie outside the tolerance. A latent that fires in a few documents only is ill-conditioned:
    without AVX, 3 of 2,240 numbers moved by more than one percent. Words must agree everywhere."""

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.csv"

    def read(self) -> pd.DataFrame:
        """The stored table, indexed by its keys."""
        return pd.read_csv(self.path, keep_default_na=False, na_values=["nan"]).set_index(list(self.keys))

    def write(self, table: pd.DataFrame) -> None:
        """Store a table that is indexed by the keys."""
        table.to_csv(self.path, float_format=f"%.{self.digits}g", na_rep="nan", lineterminator="\n")


FLOAT32 = Golden("curves_float32", ("case", "step"), rtol=2e-5, atol=1e-6, digits=9)
FLOAT64 = Golden("curves_float64", ("case", "step"), rtol=2e-6, atol=2e-7, digits=17)
VERDICTS = Golden("verdicts", ("recipe", "latent"), rtol=1e-2, atol=1e-3, digits=9, max_outside=6)
ALL = (FLOAT32, FLOAT64, VERDICTS)

VERDICT_COLUMNS = [
    *("ownership", "verdict", "delta_norm", "decoder_norm_base", "decoder_norm_chat", "frequency", "mean_activation"),
    *("nu_eps", "nu_r", "nu_act_centred"),
]


def compute(golden: Golden, folder: Path) -> pd.DataFrame:
    """The table as this code computes it; files of the planted benchmark go to `folder`."""
    if golden is VERDICTS:
        return _verdicts(folder)
    return curves(golden.name.removeprefix("curves_"))


def _verdicts(folder: Path) -> pd.DataFrame:
    benchmark = made(load_as(BenchmarkConfig, FOLDER / "planted.yaml", [f"storage.root={folder}"]))
    tables = {
        trial.name: pd.read_parquet(folder / trial.key.folder / "latents.parquet").set_index("latent")[VERDICT_COLUMNS]
        for trial in benchmark.trials
    }
    return pd.concat(tables, names=["recipe"])


def differences(golden: Golden, stored: pd.DataFrame, computed: pd.DataFrame) -> pd.DataFrame:
    """One row for every value that differs by more than the tolerance: keys, column, stored, computed, difference."""
    assert list(stored.columns) == list(computed.columns), (list(stored.columns), list(computed.columns))
    assert stored.index.tolist() == computed.index.tolist(), "other rows"
    found = []
    for column in stored:
        old, new = stored[column], computed[column]
        if pd.api.types.is_numeric_dtype(old):
            distance = (new - old).abs()
            is_same = (distance <= golden.atol + golden.rtol * old.abs()) | (old.isna() & new.isna())
        else:
            distance, is_same = pd.Series(float("nan"), old.index), old.astype(str) == new.astype(str)
        own = pd.DataFrame({"column": column, "stored": old, "computed": new, "difference": distance}, dtype=object)
        found.append(own[~is_same])
    return pd.concat(found)


def is_equal(golden: Golden, found: pd.DataFrame) -> bool:
    """Whether these differences are within what the golden numbers allow: no other word, few numbers."""
    return bool(found["difference"].notna().all()) and len(found) <= golden.max_outside


def digest() -> str:
    """Of all golden files together, as the changelog names it."""
    sums = hashlib.sha256()
    for golden in ALL:
        sums.update(golden.path.read_bytes())
    return sums.hexdigest()[:12]
