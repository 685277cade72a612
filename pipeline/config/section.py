"""The base class of every section of a run file, and the types that sections share.

Sections are frozen and strict, and document each field below it. They check numbers; they read no files. No value may
hold a secret, since all of them are recorded.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.redaction import has_secret, redacted

Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Section(BaseModel):
    """Base class of all sections. Unknown keys fail, values cannot change, and the text under a field documents it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

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
