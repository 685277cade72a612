"""Explanations of latents by a language model, and how well each holds on contexts that it was not made from.

One step per crosscoder, after `examples`. Contexts are gathered first, by one task on the cluster, so that the user
reads the number of requests and their expected size before the first is sent. Then latents are asked about in parallel
(interviews.py); a killed run does not repeat a request that was answered. Requests leave only from the machine that
drives the run.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.analyses.autointerp import (
    MIN_QUIET_PER_CORPUS,
    Interpretation,
    InterpTask,
    QuietWindow,
    Sizes,
    accuracy_groups,
    choose_windows,
    interp_task,
    interpretation_numbers,
    interpretation_table,
    quiet_windows,
)
from pipeline.analyses.autointerp_columns import ANSWER_COLUMNS, AUTOINTERP_COLUMNS, InterpStatus
from pipeline.analyses.autointerp_prompts import Cost, cost_text
from pipeline.analyses.latent_sets import interpreted_latents
from pipeline.analyses.rows import encoded_batches
from pipeline.cluster.pools import run_task
from pipeline.config.analyses import AutointerpSection
from pipeline.config.resources import EndpointSection
from pipeline.errors import InputError
from pipeline.models.endpoint import Endpoint, EndpointOptions, read_key
from pipeline.models.loading import load_tokenizer
from pipeline.schema import Split
from pipeline.stages.catalogue import AutointerpInputs
from pipeline.stages.examples import EXAMPLES_NAME
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.interviews import Answers, Interview, control_all, interview_all, pending_cost
from pipeline.stages.latents import read_latents
from pipeline.stages.models import local_specs
from pipeline.stages.row_pass import shard_rows
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, numbers_of, read_table, write_frame
from pipeline.terminal import Progress
from pipeline.text.tokenizers import token_texts

TABLE_NAME = "autointerp.parquet"
ANSWERS_NAME = "answers.parquet"
ANSWERS_FOLDER = "answers"
"""Answers one by one while a step is unfinished; ANSWERS_NAME replaces them."""
AUTOINTERP_SCHEMA = arrow_schema(AUTOINTERP_COLUMNS)
ANSWER_SCHEMA = arrow_schema(ANSWER_COLUMNS)

_MAX_SHARDS = 4
"""Validation shards that are searched for quiet contexts; each holds documents of all corpora."""


class _Prepared(NamedTuple):
    """One step with its contexts."""

    step: Step[AutointerpInputs]
    cases: dict[int, InterpTask | None]
    """By latent, in order; None where its contexts do not suffice."""
    answers: Answers


def run(steps: Sequence[Step[AutointerpInputs]], context: StageContext) -> None:
    """Ask about the latents of every crosscoder and publish the tables."""
    options = endpoint_options(context.resources.autointerp)
    prepared = [_prepare(step, context) for step in steps]
    _report_cost(prepared, context)
    for one in prepared:
        started = time.monotonic()
        found = _ask(one, options, context)
        folder, table = one.step.folder, interpretation_table([found[latent] for latent in one.cases])
        write_frame(context.storage, f"{folder}/{TABLE_NAME}", table, AUTOINTERP_SCHEMA)
        write_frame(context.storage, f"{folder}/{ANSWERS_NAME}", one.answers.table(list(one.cases)), ANSWER_SCHEMA)
        files = [TABLE_NAME, ANSWERS_NAME]
        groups = accuracy_groups(table, read_latents(context.storage, one.step.inputs.latents))
        counts = {**interpretation_numbers(table), "groups": numbers_of(groups, "value", by=("group",))}
        context.finish(one.step, counts, time.monotonic() - started, files)
        context.storage.delete(f"{folder}/{ANSWERS_FOLDER}")


def _ask(one: _Prepared, options: EndpointOptions, context: StageContext) -> dict[int, Interpretation]:
    """What is found about each latent of a step."""
    section, concurrency = one.step.inputs.section, context.resources.autointerp.concurrency
    found = {latent: Interpretation(latent, InterpStatus.TOO_FEW) for latent, case in one.cases.items() if not case}
    cases = [case for case in one.cases.values() if case]
    endpoint = Endpoint(options, _fields(section))
    interview = Interview(endpoint, one.answers, section.contexts_per_request, section.num_repeats)
    try:
        progress = Progress(AutointerpInputs.NAME, len(cases), "latents")
        explained = interview_all(interview, cases, concurrency=concurrency)
        found |= {result.latent: result for result in context.follow(progress, explained, lambda _: 1)}
        if section.with_control:
            progress = Progress(f"{AutointerpInputs.NAME} control", len(cases), "latents")
            controlled = control_all(interview, cases, dict(found), concurrency=concurrency)
            found |= {result.latent: result for result in context.follow(progress, controlled, lambda _: 1)}
    finally:
        endpoint.close()
    return found


def endpoint_options(section: EndpointSection) -> EndpointOptions:
    """Where and how to ask; InputError unless address and key are there. Nothing is sent."""
    if section.base_url is None:
        raise InputError(
            "resources.autointerp.base_url: expected the address of an OpenAI-compatible endpoint, such as "
            "http://localhost:8000/v1, got none; give it or set analyses.autointerp to null"
        )
    key = read_key(section.api_key_env)
    return EndpointOptions(section.base_url, key, section.timeout_seconds, section.max_retries, section.backoff_seconds)


def _fields(section: AutointerpSection) -> dict[str, Any]:
    """What every request holds beside its messages."""
    limits = {"temperature": section.temperature, "max_tokens": section.max_answer_tokens}
    fields = {"model": section.model, **limits, **section.request_fields}
    return {name: value for name, value in fields.items() if value is not None}


def _prepare(step: Step[AutointerpInputs], context: StageContext) -> _Prepared:
    section, storage = step.inputs.section, context.storage
    latents = read_latents(storage, step.inputs.latents)
    examples = read_table(storage, f"{step.inputs.examples.folder}/{EXAMPLES_NAME}").to_pandas()
    answers = Answers(storage, f"{step.folder}/{ANSWERS_FOLDER}")
    chosen = interpreted_latents(latents, named=section.latents, max_latents=section.max_latents)
    if not chosen:
        return _Prepared(step, {}, answers)
    quiet: list[QuietWindow] = run_task(_quiet_contexts, storage, step.inputs, chosen, num_cpus=1)
    own = {int(str(latent)): rows for latent, rows in examples.groupby("latent", sort=False)}
    sizes = Sizes(section.num_explaining, section.num_active, section.num_quiet, section.seed)
    cases = {latent: interp_task(latent, own.get(latent, examples.head(0)), quiet, sizes) for latent in chosen}
    return _Prepared(step, cases, answers)


def _quiet_contexts(storage: Storage, inputs: AutointerpInputs, chosen: Sequence[int]) -> list[QuietWindow]:
    """Windows of validation documents and which of the chosen latents fire in them; in a worker process."""
    store = ActivationStore(storage, inputs.activations.folder)
    left = [max(MIN_QUIET_PER_CORPUS, 4 * inputs.section.num_quiet)] * len(store.manifest.corpora)
    window_tokens = inputs.examples.inputs.section.window_tokens
    found: list[QuietWindow] = []
    with (
        local_specs(storage, inputs.tokens.inputs.models.chat) as (spec,),
        open_crosscoder(storage, inputs.crosscoder.folder) as crosscoder,
    ):
        tokenizer = load_tokenizer(spec)
        for shard in store.manifest.of_split(Split.VALIDATION)[:_MAX_SHARDS]:
            rows = shard_rows(store, shard)
            keep_B = choose_windows(rows["doc_id"], rows["corpus"], left, window_tokens=window_tokens)
            windows = encoded_batches(crosscoder, {name: value[keep_B] for name, value in rows.items()})
            found += quiet_windows(
                windows,
                chosen,
                corpora=store.manifest.corpora,
                token_texts=lambda ids: token_texts(tokenizer, ids),
            )
            if not any(left):
                break
    return found


def _report_cost(prepared: Sequence[_Prepared], context: StageContext) -> None:
    """Tell the user what the requests that are still to be made will probably cost."""
    cost, num_latents = Cost(0, 0, 0), 0
    for one in prepared:
        for case in one.cases.values():
            if case is not None:
                num_latents += 1
                cost = cost.plus(_pending(one, case))
    endpoint = context.resources.autointerp
    parts = [
        f"{AutointerpInputs.NAME}: {num_latents:,} latents, {cost_text(cost, endpoint.price_in, endpoint.price_out)}"
    ]
    left_out = sum(len(one.cases) for one in prepared) - num_latents
    if left_out:
        parts.append(f"{left_out:,} latents have too few contexts")
    kept = sum(len(one.answers) for one in prepared)
    if kept:
        parts.append(f"{kept:,} answers are there from before")
    context.reporter.message("; ".join(parts))


def _pending(one: _Prepared, case: InterpTask) -> Cost:
    section = one.step.inputs.section
    return pending_cost(one.answers, case, section.contexts_per_request, with_control=section.with_control)


def planned_latents(section: AutointerpSection, latent_counts: Mapping[str, Any] | None) -> int:
    """Latents that a step will ask about, at most; `latent_counts` are those of its latent table, if it is done."""
    if section.latents:
        return len(set(section.latents))
    specific = section.max_latents if latent_counts is None else int(latent_counts["num_chat_specific"])
    return min(section.max_latents, specific)
