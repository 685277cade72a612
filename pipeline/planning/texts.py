"""How much text a run has before it is tokenised: known of a generated pair, else sampled from corpus or sources.

A sample is the beginning of some files of each source, or some documents of each corpus, tokenised with the chat
model's tokenizer where that is on this machine; where it is not, a token is taken for CHARACTERS_PER_TOKEN characters.
Sources that are not on this machine are not asked.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.data import HubCorpus, JsonlCorpus, OrganismCorpus, ParquetCorpus, TextCorpus
from pipeline.config.run_file import RunConfig
from pipeline.planning.rates import CHARACTERS_PER_TOKEN, ORGANISM_TEXTS
from pipeline.schema import Flag

if TYPE_CHECKING:
    from pipeline.stages.catalogue import DataSteps
    from pipeline.storage.artifacts import Record
    from pipeline.storage.filesystem import Storage

_SAMPLED_DOCUMENTS = 200
"""Of each corpus, that are tokenised."""
_SAMPLED_FILES, _SAMPLED_BYTES, _SAMPLED_CHARACTERS = 8, 1 << 20, 4 << 20
"""Of each source: files, and the bytes and characters that end its reading, shared by its files."""
_ASSISTANT_SHARE = 0.5
"""Of the tokens of dialogues, where no sample tells."""


class TextSize(NamedTuple):
    """What one corpus holds before any mixing."""

    num_documents: float
    num_tokens: float
    is_dialogues: bool
    assistant_frac: float = _ASSISTANT_SHARE
    """Tokens that an assistant wrote, of all."""

    def taken(self, num_tokens: float) -> "TextSize":
        """The part of it that has so many tokens."""
        return self._replace(
            num_documents=self.num_documents * num_tokens / max(1.0, self.num_tokens), num_tokens=num_tokens
        )


class Columns(NamedTuple):
    """A sample of documents of one corpus, as columns of the corpus artifact."""

    columns: dict[str, list[Any]]
    num_documents: float
    """Of the whole corpus."""


def known_texts(config: RunConfig) -> dict[str, TextSize] | None:
    """Texts of a generated pair; None where a corpus is something else."""
    generated = [source for source in config.corpus.sources if isinstance(source, OrganismCorpus)]
    if len(generated) < len(config.corpus.sources):
        return None
    return {source.name: _of_organism(config, source) for source in generated}


def _of_organism(config: RunConfig, source: OrganismCorpus) -> TextSize:
    assert config.organism is not None, "a run file with such a source has an organism"
    return TextSize(*ORGANISM_TEXTS[config.organism.size][source.part], is_dialogues=source.part == "dialogues")


def texts_of_corpus(
    config: RunConfig, data: "DataSteps", corpus: "Record", storage: "Storage", tokenizer: Any
) -> dict[str, TextSize]:
    """Texts of the finished corpus, from some documents of each."""
    from pipeline.storage.tables import read_table

    totals = corpus.counts["num_documents"]
    samples: dict[str, dict[str, list[Any]]] = {name: {} for name in totals}
    for part in corpus.counts["parts"]:
        if all(_length(columns) >= _SAMPLED_DOCUMENTS for columns in samples.values()):
            break
        rows = read_table(storage, f"{data.corpus.folder}/{part}").slice(0, _SAMPLED_DOCUMENTS).to_pylist()
        for row in rows:
            for name, value in row.items():
                samples[row["corpus"]].setdefault(name, []).append(value)
    return {name: _tokenised(config, Columns(own, totals[name]), tokenizer) for name, own in samples.items()}


def texts_of_sources(config: RunConfig, tokenizer: Any) -> dict[str, TextSize] | None:
    """Texts of the sources of a run that has no corpus yet; None where one of them is not on this machine."""
    found = {}
    for source in config.corpus.sources:
        if isinstance(source, OrganismCorpus):
            found[source.name] = _of_organism(config, source)
            continue
        sample = None if isinstance(source, HubCorpus) else _sample(source)
        if sample is None:
            return None
        found[source.name] = _tokenised(config, sample, tokenizer)
    return found


def _sample(source: JsonlCorpus | ParquetCorpus | TextCorpus) -> Columns | None:
    """The beginnings of some files of a source; None where they are elsewhere.

    InputError where nothing in them can be used, as where a column's name is wrong.
    """
    from pipeline.text.documents import document_id, read_documents
    from pipeline.text.files import ReadShare, expand_paths
    from pipeline.text.unusable import Unusable

    paths = expand_paths(source.paths, f"corpus {source.name!r}: paths")
    sizes = {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}  # noqa: PTH113, PTH202
    if len(sizes) < len(paths):
        return None
    chosen = paths[:: max(1, len(paths) // _SAMPLED_FILES)][:_SAMPLED_FILES]
    columns: dict[str, list[Any]] = {name: [] for name in ("doc_id", "corpus", "split", "text", "messages")}
    seen: set[int] = set()
    unusable: Counter[str] = Counter()
    examples: dict[str, str] = {}
    num_read = 0.0
    settings = source.model_dump(mode="json")
    for path in chosen:
        share, num_characters, num_kept = ReadShare(), 0, 0
        for document in read_documents(path, settings, share):
            if document.unusable:
                unusable[document.reason] += 1
                examples.setdefault(document.reason, document.unusable)
            if not document.reason and (doc_id := document_id(document)) not in seen:
                seen.add(doc_id)
                num_kept += 1
                num_characters += document.num_characters
                if num_kept <= max(1, _SAMPLED_DOCUMENTS // len(chosen)):
                    row = (doc_id, source.name, "", document.text, document.messages)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
            read = share.of()
            if max(read * sizes[path] / _SAMPLED_BYTES, num_characters / _SAMPLED_CHARACTERS) * len(chosen) >= 1:
                break
        else:
            read = 1.0
        num_read += sizes[path] * read
    if not seen:
        Unusable({source.name: unusable}, {source.name: examples}, {source.name: unusable.total()}).check(1.0)
    num_documents = len(seen) * sum(sizes.values()) / max(1.0, num_read)
    return Columns(columns, num_documents if source.max_documents is None else min(source.max_documents, num_documents))


def _tokenised(config: RunConfig, sample: Columns, tokenizer: Any) -> TextSize:
    """The size of a corpus from a sample of it."""
    columns, num_sampled, longest = sample.columns, _length(sample.columns), config.tokens.max_tokens_per_document
    if not num_sampled:
        return TextSize(0.0, 0.0, is_dialogues=False)
    is_dialogues = any(messages is not None for messages in columns["messages"])
    if tokenizer is None:
        lengths = [min(longest, _characters(*row) / CHARACTERS_PER_TOKEN.value) for row in _texts(columns)]
        return TextSize(sample.num_documents, sample.num_documents * sum(lengths) / num_sampled, is_dialogues)
    from pipeline.text.tokenise import Tokenise

    own = {name: column[:_SAMPLED_DOCUMENTS] for name, column in columns.items()}
    rows = Tokenise(tokenizer, max_tokens=longest, dialogues=config.tokens.dialogues)(own)
    kept = [flags for flags in rows["flags"] if len(flags)]
    counted = Counter(
        {
            "read": sum(int((flags & Flag.HISTORY == 0).sum()) for flags in kept),
            "assistant": sum(int((flags & (Flag.HISTORY | Flag.ASSISTANT) == Flag.ASSISTANT).sum()) for flags in kept),
        }
    )
    scale = sample.num_documents / min(num_sampled, _SAMPLED_DOCUMENTS)
    frac = counted["assistant"] / max(1, counted["read"])
    return TextSize(scale * len(kept), scale * counted["read"], is_dialogues, frac)


def _length(columns: Mapping[str, Sequence[Any]]) -> int:
    return len(columns.get("doc_id", ()))


def _texts(columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, Any]]:
    return zip(columns["text"], columns["messages"], strict=True)


def _characters(text: str | None, messages: str | None) -> int:
    return len(text if text is not None else messages or "")
