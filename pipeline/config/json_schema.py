"""JSON schemas: of run files and benchmark files for editors, and of what the command line prints for programs.

`crossray schema` prints them; docs/schema/ holds what it prints.
"""

import json
from typing import Any

from pydantic import BaseModel

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = "crossray.schema.json"
"""Written beside a run file by `crossray init`."""
_NUMBERS = ("integer", "number")
_WITH_UNDERSCORES = r"^[+-]?[0-9]+(_[0-9]+)+(\.[0-9]+)?$"


def header(path: str) -> str:
    """The first line of a YAML file by which editors find its schema, at a path relative to the file or a URL."""
    return f"# yaml-language-server: $schema={path}"


def schema_text(kind: type[BaseModel], *, is_yaml: bool = True) -> str:
    """The schema as JSON, always in the same order.

    is_yaml: whether people write such files as YAML. Editors read YAML 1.2, in which 100_000_000 is a text, so such a
    text may stand wherever a number may.
    """
    schema = kind.model_json_schema(mode="validation" if is_yaml else "serialization")
    shown = {"$schema": DIALECT, "title": kind.__name__, **_tidied(schema, is_yaml=is_yaml)}
    return json.dumps(shown, indent=1, ensure_ascii=False) + "\n"


def _tidied(node: Any, *, is_yaml: bool, is_named: bool = False) -> Any:
    """Without pydantic's titles; texts in one line; numbers as they may be written.

    is_named: whether the keys of this mapping are names of the user's, which may be `title` too.
    """
    if isinstance(node, list):
        return [_tidied(item, is_yaml=is_yaml) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _tidied(value, is_yaml=is_yaml, is_named=key in ("properties", "$defs"))
        for key, value in node.items()
        if is_named or (key not in ("title", "discriminator") and not (key == "default" and value is None))
    }
    if is_named:
        return kept
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    if is_yaml and kept.get("type") in _NUMBERS:
        kept |= {"type": [kept["type"], "string"], "pattern": _WITH_UNDERSCORES}
    return kept
