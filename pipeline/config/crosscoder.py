"""The crosscoders of a run: fitted on one shared read of the activations, or adopted from elsewhere.

The hyper-parameters of a fit and of its sparsity stand in numerics (spec.FitSettings and one dataclass per sparsity),
with bounds, defaults and documentation; the sections here are built from those fields. This file adds what only a run
file has: names, sizes relative to the activations, and the read of the rows.
"""

import ast
import functools
import inspect
import itertools
import operator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    Tag,
    create_model,
    model_validator,
)

from pipeline.config.section import Fraction, Name, Section
from pipeline.numerics.settings import Bounds, Precision, Settings, field_types
from pipeline.numerics.sparsities.base import Sparsity
from pipeline.numerics.sparsities.registry import SPARSITIES
from pipeline.numerics.spec import FitSettings, check_together

MAX_LATENTS = 100_000_000
"""Beyond any dictionary that was ever fitted: what is larger is a slip of the pen."""
MAX_EXPANSION = 100_000
MAX_BATCH_ROWS = 100_000_000
MAX_ROWS = 10**15


def field_docs(kind: type[Settings]) -> dict[str, str]:
    """The documentation that stands under every field of a settings dataclass, its bases' fields included."""
    docs, names = {}, {field.name for field in fields(kind)}
    for base in kind.__mro__:
        if names & inspect.get_annotations(base).keys():
            tree = ast.parse(Path(inspect.getfile(base)).read_text(encoding="utf-8"))
            own = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
            for field, below in itertools.pairwise(own.body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    docs[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return {name: text for name, text in docs.items() if name in names}


def section_fields(kind: type[Settings]) -> dict[str, Any]:
    """The fields of a settings dataclass as create_model takes them: types, bounds, defaults, documentation."""
    types, docs = field_types(kind), field_docs(kind)
    return {
        field.name: (
            _bounded(types[field.name]),
            Field(... if field.default is MISSING else field.default, description=docs[field.name]),
        )
        for field in fields(kind)
    }


def _bounded(annotation: Any) -> Any:
    """The type with pydantic's bounds in place of ours."""
    if get_origin(annotation) is Annotated:
        kind, bounds = get_args(annotation)
        assert isinstance(bounds, Bounds)
        return Annotated[kind, Field(**bounds._asdict())]
    if type(None) in get_args(annotation):
        return functools.reduce(operator.or_, map(_bounded, get_args(annotation)))
    return annotation


class SparsitySection(Section):
    """How codes are kept sparse; every sparsity adds the fields of its settings."""

    model_config = ConfigDict(use_attribute_docstrings=False)  # its fields bring theirs; a search for source is slow

    kind: str

    def settings(self) -> Sparsity:
        """The settings that training takes."""
        return SPARSITIES[self.kind](**self.model_dump(exclude={"kind"}))


def _section_of(kind: str, sparsity: type[Sparsity]) -> type[BaseModel]:
    tag: Any = (Literal[kind], ...)
    return create_model(
        f"{sparsity.__name__}Sparsity",
        __base__=SparsitySection,
        __doc__=sparsity.__doc__,
        __module__=__name__,
        **({"kind": tag} | section_fields(sparsity)),
    )


if TYPE_CHECKING:
    AnySparsity = SparsitySection
else:
    _sections = tuple(_section_of(kind, one) for kind, one in SPARSITIES.items())
    globals().update({section.__name__: section for section in _sections})  # pickle finds a class by its name
    AnySparsity = Annotated[Union[_sections], Field(discriminator="kind")]  # noqa: UP007 (as many as there are)


class PowerSection(Section):
    """Concepts of known strength to put into the chat model's rows: how many of them would the verdict find?"""

    strengths: tuple[PositiveFloat, ...] = Field((0.1, 0.2, 0.4, 0.8), min_length=1, max_length=16)
    """Mean norms, in multiples of the root mean square of the chat model's rows."""
    num_concepts: Annotated[int, Field(gt=0, le=4096)] = 32
    """In all; the strengths take turns."""
    frequency: Fraction = 0.005
    """Share of the rows on which each of them is present."""
    seed: NonNegativeInt = 0
    """Of their directions and rows."""


class _NamedCrosscoder(Section):
    kind: Literal["fitted"] = "fitted"
    name: Name
    """Name in tables, figures and MLflow."""
    sparsity: AnySparsity
    """What keeps the codes sparse."""
    num_latents: Annotated[int, Field(gt=0, le=MAX_LATENTS)] | None = None
    """Size F of the dictionary; give this or expansion."""
    expansion: Annotated[int, Field(gt=0, le=MAX_EXPANSION)] | None = None
    """F as a multiple of the activation width (32 in the paper)."""
    seeds: Annotated[int, Field(ge=1, le=64)] = 1
    """Fits of this crosscoder: with 3, two more are fitted from the same read of the rows, with the seeds that follow.
    Only their latent tables are made. The verdict then says how many of them find each chat-specific latent again."""
    sweep: dict[str, list[Any]] | None = None
    """Lists of settings, such as {sparsity.k: [16, 32], seed: [0, 1, 2]}: one crosscoder is fitted for each
    combination, all from the same read of the rows, named after its values (batch_topk-k16-seed0)."""
    init_from: str | None = None
    """Begin with the weights of a published crosscoder (a folder, also of another run, or a hub id) in place of random
    ones. It must have the same size, activation and inputs; its normalisation is kept, and neither the median of the
    first batch nor the seed plays a part."""
    power: PowerSection | None = None
    """Where set, one more crosscoder is fitted, on rows with planted concepts, and the controls say how many of them
    the verdict finds at each strength: what "nothing found" is worth. `power: {}` takes the defaults."""
    normalisation: Literal["per_model", "none"] = "per_model"
    """per_model: each model's rows with mean 0 and root mean square sqrt(width), so that a model whose residual stream
    is larger does not look as if its concepts were new. none: raw activations, as the paper's runs; the verdict is
    drawn in comparable units all the same."""


if TYPE_CHECKING:

    class _FittedCrosscoder(_NamedCrosscoder):
        seed: int  # read by name; the rest goes through settings()

else:
    _FittedCrosscoder = create_model(
        "_FittedCrosscoder", __base__=_NamedCrosscoder, __module__=__name__, **section_fields(FitSettings)
    )


class CrosscoderSection(_FittedCrosscoder):
    """One dictionary to fit; all crosscoders of a run are fitted from one read of the activations."""

    def settings(self) -> FitSettings:
        """The settings that training takes beside the sparsity's; raises ValueError where two of them disagree."""
        return FitSettings(**self.model_dump(include={field.name for field in fields(FitSettings)}))

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as JSON values; to rename a crosscoder or to ask more of it fits nothing anew."""
        unused = {"init_from"} if self.init_from is None else set()
        return self.model_dump(mode="json", exclude={"name", "kind", "seeds", "power", "sweep"} | unused)

    def further_seeds(self) -> tuple["CrosscoderSection", ...]:
        """The further fits that `seeds` asks for, each as a crosscoder of its own."""
        seeds = range(self.seed + 1, self.seed + self.seeds)
        alone: dict[str, Any] = {"seeds": 1, "power": None}
        return tuple(
            self.model_copy(update={"name": f"{self.name}.seed{seed}", "seed": seed} | alone) for seed in seeds
        )

    def injected(self) -> "InjectedCrosscoderSection | None":
        """The further fit that `power` asks for, as a crosscoder of its own."""
        if self.power is None:
            return None
        return InjectedCrosscoderSection.model_construct(**dict(self) | {"name": f"{self.name}.power", "seeds": 1})

    def replicas(self) -> tuple["CrosscoderSection", ...]:
        """All further fits."""
        injected = self.injected()
        return self.further_seeds() if injected is None else (*self.further_seeds(), injected)

    def differs_in_seed_alone(self, other: "CrosscoderSection | AdoptedCrosscoderSection") -> bool:
        """Whether the two would be the same fit with one seed."""
        if isinstance(other, AdoptedCrosscoderSection) or self.seed == other.seed:
            return False
        return self.identity() | {"seed": None} == other.identity() | {"seed": None}

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_sparsity(cls, value: Any) -> Any:
        """Writes the numbers in place of `auto`, so that identities and records hold them."""
        sparsity = value.get("sparsity") if isinstance(value, dict) else None
        kind = sparsity.get("kind") if isinstance(sparsity, dict) else getattr(sparsity, "kind", None)
        if not isinstance(kind, str) or kind not in SPARSITIES:
            return value
        own = {"init_norm": SPARSITIES[kind].default_init_norm, "clip_norm": SPARSITIES[kind].default_clip_norm}
        return value | {name: number for name, number in own.items() if value.get(name, "auto") == "auto"}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.num_latents is None) == (self.expansion is None):
            raise ValueError(
                f"crosscoder {self.name!r}: expected exactly one of num_latents and expansion, "
                f"got num_latents={self.num_latents} and expansion={self.expansion}"
            )
        return self

    @model_validator(mode="after")
    def _can_begin(self) -> Self:
        if self.sweep is not None:
            raise ValueError(f"crosscoder {self.name!r}: expected a sweep in the list of a file, got one elsewhere")
        if self.init_from is not None and self.seeds > 1:
            raise ValueError(
                f"crosscoder {self.name!r}: expected seeds = 1 with init_from, whose weights no seed changes, got "
                f"{self.seeds}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_fitted(self) -> Self:
        try:
            sparsity = self.sparsity.settings()
            check_together(self.settings(), sparsity)
            if self.num_latents is not None:
                sparsity.check_size(self.num_latents)
        except ValueError as error:
            raise ValueError(f"crosscoder {self.name!r}: {error}") from error
        return self


class InjectedCrosscoderSection(CrosscoderSection):
    """The fit that `power` asks for, on rows with planted concepts."""

    def identity(self) -> dict[str, Any]:
        """The planted concepts decide the weights too."""
        assert self.power is not None, "made of a section with it"
        return super().identity() | {"power": self.power.model_dump(mode="json")}


class AdoptedCrosscoderSection(Section):
    """Someone else's crosscoder of this pair and layer: it enters at the analyses, nothing is fitted."""

    kind: Literal["adopted"]
    name: Name
    """Name in tables, figures and MLflow."""
    source: str
    """Hub id (owner/name or owner/name/folder), local folder or weights file, in one of the published layouts."""
    revision: str | None = None
    """Commit or tag of a hub id; pin it, or the hub may change the result under an unchanged name."""
    activation_scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Factors of base and chat activations, for the layout cfg.json + cc_weights.pt, which does not hold them. None
    measures sqrt(activation_dim) / mean |x| on this run's rows, which is what such crosscoders were trained on."""


def _crosscoder_kind(value: Any) -> str:
    """An entry without `kind` is fitted: that is what nearly everyone writes."""
    return str(value.get("kind", "fitted") if isinstance(value, dict) else getattr(value, "kind", "fitted"))


CrosscoderEntry = Annotated[
    Annotated[CrosscoderSection, Tag("fitted")] | Annotated[AdoptedCrosscoderSection, Tag("adopted")],
    Discriminator(_crosscoder_kind),
]


class TrainingSection(Section):
    """The read of the activations that all crosscoders of the run share."""

    batch_rows: int = Field(2048, gt=0, le=MAX_BATCH_ROWS)
    """Rows per optimiser step over all workers together."""
    num_rows: int = Field(200_000_000, gt=0, le=MAX_ROWS)
    """Rows to train on; more than the store holds means several epochs."""
    shuffle_seed: NonNegativeInt = 0
    """Seed of the row order."""
    shuffle_buffer_rows: int = Field(200_000, gt=0, le=MAX_ROWS)
    """activations.mode stream only: rows from which batches are drawn, over all data ranks; more mix better and cost
    memory, rows x 2 models x width x 2 bytes."""
    precision: Precision = "float32"
    """Precision of the matrix products over float32 weights; the last two need a GPU."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps: as many whole batches as num_rows holds."""
        return self.num_rows // self.batch_rows
