"""Quarantine of documents that cannot become rows, so that one of them does not end a run.

A document goes to quarantine if its token ids cannot be read, if the forward pass fails on it, or if it gives NaN or
Inf. A call of the extraction in which all goes well costs nothing more. Only where it fails are documents run apart:
those that gave bad rows each alone, or halves of halves until the failing ones stand alone; then the remaining
documents are run together once more. Which documents are in quarantine, and the rows of the others, depend on the
documents alone.

Failures that no document causes are raised unchanged: a refused input, exhausted memory, a broken device. A failure
that shows only when documents run together is refused too, because no document can be blamed for it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import CrossrayError, InputError
from pipeline.extraction.activations import ActivationRows

_NUM_NAMED = 3
"""Documents that an error names; the rest are counted."""


class QuarantinedDocument(NamedTuple):
    """A document that gives no rows."""

    doc_id: int
    reason: str
    """What happened, as a phrase."""


class QuarantineResult(NamedTuple):
    """Rows of the documents that can be run, and the others."""

    rows: ActivationRows
    """In the order of the documents, without those in quarantine."""
    quarantined: tuple[QuarantinedDocument, ...]
    """In the order of the documents."""


Documents = Mapping[str, Sequence[Any]]
Extract = Callable[[Documents], ActivationRows]


def extract_with_quarantine(
    extract: Extract, documents: Documents, *, vocab_size: int, max_quarantined: int
) -> QuarantineResult:
    """`extract(documents)` without the documents that cannot be run.

    Raises InputError as soon as more than `max_quarantined` are found.
    """
    reasons = _unreadable(documents, vocab_size)
    while True:
        quarantined = [
            QuarantinedDocument(int(documents["doc_id"][place]), reasons[place]) for place in sorted(reasons)
        ]
        if len(quarantined) > max_quarantined:
            raise too_many_quarantined(quarantined, limit=max_quarantined)
        places = [place for place in range(len(documents["doc_id"])) if place not in reasons]
        outcome = _attempt(extract, documents, places)
        suspects = _suspects(outcome, documents, places)
        if isinstance(outcome, ActivationRows) and not suspects:
            return QuarantineResult(outcome, tuple(quarantined))
        found: dict[int, str] = {}
        for group in suspects:
            _isolate(extract, documents, group, found, limit=max_quarantined - len(reasons))
        if not found:
            raise InputError(
                f"expected documents that can be run together, got {_symptom(outcome)} in a batch of {len(places)} "
                "documents of which each alone, or in smaller batches, is fine; lower activations.tokens_per_batch or "
                "use models.dtype: float32"
            )
        reasons |= found


def too_many_quarantined(quarantined: Sequence[QuarantinedDocument], *, limit: int) -> InputError:
    """The error of a run with more documents in quarantine than allowed; names the first ones."""
    named = "; ".join(f"document {item.doc_id}: {item.reason}" for item in quarantined[:_NUM_NAMED])
    return InputError(
        f"activations.max_rejected_frac: expected at most {limit} documents that cannot be run, got {len(quarantined)} "
        f"so far ({named}); mend or remove them, use models.dtype: bfloat16 or float32 where they overflow, or raise "
        "the limit"
    )


def _unreadable(documents: Documents, vocab_size: int) -> dict[int, str]:
    """Places of documents whose ids no model can read: found before the forward pass, which they could break."""
    reasons: dict[int, str] = {}
    for place, (ids, flags) in enumerate(zip(documents["input_ids"], documents["flags"], strict=True)):
        if ids is None or flags is None or len(ids) != len(flags):
            have, flagged = (0 if column is None else len(column) for column in (ids, flags))
            reasons[place] = f"cannot be read: {have} token ids and {flagged} flags"
            continue
        row = np.asarray(ids)
        outside = row[(row < 0) | (row >= vocab_size)]
        if len(outside):
            reasons[place] = f"cannot be read: token id {int(outside[0])} is outside the vocabulary of {vocab_size}"
    return reasons


def _attempt(extract: Extract, documents: Documents, places: Sequence[int]) -> ActivationRows | Exception:
    """Rows of some documents, or the failure that may be a document's fault."""
    try:
        return extract({name: [column[place] for place in places] for name, column in documents.items()})
    except (CrossrayError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        return error


def _suspects(outcome: ActivationRows | Exception, documents: Documents, places: Sequence[int]) -> list[list[int]]:
    """Groups to run apart: documents with bad rows each alone, or both halves of what failed; none if all is well."""
    if isinstance(outcome, ActivationRows):
        bad = set(outcome.doc_id_B[_is_bad(outcome)].tolist())
        return [[place] for place in places if int(documents["doc_id"][place]) in bad]
    middle = (len(places) + 1) // 2
    return [list(group) for group in (places[:middle], places[middle:]) if group]


def _isolate(extract: Extract, documents: Documents, places: Sequence[int], found: dict[int, str], limit: int) -> None:
    """Add the documents among `places` that fail alone to `found`; stops early once there are more than `limit`."""
    if len(found) > limit:
        return
    outcome = _attempt(extract, documents, places)
    suspects = _suspects(outcome, documents, places)
    if suspects and len(places) == 1:
        found[places[0]] = _symptom(outcome)
        return
    for group in suspects:
        _isolate(extract, documents, group, found, limit)


def _is_bad(rows: ActivationRows) -> torch.Tensor:
    is_bad_B: torch.Tensor = ~rows.x_BMD.flatten(1).isfinite().all(dim=1)
    return is_bad_B


def _symptom(outcome: ActivationRows | Exception) -> str:
    if isinstance(outcome, ActivationRows):
        bad = _is_bad(outcome).nonzero().flatten()
        first = int(outcome.position_B[bad[0]])
        return f"NaN or Inf in {len(bad)} of {len(outcome.x_BMD)} rows, first at position {first}"
    line = (str(outcome).strip().splitlines() or [""])[0]
    return f"the forward pass failed: {type(outcome).__name__}{': ' if line else ''}{line[:200]}"
