"""The base class of every section of a run file, and the types that sections share.

Sections are frozen and strict, and document each field below it. They check numbers; they read no files.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Section(BaseModel):
    """Base class of all sections. Unknown keys fail, values cannot change, and the text under a field documents it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
