"""The run file: loading, overrides and errors that name the nearest valid key.

`load(path, overrides)` gives a frozen `RunConfig` or raises one InputError. A preset fills what the file leaves open.
Overrides are applied to the resolved tree, not to the YAML, so that `--set crosscoders.l1.sparsity.mu=0.02` works
whether or not the file mentions the key. No file inheritance, no interpolation, no environment variables. Needs only
pydantic and yaml.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from pipeline.config.analyses import AnalysesSection
from pipeline.config.crosscoder import CrosscoderEntry, CrosscoderSection, TrainingSection
from pipeline.config.data import (
    ActivationsSection,
    CorpusSection,
    ModelsSection,
    OrganismSection,
    TokensSection,
)
from pipeline.config.faults import describe_faults, nearest
from pipeline.config.presets import PresetName, with_preset
from pipeline.config.resources import ResourcesSection, StorageSection, TrackingSection
from pipeline.config.section import Name, Section
from pipeline.config.sweeps import with_sweeps
from pipeline.config.yaml_file import YamlError, parse_yaml
from pipeline.errors import InputError, first_line, short, shortened

Config = TypeVar("Config", bound=Section)

_NUM_FAULTS_TOLD = 5
_MAX_PLACE_DIGITS = 7
_MAX_NAME_PARTS = 12


class RunConfig(Section):
    """One run: two models, text, crosscoders and what is asked of them."""

    name: Name
    """Name of the run in tables, in MLflow and in the report."""
    preset: PresetName | None = None
    """Family of the models: fills what the file leaves open (config/presets.py); null fills nothing."""
    organism: OrganismSection | None = None
    """A generated model pair, if the run uses one."""
    models: ModelsSection
    """The pair that is compared."""
    corpus: CorpusSection
    """The texts."""
    tokens: TokensSection = TokensSection()
    """How text becomes token ids."""
    activations: ActivationsSection
    """Which rows of which layer are kept."""
    training: TrainingSection = TrainingSection()
    """The read of the activations."""
    crosscoders: tuple[CrosscoderEntry, ...] = Field(min_length=1)
    """The dictionaries to fit or to adopt."""
    analyses: AnalysesSection = AnalysesSection()
    """What is asked of each of them."""
    resources: ResourcesSection = ResourcesSection()
    """How: machines."""
    storage: StorageSection = StorageSection()
    """How: places."""
    tracking: TrackingSection = TrackingSection()
    """How: logging."""

    @property
    def replicas(self) -> tuple[CrosscoderSection, ...]:
        """The further seeds of the crosscoders that are fitted."""
        fitted = [section for section in self.crosscoders if isinstance(section, CrosscoderSection)]
        return tuple(replica for section in fitted for replica in section.replicas())

    @property
    def fitted(self) -> tuple[CrosscoderSection, ...]:
        """Every fit, further seeds included."""
        own = [section for section in self.crosscoders if isinstance(section, CrosscoderSection)]
        return (*own, *self.replicas)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [crosscoder.name for crosscoder in (*self.crosscoders, *self.replicas)]
        if len(set(names)) < len(names):
            raise ValueError(f"crosscoders: expected distinct names, got {names}")
        self._check_fits_differ()
        kinds = [self.models.base.kind, self.models.chat.kind, *(source.kind for source in self.corpus.sources)]
        if "organism" in kinds and self.organism is None:
            raise ValueError(
                "organism: expected a section, since models or corpora have kind 'organism'; add `organism: {}`"
            )
        self._check_ranks()
        if self.replicas and self.analyses.controls is None:
            raise ValueError(
                "crosscoders: expected analyses.controls, which compares the seeds, since seeds is above 1, got null"
            )
        if self.training.num_rows < self.training.batch_rows:
            raise ValueError(
                f"training.num_rows: expected at least one batch of training.batch_rows = {self.training.batch_rows}, "
                f"got {self.training.num_rows}"
            )
        return self

    def _check_fits_differ(self) -> None:
        """Two fits with the same settings are one artifact under two names."""
        known: list[tuple[dict[str, Any], str]] = []
        for fit in self.fitted:
            own = fit.identity()
            first = next((name for identity, name in known if identity == own), fit.name)
            known.append((own, fit.name))
            if first != fit.name:
                raise ValueError(f"crosscoders.{fit.name}: expected other settings than those of {first}, got the same")

    def _check_ranks(self) -> None:
        """Global batches are cut into equal slices, whatever the number of ranks that are there."""
        training, most = self.resources.training, self.resources.training.data
        least = training.min_data or most
        if least > most:
            raise ValueError(f"resources.training.min_data: expected at most data = {most}, got {least}")
        if training.min_data is not None and (training.latent > 1 or self.activations.mode == "stream"):
            raise ValueError(
                "resources.training.min_data: expected latent = 1 and activations.mode = store (other ranks cannot go "
                f"on alone), got latent = {training.latent} and mode = {self.activations.mode}"
            )
        for ranks in range(least, most + 1):
            if self.training.batch_rows % ranks:
                raise ValueError(
                    f"training.batch_rows: expected a multiple of {ranks}, since resources.training asks for "
                    f"{ranks} data workers{'' if least == most else ' at times'}, got {self.training.batch_rows}"
                )


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a YAML file, with `a.b=c` overrides applied; raises InputError with one line per fault."""
    return load_as(RunConfig, path, overrides)


