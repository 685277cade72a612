"""The table of workloads.benchmarks.methods: means over organisms, with intervals over seeds, written into a page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints.export import replace_text
from pipeline.planted.score import mean_interval

START, END = "<!-- methods -->", "<!-- /methods -->"
CHANCE = 0.5
"""AUROC where nothing is called."""
CONTROLS = ("harmless", "untouched")
HEADER = (
    *("method", "called by", "called", "precision", "recall", "AUROC", "steered", "random"),
    *("L0", "FVE", "rows read", "seconds"),
)
TOKENS_ASKED = "tokens asked"
"""Column of methods that ask a language model; there only where one of them was run."""


def write_page(folder: Path, page: Path) -> None:
    """Puts the tables of all finished pairs of organism and seed between the page's marks."""
    rows = [row for path in sorted((folder / "cells").glob("*.json")) for row in json.loads(path.read_text())]
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    text = f"{before}{START}\n\n{tables(rows)}\n\n{END}{after}"
    replace_text(page, text)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the methods on organisms that were taught something, and what each called on the controls."""
    taught = [row for row in rows if row["organism"] not in CONTROLS]
    names = sorted({str(row["organism"]) for row in taught})
    seeds = sorted({int(row["seed"]) for row in taught})
    is_asked = any("tokens_asked" in row for row in taught)
    header = [*HEADER, TOKENS_ASKED] if is_asked else HEADER
    lines = [
        f"{len(names)} organisms ({', '.join(names)}), seeds {', '.join(map(str, seeds))}.",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    found = ["Share of the behaviours that are found, by organism:", "", _line(("method", "called by", *names))]
    found.append(_line(["---"] * (2 + len(names))))
    for method, rule in dict.fromkeys((str(row["method"]), str(row["rule"])) for row in taught):
        own = [row for row in taught if (row["method"], row["rule"]) == (method, rule)]
        asked = _mean([row.get("tokens_asked", 0) for row in own])
        tokens = [f"{asked:,.0f}" if asked else "-"] if is_asked else []
        lines.append(_line([method, rule, *_numbers(own), *tokens]))
        recalls = [_mean([row["recall"] for row in own if row["organism"] == name]) for name in names]
        found.append(_line([method, rule, *("-" if math.isnan(one) else f"{one:.2f}" for one in recalls)]))
    lines += ["", *found]
    controls = [row for row in rows if row["organism"] in CONTROLS]
    lines += ["", _line(("control", "method", "called by", "findings called, by seed")), _line(["---"] * 4)]
    for name, method, rule in dict.fromkeys((str(r["organism"]), str(r["method"]), str(r["rule"])) for r in controls):
        own = [row for row in controls if (row["organism"], row["method"], row["rule"]) == (name, method, rule)]
        lines.append(_line([name, method, rule, ", ".join(str(row["num_called"]) for row in own)]))
    return "\n".join(lines)


def _numbers(rows: Sequence[dict[str, Any]]) -> list[str]:
    fves, l0s = ([row[name] for row in rows if name in row] for name in ("fve", "l0"))
    moved = [own for row in rows for own in row.get("steering", {}).values()]
    aurocs = _by_seed(rows, lambda row: _mean([CHANCE if math.isnan(own) else own for own in row["auroc"].values()]))
    return [
        f"{_mean([row['num_called'] for row in rows]):.1f}",
        _interval(_by_seed(rows, lambda row: row["precision"])),
        _interval(_by_seed(rows, lambda row: row["recall"])),
        _interval(aurocs),
        _rates(moved, "latent"),
        _rates(moved, "random"),
        f"{_mean(l0s):.1f}" if l0s else "-",
        f"{_mean(fves):.2f}" if fves else "-",
        f"{_mean([row['rows_read'] for row in rows]):,.0f}",
        f"{_mean([row['seconds'] for row in rows]):.0f}",
    ]


def _by_seed(rows: Sequence[dict[str, Any]], value: Any) -> list[float]:
    """The mean over organisms of each seed; organisms on which nothing was called have no precision."""
    seeds = sorted({int(row["seed"]) for row in rows})
    return [_mean([own for row in rows if row["seed"] == seed if (own := value(row)) == own]) for seed in seeds]


def _interval(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values, [1] * len(values))
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _rates(moved: Sequence[dict[str, float]], control: str) -> str:
    """Mean change of the share of answers that show the behaviour."""
    changes = [own[control] - own["none"] for own in moved if control in own]
    return f"{_mean(changes):+.0%}" if changes else "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
