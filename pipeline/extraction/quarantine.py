"""Documents that cannot become rows are found and set aside, so that one of them does not end a run.

A document is poisonous if its token ids cannot be read, if the forward pass fails on it, or if it gives NaN or Inf. A
call of the extraction that goes well costs nothing more. Only where it fails are documents run apart: those that gave
bad rows each alone, or halves of halves until the failing ones stand alone; then the remaining documents are run
together once more. Which documents are set aside, and the rows of the others, depend on the documents alone.

What is not a document's fault goes through unchanged: a refused input, exhausted memory, a broken device. A fault that
shows only when documents run together is refused too, because no document can be blamed for it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import CrossrayError, InputError
from pipeline.extraction.activations import ActivationRows

_NAMED = 3
"""Documents that a refusal names; the rest are counted."""


class Rejected(NamedTuple):
    """A document that was set aside."""

    doc_id: int
    reason: str
    """What happened, as a phrase."""


class Screened(NamedTuple):
    """Rows of the documents that can be run, and the others."""

    rows: ActivationRows
    """In the order of the documents, without those set aside."""
    rejected: tuple[Rejected, ...]
    """In the order of the documents."""


Documents = Mapping[str, Sequence[Any]]
Extract = Callable[[Documents], ActivationRows]


def extract_screened(extract: Extract, documents: Documents, *, vocab_size: int, max_rejected: int) -> Screened:
    """`extract(documents)` without the poisonous ones.

    Raises InputError as soon as more than `max_rejected` are found.
    """
    reasons = _unreadable(documents, vocab_size)
    while True:
        _check_count(documents, reasons, max_rejected)
        places = [place for place in range(len(documents["doc_id"])) if place not in reasons]
        outcome = _attempt(extract, documents, places)
        if isinstance(outcome, ActivationRows):
            suspects = _places_with_bad_rows(outcome, documents)
            if not suspects:
                rejected = tuple(Rejected(int(documents["doc_id"][p]), reasons[p]) for p in sorted(reasons))
                return Screened(outcome, rejected)
            groups = [[place] for place in suspects]
            symptom = f"NaN or Inf in {len(suspects)} documents"
        else:
            middle = (len(places) + 1) // 2
            groups = [group for group in (places[:middle], places[middle:]) if group]
            symptom = _phrase(outcome)
        found: dict[int, str] = {}
        for group in groups:
            _isolate(extract, documents, group, found, limit=max_rejected - len(reasons))
        if not found:
            raise InputError(
                f"expected documents that can be run together, got {symptom} in a batch of {len(places)} documents "
                f"of which each alone, or in smaller batches, is fine; lower activations.tokens_per_batch or use "
                "models.dtype: float32"
            )
        reasons |= found


def refusal(rejected: Sequence[Rejected], *, limit: int) -> InputError:
    """The error of a run in which more documents than allowed were set aside; names the first ones."""
    named = "; ".join(f"document {item.doc_id}: {item.reason}" for item in rejected[:_NAMED])
    return InputError(
        f"activations.max_rejected_frac: expected at most {limit} documents that cannot be run, got {len(rejected)} "
        f"so far ({named}); mend or remove them, use models.dtype: bfloat16 or float32 where they overflow, or raise "
        "the limit"
    )


def _check_count(documents: Documents, reasons: Mapping[int, str], max_rejected: int) -> None:
    if len(reasons) > max_rejected:
        rejected = [Rejected(int(documents["doc_id"][place]), reasons[place]) for place in sorted(reasons)]
        raise refusal(rejected, limit=max_rejected)


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


def _isolate(extract: Extract, documents: Documents, places: Sequence[int], found: dict[int, str], limit: int) -> None:
    """Add the documents among `places` that fail alone to `found`; stops early once there are more than `limit`."""
    if len(found) > limit:
        return
    outcome = _attempt(extract, documents, places)
    if isinstance(outcome, ActivationRows):
        suspects = _places_with_bad_rows(outcome, documents)
        if not suspects:
            return
        if len(places) == 1:
            found[places[0]] = _where_not_finite(outcome)
            return
        groups = [[place] for place in suspects]
    else:
        if len(places) == 1:
            found[places[0]] = f"the forward pass failed: {_phrase(outcome)}"
            return
        middle = (len(places) + 1) // 2
        groups = [list(places[:middle]), list(places[middle:])]
    for group in groups:
        _isolate(extract, documents, group, found, limit)


def _attempt(extract: Extract, documents: Documents, places: Sequence[int]) -> ActivationRows | Exception:
    """Rows of some documents, or the failure that may be a document's fault."""
    try:
        return extract({name: [column[place] for place in places] for name, column in documents.items()})
    except (CrossrayError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        return error


def _places_with_bad_rows(rows: ActivationRows, documents: Documents) -> list[int]:
    bad_B = ~rows.x_BMD.flatten(1).isfinite().all(dim=1)
    bad = set(rows.doc_id_B[bad_B].tolist())
    return [place for place, doc_id in enumerate(documents["doc_id"]) if int(doc_id) in bad] if bad else []


def _where_not_finite(rows: ActivationRows) -> str:
    bad_B = ~rows.x_BMD.flatten(1).isfinite().all(dim=1)
    first = int(bad_B.nonzero()[0])
    return f"NaN or Inf in {int(bad_B.sum())} of {len(bad_B)} rows, first at position {int(rows.position_B[first])}"


def _phrase(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
