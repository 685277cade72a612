"""The identity of documents that hold one answer of a dialogue, and the conversation that they belong to.

A dialogue whose template rewrites earlier turns becomes several documents (text/turns.py). Each has a doc_id of its
own, made from the dialogue's; the split is the dialogue's. Whatever resamples or divides documents does so by
`conversation_of`, so that the answers of one dialogue stay together.
"""

from typing import Any, TypeVar

TURN_BITS = 10
"""Bits of a turn's number in the doc_id of a document that holds one answer of its dialogue."""


def turn_id(dialogue_id: int, turn: int) -> int:
    """The doc_id of one answer of a dialogue: negative, distinct for each turn, and it tells the conversation."""
    return ~((dialogue_id >> TURN_BITS << TURN_BITS) | turn)


_DocId = TypeVar("_DocId", bound=Any)


def conversation_of(doc_id: _DocId) -> _DocId:
    """The same number for all documents of a dialogue, and doc_id itself for any other document.

    doc_id: int, or an int64 array or tensor. Resampling and halves divide conversations, never the turns of one.
    """
    sign = doc_id >> 63  # -1 for the documents of one answer, else 0
    folded: _DocId = (doc_id ^ sign) & ~(sign & ((1 << TURN_BITS) - 1))
    return folded
