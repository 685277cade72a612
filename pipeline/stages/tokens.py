"""Documents become token ids that both models read, each token with its speaker, template and label bits.

One worker call tokenises one part of the corpus. Afterwards the driver takes the token budget per corpus in the order
of the documents' hashes (a random order that does not depend on files) and publishes an index of what is used. The
record counts what truncation cut, what the mixing left unused, which corpus ran out and why documents were dropped.

Tokens of earlier turns in the document of one answer (schema.Flag.HISTORY) do not count for budget and mixing: they are
context that has its rows in another document.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.cluster.pools import Pool, run_pool
from pipeline.config.data import TokensSection
from pipeline.errors import InputError
from pipeline.models.loading import check_used_ids, load_tokenizer
from pipeline.schema import INDEX_COLUMNS, Flag
from pipeline.stages.catalogue import TokensInputs
from pipeline.stages.locations import ModelLocation
from pipeline.stages.models import local_specs
from pipeline.stages.step import StageContext, Step
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import TOKEN_SCHEMA, arrow_schema, read_table, write_table
from pipeline.terminal import Progress
from pipeline.text.conversations import conversation_of
from pipeline.text.mixing import tokens_to_take
from pipeline.text.tokenise import CUT, Tokenise, split_dropped
from pipeline.text.tokenizers import check_vocabularies, tokenizer_hash
from pipeline.text.unusable import Unusable

INDEX_NAME = "index.parquet"
INDEX_SCHEMA = arrow_schema(INDEX_COLUMNS)


class TokenisedPart(NamedTuple):
    """What the index and the record take from one part."""

    part: str
    """Its file, in the corpus and in the tokens."""
    num_read: int
    """Documents of the corpus; the arrays and lists below have one entry per document that has tokens."""
    doc_id: np.ndarray
    """int64."""
    corpus: list[str]
    split: list[str]
    num_tokens: np.ndarray
    """int32."""
    num_history: np.ndarray
    """Tokens of earlier turns, int32."""
    num_cut: np.ndarray
    """Tokens that truncation cut, int64."""
    num_bos: int
    """Documents that begin with BOS."""
    used_ids: np.ndarray
    """Token ids that occur, each once, ascending."""
    dropped: dict[str, dict[str, int]]
    """Documents left out, by corpus and reason."""
    examples: dict[str, dict[str, str]]
    """What was wrong with the first of them."""


def run(steps: Sequence[Step[TokensInputs]], context: StageContext) -> None:
    """Tokenise every part, check that both vocabularies agree on what is used, publish the index."""
    (step,) = steps
    inputs, section = step.inputs, step.inputs.section
    started = time.monotonic()
    corpus = context.record_of(inputs.corpus)
    labels = corpus.counts["labels"]
    arguments = (context.storage, inputs.corpus.folder, step.folder, inputs.models.chat, section, labels)
    tokenised = run_pool(Pool("tokens", context.resources.tokens, TokenisePart, arguments), corpus.counts["parts"])
    progress = Progress(TokensInputs.NAME, sum(corpus.counts["num_documents"].values()), "documents")
    results = sorted(context.follow(progress, tokenised, lambda part: part.num_read), key=lambda result: result.part)
    with local_specs(context.storage, *inputs.models) as specs:
        base, chat = (load_tokenizer(spec) for spec in specs)
        used = np.unique(np.concatenate([result.used_ids for result in results]))
        check_used_ids(specs, (base, chat), used.tolist())
        check_vocabularies(base, chat, used, [old for spec in specs for old, _ in spec.token_replacements])
        hashed = tokenizer_hash(chat)
    num_read = corpus.counts["num_documents"]
    dropped = dropped_of(results, inputs.weights)
    refused = {name: {why: n for why, n in reasons.items() if why != CUT} for name, reasons in dropped.items()}
    unusable = Unusable(refused, examples_of(results), num_read)
    for line in unusable.remarks(TokensInputs.NAME):
        context.reporter.message(line)
    unusable.check(inputs.corpus.inputs.section.max_unusable_frac)
    everything = _index_of(results)
    index = select(everything, inputs.weights, section.num_tokens, mixing=section.mixing)
    write_table(context.storage, f"{step.folder}/{INDEX_NAME}", index, INDEX_SCHEMA)
    mix = describe_mix(everything, index, inputs.weights)
    if mix["ran_out"] or mix["is_off_weight"]:
        context.reporter.message(_mix_text(mix, section))
    divided = divided_of(results, inputs.weights)
    for name, own in divided.items():
        if own["num_documents"]:
            context.reporter.message(
                f"tokens: the chat template rewrites earlier turns, so {own['num_dialogues']:,} dialogues of corpus "
                f"{name!r} became {own['num_documents']:,} documents, one per answer (tokens.dialogues: "
                f"{section.dialogues})"
            )
    counts = {
        "labels": labels,
        "dialogue_corpora": corpus.counts["dialogue_corpora"],
        "dropped": dropped,
        "divided": divided,
        "truncated": truncated_of(results, inputs.weights),
        "tokenizer": hashed,
        "has_bos": sum(result.num_bos for result in results) == everything.num_rows,
        **mix,
        **count_tokens(index),
    }
    context.finish(step, counts, time.monotonic() - started)


class TokenisePart:
    """Worker: one part of the corpus to one part of tokens."""

    def __init__(
        self,
        storage: Storage,
        corpus_folder: str,
        folder: str,
        chat: ModelLocation,
        section: TokensSection,
        labels: Sequence[str],
    ) -> None:
        self.storage, self.corpus_folder, self.folder = storage, corpus_folder, folder
        with local_specs(storage, chat) as (spec,):
            tokenizer = load_tokenizer(spec)
        self.tokenise = Tokenise(
            tokenizer, max_tokens=section.max_tokens_per_document, labels=labels, dialogues=section.dialogues
        )

    def __call__(self, part: str) -> TokenisedPart:
        """Publish the part; return what the index needs."""
        corpus = read_table(self.storage, f"{self.corpus_folder}/{part}")
        tokenised = self.tokenise(corpus.to_pydict())
        examples: dict[str, dict[str, str]] = {}
        for name, reason, detail in zip(tokenised["corpus"], tokenised["dropped"], tokenised["detail"], strict=True):
            if reason and detail:
                examples.setdefault(name, {}).setdefault(reason, detail)
        rows, dropped = split_dropped(tokenised)
        write_table(self.storage, f"{self.folder}/{part}", rows, TOKEN_SCHEMA)
        ids = rows["input_ids"]
        return TokenisedPart(
            part,
            corpus.num_rows,
            doc_id=np.asarray(rows["doc_id"], dtype=np.int64),
            corpus=list(rows["corpus"]),
            split=list(rows["split"]),
            num_tokens=np.asarray([len(row) for row in ids], dtype=np.int32),
            num_history=np.asarray([int((row & Flag.HISTORY != 0).sum()) for row in rows["flags"]], dtype=np.int32),
            num_cut=np.asarray(rows["num_cut"], dtype=np.int64),
            num_bos=sum(int(len(flags) and flags[0] & Flag.BOS != 0) for flags in rows["flags"]),
            used_ids=np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int32),
            dropped={name: dict(reasons) for name, reasons in dropped.items()},
            examples=examples,
        )


def dropped_of(results: Sequence[TokenisedPart], names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Per corpus: documents left out, by reason."""
    dropped: dict[str, Counter[str]] = {name: Counter() for name in names}
    for result in results:
        for name, reasons in result.dropped.items():
            dropped[name].update(reasons)
    return {name: dict(reasons) for name, reasons in dropped.items()}


