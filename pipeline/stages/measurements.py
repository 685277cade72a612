"""What the validation rows say of every latent: fidelity, Latent Scaling, templates, examples, planted truth.

Two passes over the validation shards, shared by all crosscoders and all missing steps. The first collects sums for the
latent table, the strongest places of each latent and the mean difference of the models; the second, which knows the
verdicts, collects contexts and scores planted labels. A worker call reads some shards once, encodes them with every
crosscoder and returns sums; the driver merges them, always in the same order.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from pipeline.analyses.activation_statistics import ActivationStatistics
from pipeline.analyses.controls import stated_error
from pipeline.analyses.examples import Examples
from pipeline.analyses.fidelity import Fidelity
from pipeline.analyses.latent_scaling import LatentScaling
from pipeline.analyses.latent_sets import latents_with
from pipeline.analyses.ownership import ownership_table
from pipeline.analyses.planted import MeanDifference, Planted
from pipeline.analyses.rows import (
    RowAnalysis,
    Sums,
    analyse,
    merge_all,
    sums_from_bytes,
    sums_to_bytes,
)
from pipeline.analyses.twins import Twins
from pipeline.analyses.verdict import artifact_frac, latent_table, verdict_counts, with_twins
from pipeline.config.analyses import ExamplesSection, LatentScalingSection, PlantedSection
from pipeline.errors import InputError
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.numerics.recipes import reads_difference
from pipeline.schema import (
    LATENT_COLUMNS,
    PLANTED_COLUMNS,
    TWIN_COLUMNS,
    Ownership,
    Split,
    Verdict,
    latent_corpus_columns,
)
from pipeline.stages import controls
from pipeline.stages.base import Context, Pool, Step, run_pool, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.encoded_rows import batches, shard_rows, validation_calls
from pipeline.stages.examples import EXAMPLE_SCHEMA, cut_contexts
from pipeline.stages.merging import MergeTree
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame, write_table
from pipeline.terminal import Progress

STAGES = ("latents", "examples", "planted", "controls")
VERSION = 4

LATENTS_NAME = "latents.parquet"
FIDELITY_NAME = "fidelity.json"
TWINS_NAME = "twins.parquet"
EXAMPLES_NAME = "examples.parquet"
PLANTED_NAME = "planted.parquet"
TWIN_SCHEMA = arrow_schema(TWIN_COLUMNS)
PLANTED_SCHEMA = arrow_schema(PLANTED_COLUMNS)


Questions = Mapping[str, Mapping[str, Any]]
"""Row analyses: by the crosscoder's folder, then by name."""


def run(steps: Sequence[Step], context: Context) -> None:
    """Publish the missing steps of all crosscoders."""
    started = time.monotonic()
    store = ActivationStore(context.storage, steps[0].inputs["activations"].key.folder)
    by_fit: dict[str, dict[str, Step]] = {}
    for step in steps:
        by_fit.setdefault(step.inputs["crosscoder"].key.folder, {})[step.key.stage] = step
    first = {folder: _first_questions(folder, own, store, context) for folder, own in by_fit.items()}
    sums = _pass("latents", first, store, context)
    for folder, own in by_fit.items():
        if "latents" in own:
            _publish_latents(own["latents"], sums[folder], first[folder], context, started)
    for folder, own in by_fit.items():
        if "controls" in own:
            analysis, random = first[folder].get("random"), sums[folder].get("random")
            controls.publish(own["controls"], analysis, random, _latents(context), context)
    started = time.monotonic()
    second = {
        folder: {"planted": _planted_question(own["planted"], sums[folder], first[folder], store, context)}
        for folder, own in by_fit.items()
        if "planted" in own
    }
    scored = _pass("planted", second, store, context)
    for folder, questions in second.items():
        _publish_planted(by_fit[folder]["planted"], questions["planted"], scored[folder]["planted"], context, started)
    for folder, own in by_fit.items():
        if "examples" in own:
            _publish_examples(own["examples"], first[folder]["examples"], sums[folder]["examples"], store, context)


def _latents(context: Context) -> Callable[[Step], pd.DataFrame]:
    """Reads the finished table of a step `latents`."""
    return lambda step: read_table(context.storage, f"{step.key.folder}/{LATENTS_NAME}").to_pandas()


