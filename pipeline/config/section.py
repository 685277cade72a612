"""The base class of every section of a run file, and the types that sections share.

Sections are frozen and strict, and document each field below it. They check numbers; they read no files. What no field
may hold is refused here, in one place: numbers that are none (inf, nan, true) or that 64 bits cannot hold; texts that
are absurdly long or hold characters that neither a path nor a terminal takes; secrets, since all values are recorded.
"""

import math
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import has_secret, redacted, short

MAX_NAME_LETTERS = 100
"""Names become parts of file names and of MLflow's keys, which have at most 250."""
_MAX_TEXT_LETTERS = 4096
_MAX_NUMBER = (1 << 63) - 1

Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=MAX_NAME_LETTERS)]


class FieldError(ValueError):
    """What is wrong with one field of a section."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Section(BaseModel):
    """Base class of all sections. Unknown keys fail, values cannot change, and the text under a field documents it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, value: Any) -> Any:
        """Raises FieldError for what no field takes; values of other sections are theirs to check."""
        for name, given in value.items() if isinstance(value, dict) else ():
            field = cls.model_fields.get(name) if isinstance(name, str) else None
            types = set() if field is None else _types_in(field.annotation)
            if not any(issubclass(one, BaseModel) for one in types):
                _check(str(name), given, types)
        return value

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and has_secret(text):
                raise ValueError(
                    f"expected a value without credentials, since it is recorded, got {redacted(text)!r}; put them "
                    "into the environment (MLFLOW_TRACKING_URI, AWS_* for s3, HF_TOKEN)"
                )
        return value


def _check(name: str, value: Any, types: set[Any]) -> None:
    takes_float, takes_bool = float in types, bool in types
    for one in _plain_in(value):
        if isinstance(one, bool):
            if (int in types or takes_float) and not takes_bool:
                raise FieldError(name, f"expected a number, got {str(one).lower()}")
        elif isinstance(one, int if takes_float else (int, float)) and _MAX_NUMBER < abs(one) < math.inf:
            raise FieldError(name, f"expected a number of at most 64 bits ({_MAX_NUMBER}), got {short(one)}")
        elif isinstance(one, str):
            _check_text(name, one)


def _check_text(name: str, text: str) -> None:
    """The text itself is not told: it may hold a secret."""
    if len(text) > _MAX_TEXT_LETTERS:
        raise FieldError(name, f"expected a text of at most {_MAX_TEXT_LETTERS:,} letters, got {len(text):,}")
    for place, letter in enumerate(text, 1):
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t":
            raise FieldError(name, f"expected a text without control characters, got {letter!r} as letter {place}")


def _plain_in(value: Any) -> Iterator[Any]:
    """A plain value, or those of a list or mapping of them."""
    if isinstance(value, (bool, int, float, str)):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (one for one in value if isinstance(one, (bool, int, float, str)))
    elif isinstance(value, dict):
        yield from (one for pair in value.items() for one in pair if isinstance(one, (bool, int, float, str)))


def _types_in(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(_types_in, inner)) if inner else {annotation} if isinstance(annotation, type) else set()
