"""The first thing that a run does with its models: both halves of both, on a few tokens, in a worker of a later stage.

A pair whose architecture cannot be cut, or continued from the cut, is refused here, before any text is read. The pair
is loaded for this alone and not kept, since a worker process may be used again for other work.
"""

import logging
from typing import NamedTuple

from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.resources import ModelWorkersSection
from pipeline.models.direction_head import final_norm
from pipeline.models.layerwise import at_layer
from pipeline.models.pair import ModelPair
from pipeline.models.verification import Part, Verification, probe_documents, require_finite, require_plain_forward
from pipeline.stages.locations import Loading
from pipeline.stages.models import load_pair
from pipeline.storage.filesystem import Storage

_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a run needs of its pair."""

    parts: tuple[Part, ...]
    is_of_every_layer: bool = False
    """Whether the models will be cut at every layer; the middle one is tried."""
    reads_directions: bool = False
    """Whether directions will go through the models' final norms and unembeddings."""


def check(storage: Storage, loading: Loading, asked: Asked, *, name: str, section: ModelWorkersSection) -> Verification:
    """What a worker finds; InputError where the pair does not load or does not give what is asked.

    name: of the workers' section below `resources`.
    """
    (found,) = run_pool(Pool(name, section, CheckHalves, (storage, loading)), [asked])
    _log.info("halves of the models against the library's own forward: %s", found)
    return found


class CheckHalves:
    """Worker: loads the pair for one check."""

    def __init__(self, storage: Storage, loading: Loading) -> None:
        self.storage, self.loading = storage, loading

    def __call__(self, asked: Asked) -> Verification:
        """The differences, none of them larger than rounding explains."""
        is_lower_only = asked.parts == ("rows",) and not asked.reads_directions
        pair = load_pair(self.storage, self.loading, is_lower_only=is_lower_only)
        require_finite(pair)
        if asked.reads_directions:
            for decoder in pair.decoders:
                final_norm(decoder)
        if asked.is_of_every_layer:
            base, chat = (at_layer(own, own.num_layers // 2) for own in pair.decoders)
            pair = ModelPair(base, chat, pair.tokenizer)
        return require_plain_forward(pair, probe_documents(pair), asked.parts)