def _first_questions(folder: str, own: Mapping[str, Step], store: ActivationStore, context: Context) -> dict[str, Any]:
    """What the missing steps of one crosscoder need of the first pass."""
    with fitted(context.storage, folder) as crosscoder:
        W_dec_FMD = crosscoder.W_dec_FMD.detach()
    num_latents, _, width = W_dec_FMD.shape
    if width != store.manifest.activation_dim:
        raise InputError(
            f"crosscoder {folder}: expected the activations' width {store.manifest.activation_dim}, got {width}; "
            "it belongs to another layer or pair"
        )
    corpora = store.manifest.corpora
    analyses: dict[str, Any] = {}
    if "latents" in own:
        section = own["latents"].section
        assert isinstance(section, LatentScalingSection)
        analyses |= verdict_analyses(crosscoder, section, corpora=corpora) | {"twins": Twins(W_dec_FMD=W_dec_FMD)}
    if "controls" in own:
        random = controls.random_scaling(own["controls"], crosscoder)
        analyses |= {} if random is None else {"random": random}
    if "examples" in own:
        examples = own["examples"].section
        assert isinstance(examples, ExamplesSection)
        check_example_latents(examples, num_latents)
        analyses["examples"] = Examples(
            num_latents=num_latents,
            num_contexts=examples.num_contexts,
            num_sampled=examples.num_sampled,
            corpora=corpora,
        )
    if "planted" in own:
        planted = own["planted"].section
        assert isinstance(planted, PlantedSection)
        analyses["mean_difference"] = MeanDifference(
            activation_dim=width, chat_corpora=_dialogue_corpora(store), first_tokens=planted.first_tokens
        )
    return analyses


def verdict_analyses(
    crosscoder: Crosscoder, section: LatentScalingSection, *, corpora: Sequence[str]
) -> dict[str, RowAnalysis]:
    """What the verdict takes from the rows, by name; `verdict_table` takes their tables."""
    num_latents = crosscoder.num_latents
    return {
        "fidelity": Fidelity(
            activation_dim=crosscoder.activation_dim,
            num_latents=num_latents,
            is_difference=reads_difference(crosscoder),
        ),
        "scaling": LatentScaling(
            crosscoder,
            num_groups=section.num_groups,
            num_resamples=section.num_resamples,
            seed=section.seed,
            thresholds=(section.nu_eps_threshold, section.nu_r_threshold),
        ),
        "templates": ActivationStatistics(num_latents=num_latents, corpora=corpora),
    }


def verdict_table(crosscoder: Crosscoder, tables: Mapping[str, Any], section: LatentScalingSection) -> pd.DataFrame:
    """The latent table, twins aside, from the tables of `verdict_analyses`."""
    return latent_table(
        ownership_table(W_enc_FMD=crosscoder.W_enc_FMD, W_dec_FMD=crosscoder.W_dec_FMD),
        tables["scaling"],
        tables["templates"],
        nu_eps_threshold=section.nu_eps_threshold,
        nu_r_threshold=section.nu_r_threshold,
        min_documents=section.min_documents,
    )


def _dialogue_corpora(store: ActivationStore) -> tuple[int, ...]:
    if not store.manifest.dialogue_corpora or not store.manifest.labels:
        raise InputError(
            "analyses.planted: expected a corpus of dialogues with planted labels, got labels "
            f"{list(store.manifest.labels)}; set analyses.planted to null"
        )
    return store.manifest.dialogue_corpora


def _pass(name: str, questions: Questions, store: ActivationStore, context: Context) -> dict[str, dict[str, Sums]]:
    """Sums of every question over all validation rows: by crosscoder, then by analysis."""
    found: dict[str, dict[str, Sums]] = {folder: {} for folder in questions}
    asked = {folder: own for folder, own in questions.items() if own}
    if not asked:
        return found
    calls = validation_calls(store)
    progress = Progress(f"measure {name}", store.manifest.num_rows(Split.VALIDATION), "rows")
    shown(context, progress, 0)
    merged = {folder: MergeTree(len(calls), partial(_both, own)) for folder, own in asked.items()}
    pool = Pool("analyses", context.resources.analyses, AnalyseShards, (context.storage, store.folder, asked))
    for result in run_pool(pool, calls):
        shown(context, progress, progress.done + result["num_rows"])
        for folder, packed in result["sums"].items():
            merged[folder].add(result["number"], {own: sums_from_bytes(data) for own, data in packed.items()})
    return found | {folder: tree.total() for folder, tree in merged.items()}


def _both(analyses: Mapping[str, RowAnalysis], a: dict[str, Sums], b: dict[str, Sums]) -> dict[str, Sums]:
    return merge_all(analyses, [a, b])


