"""YAML as its version 1.2 reads it, and refusals where a reader could take a value for another.

PyYAML follows version 1.1: `no` is false there, 42:40 is 2560, 010 is 8, 1e-4 is text, and of two equal keys the last
one wins. Here words are words (pydantic takes yes and no where a field wants true or false), a date is text, and equal
keys, numbers with leading zeros and numbers of hundreds of digits are errors that name their line. Underscores between
digits stay, since run files use them.
"""

import re
from typing import Any

import yaml

from pipeline.errors import short

_MAX_DIGITS = 400
"""Of a number; the largest float has 309 before its point."""
_INT = r"[-+]?(?:0o[0-7]+|0x[0-9a-fA-F]+|[0-9][0-9_]*)"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
_NAMED_FLOAT = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


class YamlError(ValueError):
    """What is wrong with a text, on one line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping; YamlError where two of its keys are equal."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise YamlError(f"line {line}: expected each key once, got {short(key.value)} again")
                seen.add((key.tag, key.value))
        return node


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "")
    where = f"line {node.start_mark.line + 1}"
    if len(text) > _MAX_DIGITS:
        raise YamlError(f"{where}: expected a number of at most {_MAX_DIGITS} digits, got {len(text)}: {short(text)}")
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        raise YamlError(
            f"{where}: expected a number without leading zeros, got {text}, which some read as octal; write "
            f"{int(text)}, 0o{text.lstrip('+-0') or '0'}, or '{text}' in quotes if it is text"
        )
    try:
        if node.tag.endswith(":int"):
            return int(text, 0)
        return float(re.sub(r"(?i)\.(?=inf|nan)", "", text))
    except ValueError as error:
        raise YamlError(f"{where}: expected a number, got {short(text)}") from error


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", f"{_NAMED_FLOAT}|{_FLOAT}", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def parse_yaml(text: str) -> Any:
    """The value of a text; YamlError says in one line what is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise YamlError("expected sections inside each other, got more levels than can be read") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{line}expected YAML, {error.problem or error.context}") from error
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # What PyYAML raises for a broken escape, tag or date.
        raise YamlError(f"expected YAML, got {type(error).__name__}: {' '.join(str(error).split())}") from error