def examples_of(results: Sequence[TokenisedPart]) -> dict[str, dict[str, str]]:
    """Per corpus and reason: what was wrong with the first document left out."""
    examples: dict[str, dict[str, str]] = {}
    for result in results:
        for name, own in result.examples.items():
            examples[name] = {**own, **examples.get(name, {})}
    return examples


def divided_of(results: Sequence[TokenisedPart], names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Per corpus: dialogues that became one document per answer, and those documents."""
    documents: dict[str, list[int]] = {name: [] for name in names}
    for result in results:
        for name, doc_id in zip(result.corpus, result.doc_id.tolist(), strict=True):
            if doc_id < 0:
                documents[name].append(doc_id)
    return {
        name: {"num_dialogues": len({conversation_of(doc_id) for doc_id in ids}), "num_documents": len(ids)}
        for name, ids in documents.items()
    }


def truncated_of(results: Sequence[TokenisedPart], names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Per corpus: documents that were cut at the longest length allowed, and the tokens cut off."""
    truncated = {name: {"num_documents": 0, "num_tokens": 0} for name in names}
    for result in results:
        for name, num_cut in zip(result.corpus, result.num_cut.tolist(), strict=True):
            truncated[name]["num_documents"] += num_cut > 0
            truncated[name]["num_tokens"] += num_cut
    return truncated


def _index_of(results: Sequence[TokenisedPart]) -> pa.Table:
    """One row per document of all parts."""
    columns = {
        "doc_id": np.concatenate([result.doc_id for result in results]),
        "corpus": [name for result in results for name in result.corpus],
        "split": [name for result in results for name in result.split],
        "num_tokens": np.concatenate([result.num_tokens for result in results]),
        "num_history": np.concatenate([result.num_history for result in results]),
        "part": [result.part for result in results for _ in result.doc_id],
        "row": np.concatenate([np.arange(len(result.doc_id), dtype=np.int32) for result in results]),
    }
    return pa.table(columns).cast(INDEX_SCHEMA)


def select(
    index: pa.Table, weights: Mapping[str, float], num_tokens: int | None, *, mixing: str = "by_weight"
) -> pa.Table:
    """The documents that are used, mixed evenly: each corpus gives its share of tokens, in order of its hashes.

    A share (text/mixing.py) is met to within one document. The answers of one dialogue follow each other.
    """
    corpora = np.asarray(index["corpus"].to_pylist(), dtype=object)
    doc_ids = index["doc_id"].to_numpy()
    lengths = _new_tokens(index)
    rows_of: dict[str, np.ndarray] = {}
    for name in weights:
        rows = np.flatnonzero(corpora == name)
        if not len(rows):
            raise InputError(
                f"corpus {name!r}: expected at least one document after tokenising, got none; "
                "check its text, the chat template and tokens.max_tokens_per_document"
            )
        turn = np.where(doc_ids[rows] < 0, ~doc_ids[rows], 0)
        rows_of[name] = rows[np.lexsort((turn, conversation_of(doc_ids[rows])))]
    have = {name: int(lengths[rows].sum()) for name, rows in rows_of.items()}
    take = tokens_to_take(have, weights, num_tokens, mixing=mixing)
    kept: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for name, rows in rows_of.items():
        fitting = int(np.searchsorted(np.cumsum(lengths[rows]), take[name] * (1 + 1e-12), side="right"))
        taken = rows[: max(1, fitting)]
        kept.append(taken)
        places.append((np.arange(len(taken)) + 0.5) / len(taken))
    order = np.argsort(np.concatenate(places), kind="stable")
    return index.take(np.concatenate(kept)[order])


def describe_mix(everything: pa.Table, used: pa.Table, weights: Mapping[str, float]) -> dict[str, Any]:
    """What the mixing did: per corpus its share of the tokens, the tokens left unused, and who ran out.

    is_off_weight: some share misses its weight by more than 1% of all tokens.
    """
    have, took = tokens_per_corpus(everything), tokens_per_corpus(used)
    total, total_weight = sum(took.values()), sum(weights.values())
    share = {name: took[name] / total for name in weights}
    return {
        "share": share,
        "is_off_weight": any(abs(share[name] - weight / total_weight) > 0.01 for name, weight in weights.items()),
        "unused_tokens": {name: have[name] - took[name] for name in weights},
        "ran_out": [name for name in weights if have[name] == took[name]] if have != took else [],
    }


def tokens_per_corpus(index: pa.Table) -> dict[str, int]:
    """Tokens of each corpus of an index, without those of earlier turns."""
    totals: Counter[str] = Counter()
    for name, length in zip(index["corpus"].to_pylist(), _new_tokens(index).tolist(), strict=True):
        totals[name] += length
    return dict(totals)


def _new_tokens(index: pa.Table) -> np.ndarray:
    """int64 per document: its tokens without those of earlier turns."""
    counted: np.ndarray = index["num_tokens"].to_numpy().astype(np.int64) - index["num_history"].to_numpy()
    return counted


def _mix_text(mix: Mapping[str, Any], section: TokensSection) -> str:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in mix["share"].items())
    unused = ", ".join(f"{count:,} of {name}" for name, count in mix["unused_tokens"].items() if count)
    ran_out = f"{' and '.join(mix['ran_out'])} ran out, " if mix["ran_out"] else ""
    return f"tokens: {ran_out}used: {shares} (tokens.mixing: {section.mixing}); tokens left over: {unused or 'none'}"


def count_tokens(index: pa.Table) -> dict[str, Any]:
    """Documents and tokens in use, in all and per corpus and split."""
    lengths = index["num_tokens"].to_numpy()
    corpora = index["corpus"].to_pylist()
    splits = index["split"].to_pylist()
    per_part: Counter[str] = Counter()
    for corpus, split, length in zip(corpora, splits, lengths.tolist(), strict=True):
        per_part[f"{corpus}/{split}"] += length
    return {
        "num_documents": index.num_rows,
        "num_tokens": int(lengths.sum()),
        "num_history": int(index["num_history"].to_numpy().sum()),
        "tokens": dict(sorted(per_part.items())),
        "longest_document_tokens": int(lengths.max()),
    }
