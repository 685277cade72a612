"""What pydantic finds wrong with a run file, in the user's words: the key as the user wrote it, expected, got.

Places in lists are told by the `name` of the entry that stands there (crosscoders.l1), tags and members of unions are
left out, unknown keys name the nearest valid one, and long values are shortened.
"""

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.config.section import MAX_NAME_LETTERS, FieldError, Section
from pipeline.errors import short, shortened

_MAX_MESSAGE_LETTERS = 300
_NUM_CHOICES = 24
_VALID = "; valid: "
_WRITTEN = {"None": "null", "True": "true", "False": "false"}


def describe_faults(kind: type[Section], tree: Any, error: ValidationError) -> list[str]:
    """One text for each place where something is wrong, in the order of the file; the valid keys are listed once."""
    told: dict[str, list[str]] = {}
    faults = error.errors(include_url=False)
    inner = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    for fault in faults:
        if fault["type"] == "too_short" and fault["loc"] in inner:
            continue  # nothing is left of a list because something in it is wrong
        where, text = _describe(kind, tree, fault)
        own = told.setdefault(where, [])
        if text not in own:
            own.append(text)
    lines = [_joined(where, texts) for where, texts in told.items()]
    for place, line in enumerate(lines):
        head, mark, choices = line.partition(_VALID)
        if mark and any(other.endswith(mark + choices) for other in lines[:place]):
            lines[place] = head
    return lines


def nearest(word: str, choices: Sequence[str]) -> str:
    """A hint at the valid name that the user may have meant, or all of them."""
    close = difflib.get_close_matches(shortened(word), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {short(close[0])}?"
    return f"{_VALID}{', '.join(shortened(choice, 40) for choice in choices[:_NUM_CHOICES])}"


def _joined(where: str, texts: list[str]) -> str:
    """The members of a union each have their text; what came stands at the end of all of them."""
    heads = [text.partition(", got ")[0] for text in texts]
    tail = texts[-1].partition(", got ")[2]
    text = " or ".join(dict.fromkeys(heads)) + (f", got {tail}" if tail else "") if len(texts) > 1 else texts[0]
    return text if not where or text.startswith(where) else f"{where}: {text}"


def _describe(kind: type[Section], tree: Any, fault: Any) -> tuple[str, str]:
    """Where one fault is, and what was expected and what came there; the nearest key for an unknown one."""
    location, owner = _walk(kind, tree, fault)
    where = shortened(".".join(location), _MAX_MESSAGE_LETTERS)
    if fault["type"] == "extra_forbidden" and owner is not None:
        return where, f"unknown key{nearest(location[-1], list(owner.model_fields))}"
    if fault["type"] == "missing":
        return where, "expected a value, got none"
    if fault["type"] == "value_error":
        cause = fault["ctx"]["error"]
        field = f".{cause.field}" if isinstance(cause, FieldError) else ""
        return (where + field).removeprefix("."), shortened(str(cause), 2 * _MAX_MESSAGE_LETTERS)
    if fault["type"] == "union_tag_not_found":
        return f"{where}.kind", "expected the name of a variant, got none"
    if fault["type"] == "union_tag_invalid":
        return f"{where}.kind", f"expected one of {fault['ctx']['expected_tags']}, got {short(fault['ctx']['tag'])}"
    message = shortened(fault["msg"][0].lower() + fault["msg"][1:], _MAX_MESSAGE_LETTERS)
    value = fault["input"]
    quotes = "; put it into quotes if it is text" if fault["type"] == "string_type" and _is_plain(value) else ""
    written = _WRITTEN.get(short(value), short(value))
    return where, f"{message}, got {written}{quotes}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _walk(kind: type[Section], tree: Any, fault: Any) -> tuple[list[str], type[BaseModel] | None]:
    """The user's spelling of a pydantic location, and the section that holds its last part."""
    owner, node, names = kind, tree, []
    is_absent = fault["type"] in ("missing", "extra_forbidden")
    held: Any = owner
    for depth, part in enumerate(fault["loc"]):
        candidates = sections_in(held)
        is_field = any(part in section.model_fields for section in candidates)
        is_there = isinstance(node, dict) and part in node
        if isinstance(part, str) and not is_there and not (is_field or (is_absent and depth == len(fault["loc"]) - 1)):
            # A tag, or the member of a union of plain values.
            held = next((one for one in candidates if part in _kinds(one)), held)
            continue
        names.append(_name_of(node, part))
        node = _inside(node, part)
        if depth < len(fault["loc"]) - 1 and isinstance(part, str):
            held = next((one.model_fields[part].annotation for one in candidates if part in one.model_fields), None)
    holders = sections_in(held)
    return names, holders[0] if holders else None


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    """The tags that choose a section among others."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _name_of(node: Any, part: str | int) -> str:
    """A key, or the name of an entry of a list; its number where it has no usable name."""
    item = _inside(node, part) if isinstance(part, int) else None
    name = item.get("name") if isinstance(item, dict) else None
    return name if isinstance(name, str) and 0 < len(name) <= MAX_NAME_LETTERS and name.isprintable() else str(part)


def _inside(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """All section classes named in a type, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]
