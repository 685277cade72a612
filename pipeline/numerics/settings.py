"""Settings as frozen dataclasses that check themselves, and the names that a setting may take.

A field's type says what it may be: a Literal its names, an Annotated number its Bounds. CrosscoderSpec and the
sparsities are such settings, and a run file's sections are built from the same fields (config/crosscoder.py), so a
default, a bound and its documentation stand once. Standard library alone: a run file is read without torch.
"""

import dataclasses
import math
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Inputs = Literal["both", "difference", "chat"]
"""What a dictionary is fitted on: the activations of all models at once, or x^chat - x^base."""
CodeWeight = Literal["crosscoder", "sae", "mixed", "none", "decoupled"]
"""What a latent costs: sum of the models' decoder norms; norm of all together; sae + 0.1 crosscoder; 1; per model."""
Reconstruction = Literal["l2", "mse"]
"""Mean unsquared L2 norm of the error per row and model; mean squared L2 norm."""
Precision = Literal["float32", "tf32", "bfloat16"]
"""Of matrix products over float32 weights. tf32 needs CUDA. bfloat16 rounds the factors of the encoder's product, on
any device (on CUDA its sums stay float32 and all other dense products run in TF32)."""
Dtype = Literal["float32", "float64"]
"""Of weights, gradients and Adam's moments; float64 is for tests."""
CODE_WEIGHTS: tuple[str, ...] = get_args(CodeWeight)


class Bounds(NamedTuple):
    """What a number may be; the names are those of a pydantic field."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """As a condition, for messages."""
        signs = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {limit:g}" for sign, limit in signs.items() if limit is not None)


PositiveInt = Annotated[int, Bounds(gt=0)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
DecayFloat = Annotated[float, Bounds(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers and names that are checked when they are put together."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first field whose value its type does not allow."""
        for name, annotation in field_types(type(self)).items():
            _check(name, getattr(self, name), annotation)


def field_types(kind: type[Settings]) -> dict[str, Any]:
    """The type of every field, with its bounds, in the order of the fields."""
    types = get_type_hints(kind, include_extras=True)
    return {field.name: types[field.name] for field in dataclasses.fields(kind)}


def _check(name: str, value: Any, annotation: Any) -> None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        check_choice(name, value, arguments)
    elif origin in (Union, UnionType):
        names = next((get_args(one) for one in arguments if get_origin(one) is Literal), ())
        if isinstance(value, str):
            check_choice(name, value, names)
        elif value is not None or type(None) not in arguments:
            _check(name, value, next(one for one in arguments if get_origin(one) is Annotated))
    elif origin is Annotated:
        kind, bounds = arguments
        if value is None or not bounds.hold(value):
            expected = f"{bounds} and finite" if kind is float else str(bounds)
            raise ValueError(f"expected {name} {expected}, got {value}: change {name} of the crosscoder")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError that names the choices if value is none of them."""
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, got {value!r}: use one of these names")
