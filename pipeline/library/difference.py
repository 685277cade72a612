"""Whether two models can be told apart at all, on texts of a notebook: what a verdict about latents rests on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from pipeline.analyses.evidence import Evidence
from pipeline.analyses.next_tokens import next_token_batches
from pipeline.extraction.activations import RowOptions
from pipeline.library.origin import Origin
from pipeline.models.pair import ModelPair


class Difference(NamedTuple):
    """How different two models are; the numbers of a run's evidence."""

    is_distinguishable: bool
    """False where their next tokens differ no more than by rounding: then nothing is new in the chat model."""
    reason: str
    """One or two sentences with the numbers."""
    table: pd.DataFrame
    """KL of the next tokens in nats and how often the likeliest one differs, with intervals over documents."""
    streams: pd.DataFrame
    """How different the streams at the layer are: as they are, after the best scale and shift, cosine, rank."""
    origin: Origin


def measured_difference(
    pair: ModelPair, documents: Mapping[str, Sequence[Any]], options: RowOptions, origin: Origin
) -> Difference:
    """The evidence on token rows."""
    evidence = Evidence(corpora=tuple(dict.fromkeys(documents["corpus"])), activation_dim=pair.activation_dim)
    sums = evidence.start()
    for batch in next_token_batches(pair, documents, options):
        evidence.update(sums, batch)
    dtype = str(pair.decoders[1].base.dtype).removeprefix("torch.")
    distance, streams = evidence.tables(sums, dtype=dtype)
    return Difference(distance.is_distinguishable, distance.reason, distance.table, streams, origin)
