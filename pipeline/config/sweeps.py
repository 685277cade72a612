"""Sweeps: an entry of crosscoders with lists of settings, written out as one entry for each of their combinations.

    - name: batch_topk
      sparsity: {kind: batch_topk}
      num_latents: 4096
      sweep: {sparsity.k: [16, 32], seed: [0, 1, 2]}

becomes batch_topk-k16-seed0, batch_topk-k16-seed1 and so on, in the order of the file with the last list running
fastest. It happens to the tree of a file, before sections are made of it: everything behind sees plain entries, whose
places in errors, overrides and artifacts are their own names.
"""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import short, shortened

MAX_COMBINATIONS = 64
"""Of one entry. All crosscoders of a run are fitted together, so each of them takes memory for the whole fit."""
_LISTS = ("crosscoders", "recipes")
_FIXED = ("name", "kind", "sweep", "seeds", "power")
"""Keys that say what is asked of a crosscoder, not how it is fitted."""


def with_sweeps(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every sweep written out; raises ValueError for one that makes no sense."""
    written = dict(tree)
    for name in _LISTS:
        entries = written.get(name)
        if isinstance(entries, list):
            written[name] = [one for place, entry in enumerate(entries) for one in _combinations(entry, name, place)]
    return written


def _combinations(entry: Any, owner: str, place: int) -> list[Any]:
    sweep = entry.get("sweep") if isinstance(entry, dict) else None
    if sweep is None:
        return [entry]
    where = f"{owner}.{shortened(str(entry.get('name', place)))}.sweep"
    if not isinstance(sweep, Mapping) or not sweep:
        raise ValueError(
            f"{where}: expected keys of the crosscoder with lists of values, such as {{sparsity.k: [16, 32]}}, got "
            f"{short(sweep)}"
        )
    lists = [_values(where, key, values) for key, values in sweep.items()]
    count = math.prod(map(len, lists))
    if count > MAX_COMBINATIONS:
        raise ValueError(
            f"{where}: expected at most {MAX_COMBINATIONS} combinations, got {count}; shorten the lists, or divide "
            f"them among runs with one storage root"
        )
    return [_combined(entry, where, dict(zip(sweep, values, strict=True))) for values in itertools.product(*lists)]


def _values(where: str, key: Any, values: Any) -> list[Any]:
    if str(key).split(".")[0] in _FIXED:
        raise ValueError(f"{where}: expected keys that decide the fit, got {short(key)}, which does not; leave it out")
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}.{key}: expected a list of values, got {short(values)}")
    if any(isinstance(value, (dict, list)) for value in values):
        raise ValueError(f"{where}.{key}: expected a list of plain values, got {short(values)}; sweep its keys instead")
    if len({_spelled(value) for value in values}) < len(values):
        raise ValueError(f"{where}.{key}: expected different values, got {short(values)}")
    return values


def _combined(entry: Mapping[str, Any], where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with one value for each key, and with their names in its own."""
    made = copy.deepcopy({key: value for key, value in entry.items() if key != "sweep"})
    parts = [str(entry.get("name", ""))]
    for key, value in values.items():
        *sections, last = str(key).split(".")
        node = made
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"{where}.{key}: expected {section} to be a section, got {short(node)}")
        node[last] = value
        parts.append(_spelled(value) if isinstance(value, str) else f"{last}{_spelled(value)}")
    made["name"] = "-".join(parts)
    return made


def _spelled(value: Any) -> str:
    """A value as part of a name: 16, 0.0003, 1e-05, null."""
    return "null" if value is None else str(value).lower().replace("+", "")