def load_as(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The same for another kind of file whose sections are checked like a run's (a benchmark)."""
    tree = read_tree(path)
    presets = [override for override in overrides if override.partition("=")[0] == "preset"]
    for override in presets:  # before the rest: it decides the values that the file leaves open
        tree.setdefault("preset", None)
        _apply(tree, override)
    config = validated(kind, with_preset(tree), str(path))
    if not overrides:
        return config
    resolved = config.model_dump(mode="json")
    for override in overrides:
        _apply(resolved, override)
    return validated(kind, resolved, f"{path} with --set {shortened(' '.join(overrides), 200)}")


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file as they stand there; raises InputError where there is no such mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a run file, got {short(str(path))}: {first_line(error)}") from error
    try:
        tree = parse_yaml(text)
    except YamlError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def validated(kind: type[Config], tree: dict[str, Any], where: str) -> Config:
    """The sections of a tree; raises InputError with one line that names `where` and every fault."""
    try:
        tree = with_sweeps(tree)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = describe_faults(kind, tree, error)
        told = faults[:_NUM_FAULTS_TOLD] + (
            [f"and {len(faults) - _NUM_FAULTS_TOLD} more"] if faults[_NUM_FAULTS_TOLD:] else []
        )
        raise InputError(f"{where}: {'; '.join(told)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set: expected key=value such as training.num_rows=100000, got {short(override)}")
    parts = key.split(".")
    node: Any = tree
    depth = 0
    while True:
        index, num_parts = _find(node, parts[depth:])
        if index is None:
            at, rest = shortened(".".join(parts[:depth])) or "the run file", shortened(".".join(parts[depth:]))
            if not isinstance(node, (dict, list)):
                came = "null" if node is None else short(node)
                raise InputError(
                    f"--set {shortened(override)}: expected {at} to be a section, got {came}; give it as a whole, such "
                    f"as {at}={{{rest}: ...}}"
                )
            part = parts[depth]
            raise InputError(f"--set {shortened(override)}: {at} has no {short(part)}{nearest(part, _choices(node))}")
        depth += num_parts
        if depth == len(parts):
            break
        node = node[index]
    try:
        node[index] = parse_yaml(text)
    except YamlError as error:
        raise InputError(f"--set {shortened(override)}: expected a YAML value: {error}") from error


def _find(node: Any, parts: Sequence[str]) -> tuple[Any, int]:
    """Key or index of what the first parts name, and how many they are: names may hold dots. (None, 0) for nothing."""
    for num_parts in range(min(len(parts), _MAX_NAME_PARTS), 0, -1):
        index = _position(node, ".".join(parts[:num_parts]))
        if index is not None:
            return index, num_parts
    return None, 0


def _position(node: Any, part: str) -> Any:
    """Key or index of `part` in a mapping or list, else None; a list's item is found by its name, else by its place."""
    if isinstance(node, dict):
        return part if part in node else next((key for key in node if str(key) == part), None)
    if isinstance(node, list):
        named = (i for i, item in enumerate(node) if isinstance(item, dict) and item.get("name") == part)
        is_place = part.isascii() and part.isdecimal() and len(part) < _MAX_PLACE_DIGITS and int(part) < len(node)
        return next(named, int(part) if is_place else None)
    return None


def _choices(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [str(key) for key in node]
    if isinstance(node, list):
        return [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    return []
