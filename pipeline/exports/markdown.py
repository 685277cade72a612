"""Texts of a run inside Markdown and YAML: names, labels and tokens may hold anything and stay text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.formatting import visible

_MARKS = re.compile(r"([\\`*_{}\[\]()#+.!|<>&~$@:^\"])")
"""Letters that begin something in Markdown or HTML; a backslash before any of them makes it a letter."""


def plain(text: object) -> str:
    """The text on one line, with nothing that Markdown or HTML would act upon."""
    return _MARKS.sub(r"\\\1", visible(str(text)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def front_matter(values: Mapping[str, Any]) -> str:
    """The block of YAML that a hub reads at the top of a README.md."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False)}---\n"
