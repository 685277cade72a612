"""Two finished runs side by side: their verdict tables, and the settings and inputs in which they differ."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.library.runs import Run
from pipeline.report.data import CrosscoderReport
from pipeline.report.formatting import DASH
from pipeline.report.verdict import verdict_table
from pipeline.storage.artifacts import differing_fields
from pipeline.terminal import text_table


class Comparison(NamedTuple):
    """What `crossray compare` prints."""

    table: Sequence[Sequence[str]]
    """The verdict table, header first: one column per crosscoder of the first run, then of the second."""
    differences: Sequence[str]
    """Settings that differ, each with both values: `activations.layer: 2 -> 3`."""

    @property
    def text(self) -> str:
        """Both for a terminal."""
        header, *rows = self.table
        told = self.differences or ["no setting differs"]
        return "\n".join([text_table(header, rows), "", *told])


def compare(a: Run, b: Run) -> Comparison:
    """The crosscoders of both runs in one table, and what differs in their settings, step by step.

    Raises InputError where both are the same run.
    """
    if (a.name, a.storage.root) == (b.name, b.storage.root):
        raise InputError(f"expected two runs, got {a.name!r} twice")
    tables = {f"{run.name}: {name}": run.latents(name) for run in (a, b) for name in run.crosscoders}
    crosscoders = [
        CrosscoderReport(name=name, kind="", latents=table, fidelity=table.attrs["fidelity"])
        for name, table in tables.items()
    ]
    first, second = a.settings(), b.settings()
    differences = [f"{role}: only in {a.name}" for role in first if role not in second]
    differences += [f"{role}: only in {b.name}" for role in second if role not in first]
    for role in first:
        if role in second:
            differences += differing_fields(first[role], second[role], role)
    return Comparison([[cell.replace(DASH, "-") for cell in row] for row in verdict_table(crosscoders)], differences)
