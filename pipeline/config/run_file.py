"""The run file: loading, overrides and errors that name the nearest valid key.

`load(path, overrides)` gives a frozen `RunConfig` or raises one InputError. A preset fills what the file leaves open.
Overrides are applied to the resolved tree, not to the YAML, so that `--set crosscoders.l1.sparsity.mu=0.02` works
whether or not the file mentions the key. No file inheritance, no interpolation, no environment variables. Needs only
pydantic and yaml.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.config.analyses import AnalysesSection
from pipeline.config.crosscoder import CrosscoderEntry, CrosscoderSection, TrainingSection
from pipeline.config.data import (
    ActivationsSection,
    CorpusSection,
    ModelsSection,
    OrganismSection,
    TokensSection,
)
from pipeline.config.presets import PresetName, with_preset
from pipeline.config.resources import ResourcesSection, StorageSection, TrackingSection
from pipeline.config.section import Name, Section
from pipeline.errors import InputError


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1 and reads 1e-4 as a string; this loader reads it as a number."""


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


Config = TypeVar("Config", bound=Section)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml12Loader)


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
        known: dict[str, str] = {}
        for fit in self.fitted:
            first = known.setdefault(fit.model_dump_json(exclude={"name", "seeds"}), fit.name)
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
    return validated(kind, resolved, f"{path} with --set {' '.join(overrides)}")


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file as they stand there; raises InputError where there is no such mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a run file, got {str(path)!r}: {error}") from error
    try:
        tree = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def validated(kind: type[Config], tree: dict[str, Any], where: str) -> Config:
    """The sections of a tree; raises InputError with one line that names `where` and every fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = [_describe(kind, fault) for fault in error.errors(include_url=False)]
        raise InputError(f"{where}: {'; '.join(faults)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set: expected key=value such as training.num_rows=100000, got {override!r}")
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        index = _position(node, part)
        if index is None:
            at = ".".join(parts[:depth]) or "the run file"
            raise InputError(f"--set {override}: {at} has no {part!r}{_nearest(part, _choices(node))}")
        if depth == len(parts) - 1:
            try:
                node[index] = _parse_yaml(text)
            except yaml.YAMLError as error:
                raise InputError(f"--set {override}: expected a YAML value, got {text!r}") from error
        else:
            node = node[index]


def _position(node: Any, part: str) -> Any:
    """Key or index of `part` in a mapping or list (list items are found by number or by their name), else None."""
    if isinstance(node, dict):
        return part if part in node else None
    if isinstance(node, list):
        if part.isdigit():
            return int(part) if int(part) < len(node) else None
        return next((i for i, item in enumerate(node) if isinstance(item, dict) and item.get("name") == part), None)
    return None


def _choices(node: Any) -> list[str]:
    if isinstance(node, dict):
        return list(node)
    if isinstance(node, list):
        return [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    return []


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(choices)}"


def _describe(kind: type[Section], fault: Any) -> str:
    """One pydantic fault as: where, what was expected, what came; the nearest key for an unknown one."""
    location, owner = _walk(kind, fault["loc"])
    where = ".".join(location)
    if fault["type"] == "extra_forbidden" and owner is not None:
        return f"{where}: unknown key{_nearest(location[-1], list(owner.model_fields))}"
    if fault["type"] == "missing":
        return f"{where}: expected a value, got none"
    if fault["type"] == "value_error":
        text = str(fault["ctx"]["error"])
        return text if not where or text.startswith(where) else f"{where}: {text}"
    if fault["type"] == "union_tag_not_found":
        return f"{where}.kind: expected the name of a variant, got none"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{where}: {message}, got {fault['input']!r}"


_UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")
"""What pydantic puts into a location for a member of a union of plain values."""


def _walk(kind: type[Section], loc: Sequence[str | int]) -> tuple[list[str], type[BaseModel] | None]:
    """The user's spelling of a pydantic location (union tags left out) and the section that holds its last part."""
    owner: Any = kind
    names: list[str] = []
    for depth, part in enumerate(loc):
        candidates = _sections_in(owner)
        tagged = [
            c for c in candidates if "kind" in c.model_fields and part in get_args(c.model_fields["kind"].annotation)
        ]
        if (
            tagged
            and (len(candidates) > 1 or depth + 1 < len(loc))
            and not any(part in c.model_fields for c in candidates)
        ):
            owner = tagged[0]
            continue
        if isinstance(part, str) and _UNION_MEMBER.fullmatch(part):
            continue
        names.append(str(part))
        if depth == len(loc) - 1:
            break
        if isinstance(part, str):
            held = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
            owner = held[0] if held else None
    holders = _sections_in(owner)
    return names, holders[0] if holders else None


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """All section classes named in a type, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]
