"""What the views read of a run: columns, rows of one latent, weights, the models. Each is read when it is first wanted.

One `Explored` serves every visitor. It holds what is read, never what a visitor looks at. Both models are patched while
they run, so one caller at a time has them.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import InputError
from pipeline.explorer.sample import Sampler
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.library.runs import Run
from pipeline.schema import LATENT_COLUMNS


class Explored:
    """A finished run and, where they can be loaded, its models."""

    def __init__(self, run: Run, load_pair: Callable[[], Pair] | None, *, device: str = "cpu") -> None:
        """load_pair: called at most once, by the first view that needs the models. device: of the crosscoders."""
        self.run, self.device = run, device
        self._load_pair = load_pair
        self._models = threading.Lock()
        self._reading = threading.RLock()
        self._columns: dict[tuple[str, str], np.ndarray] = {}
        self._crosscoders: dict[str, Crosscoder] = {}
        self._samplers: dict[str, Sampler] = {}

    @property
    def has_models(self) -> bool:
        """Whether texts can be read and answers be given."""
        return self._load_pair is not None

    @cached_property
    def _pair(self) -> Pair:
        if self._load_pair is None:
            raise InputError(
                "models: expected the run's models, got a run without its run file; give `crossray explore` the file, "
                "or crossray.explore a pair"
            )
        return self._load_pair()

    @contextmanager
    def models(self) -> Iterator[Pair]:
        """The models, for one caller at a time."""
        with self._models:
            yield self._pair

    @property
    def tokenizer(self) -> Any:
        """The pair's tokenizer, which does not wait for whoever has the models."""
        if "_pair" not in self.__dict__:
            with self.models():
                pass
        return self._pair.tokenizer

    def warm_up(self) -> None:
        """Loads the models and the first crosscoder, and begins its sample, so that the first answer does not wait."""
        first = self.run.crosscoders[0]
        self.columns(first, ("verdict", "max_activation"))
        self.sampler(first)
        if self.has_models:
            with self.models():
                pass

    def crosscoder_name(self, name: str) -> str:
        """The name, or the run's first for an empty one; InputError for one that the run does not have."""
        if name and name not in self.run.crosscoders:
            raise InputError(f"crosscoder: expected one of {', '.join(self.run.crosscoders)}, got {name!r}")
        return name or self.run.crosscoders[0]

    def crosscoder(self, name: str) -> Crosscoder:
        """A crosscoder of the run, kept."""
        with self._reading:
            if name not in self._crosscoders:
                self._crosscoders[name] = self.run.crosscoder(name, device=self.device)
            return self._crosscoders[name]

    def columns(self, name: str, columns: Sequence[str]) -> pd.DataFrame:
        """Columns of the latent table, kept; only those that are not there yet are fetched."""
        with self._reading:
            missing = [column for column in columns if (name, column) not in self._columns]
            if missing:
                read = self.run.table("latents", name, columns=missing)
                self._columns |= {(name, column): read[column].to_numpy() for column in missing}
            return pd.DataFrame({column: self._columns[name, column] for column in columns})

    def column_names(self, name: str) -> list[str]:
        """Columns of the latent table: the schema's, and those for each corpus."""
        return self.run.column_names("latents", name)

    def sampler(self, name: str) -> Sampler:
        """The sample of validation rows of a crosscoder; begins when it is first asked for."""
        with self._reading:
            if name not in self._samplers:
                self._samplers[name] = Sampler(self.run.activation_store(), self.crosscoder(name))
            return self._samplers[name]


TEXT_COLUMNS = tuple(column.name for column in LATENT_COLUMNS if column.dtype == "string")
"""Columns of the latent table that hold texts."""
FLAG_COLUMNS = tuple(column.name for column in LATENT_COLUMNS if column.dtype == "bool")