class AnalyseShards:
    """Worker: every crosscoder on some shards, each shard read once."""

    def __init__(
        self, storage: Storage, activations_folder: str, analyses: Mapping[str, Mapping[str, RowAnalysis]]
    ) -> None:
        self.store = ActivationStore(storage, activations_folder)
        self.analyses = analyses
        self.crosscoders = {}
        for folder in analyses:
            with fitted(storage, folder) as crosscoder:
                self.crosscoders[folder] = crosscoder

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Sums of every analysis as bytes."""
        num_rows = 0
        merged: dict[str, dict[str, Sums]] = {}
        for shard in item["shards"]:
            rows = shard_rows(self.store, shard)
            num_rows += shard.num_rows
            for folder, analyses in self.analyses.items():
                part = analyse(analyses, batches(self.crosscoders[folder], rows))
                merged[folder] = merge_all(analyses, [merged[folder], part]) if folder in merged else part
        packed = {folder: {name: sums_to_bytes(sums) for name, sums in own.items()} for folder, own in merged.items()}
        return {"number": item["number"], "num_rows": num_rows, "sums": packed}


def _publish_latents(
    step: Step, sums: Mapping[str, Sums], questions: Mapping[str, Any], context: Context, started: float
) -> None:
    section = step.section
    assert isinstance(section, LatentScalingSection)
    tables: dict[str, Any] = {
        name: questions[name].table(sums[name]) for name in ("fidelity", "scaling", "templates", "twins")
    }
    with fitted(context.storage, step.inputs["crosscoder"].key.folder) as crosscoder:
        table = with_twins(verdict_table(crosscoder, tables, section), tables["twins"])
    folder = step.key.folder
    columns = (*LATENT_COLUMNS, *latent_corpus_columns(questions["templates"].corpora))
    write_frame(context.storage, f"{folder}/{LATENTS_NAME}", table, arrow_schema(columns))
    write_frame(context.storage, f"{folder}/{TWINS_NAME}", tables["twins"], TWIN_SCHEMA)
    context.storage.write_json(f"{folder}/{FIDELITY_NAME}", tables["fidelity"])
    counts = {
        **{f"num_{name.replace(' ', '_').replace('-', '_')}": n for name, n in verdict_counts(table).items()},
        "num_latents": len(table),
        "num_chat_only": int((table["ownership"] == Ownership.CHAT_ONLY).sum()),
        "num_chat_specific_confident": int(((table["verdict"] == Verdict.CHAT_SPECIFIC) & table["is_confident"]).sum()),
        "artifact_frac": artifact_frac(table),
        "stated_false_discovery_rate": stated_error(table).rate,
        "num_twins": len(tables["twins"]),
        "fidelity": dict(tables["fidelity"]),
    }
    context.finish(step, counts, time.monotonic() - started)


def _planted_question(
    step: Step, sums: Mapping[str, Sums], first: Mapping[str, Any], store: ActivationStore, context: Context
) -> Planted:
    section = step.section
    assert isinstance(section, PlantedSection)
    mean_difference: MeanDifference = first["mean_difference"]
    return Planted(
        num_latents=context.record_of(step.inputs["crosscoder"]).counts["num_latents"],
        labels=store.manifest.labels,
        chat_corpora=_dialogue_corpora(store),
        mean_difference_D=mean_difference.direction(sums["mean_difference"]),
        num_resamples=section.num_resamples,
        seed=section.seed,
    )


def _publish_planted(step: Step, analysis: Planted, sums: Sums, context: Context, started: float) -> None:
    latents = _latents(context)(step.inputs["latents"])
    table = analysis.table(sums, latents_with(latents, [Verdict.CHAT_SPECIFIC]))
    write_frame(context.storage, f"{step.key.folder}/{PLANTED_NAME}", table, PLANTED_SCHEMA)
    counts = {"auroc": numbers_of(table, "auroc", by=("behavior", "candidate"))}
    context.finish(step, counts, time.monotonic() - started)


def _publish_examples(step: Step, analysis: Examples, sums: Sums, store: ActivationStore, context: Context) -> None:
    """Contexts of every latent, or of the chat-only ones, chat-specific first, and those named."""
    started = time.monotonic()
    section = step.section
    assert isinstance(section, ExamplesSection)
    latents = _latents(context)(step.inputs["latents"])
    if section.latents == "all":
        chosen = latents["latent"].tolist()
    else:
        chosen = latents_with(latents, [Verdict.CHAT_SPECIFIC])
        chosen += latents_with(latents, [*Verdict.ARTIFACTS, Verdict.UNDECIDED, Verdict.BASE_ONLY])
        chosen = list(dict.fromkeys([*chosen[: section.max_latents], *section.latents]))
    strongest = analysis.table_of(sums, chosen)
    table = cut_contexts(
        strongest,
        store,
        context,
        crosscoder=step.inputs["crosscoder"].key.folder,
        model=step.extra["loading"].locations[1],
        window_tokens=section.window_tokens,
    )
    write_table(context.storage, f"{step.key.folder}/{EXAMPLES_NAME}", table, EXAMPLE_SCHEMA)
    num_latents = int(strongest["latent"].nunique())
    # A latent that never fires has no context; how many were asked for in vain must not go unsaid.
    counts = {"num_contexts": len(table), "num_latents": num_latents, "num_silent_latents": len(chosen) - num_latents}
    context.finish(step, counts, time.monotonic() - started)


def check_example_latents(section: ExamplesSection, num_latents: int) -> None:
    """InputError before any row is read."""
    named = section.latents if isinstance(section.latents, tuple) else ()
    wrong = [latent for latent in named if latent >= num_latents]
    if wrong:
        raise InputError(
            f"analyses.examples.latents: expected latents between 0 and {num_latents - 1}, got {wrong[0]}; name such "
            "as every crosscoder of the run has"
        )
