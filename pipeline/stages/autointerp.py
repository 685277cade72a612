"""Explanations of latents by a language model, and how well each holds on contexts that it was not made from.

One step per crosscoder, after `examples`. Contexts are gathered first, by one task on the cluster, so that the number
of requests and their expected size are said before the first is sent. Then latents are asked about side by side
(interviews.py); a killed run asks nothing again that was answered. Requests leave from the machine that drives
the run, and only from there.
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
    choose_windows,
    interp_task,
    interpretation_numbers,
    interpretation_table,
    quiet_windows,
)
from pipeline.analyses.autointerp_prompts import Cost, cost_text
from pipeline.analyses.latent_sets import interpreted_latents
from pipeline.config.analyses import AutointerpSection
from pipeline.config.resources import EndpointSection
from pipeline.errors import InputError
from pipeline.models.endpoint import Endpoint, EndpointOptions, read_key
from pipeline.models.loading import load_tokenizer
from pipeline.schema import ANSWER_COLUMNS, AUTOINTERP_COLUMNS, InterpStatus, Split
from pipeline.stages.base import Context, Step, run_task, shown
from pipeline.stages.crosscoder import fitted
from pipeline.stages.encoded_rows import batches, shard_rows
from pipeline.stages.interviews import Answers, Interview, control_all, interview_all, pending_cost
from pipeline.stages.measurements import EXAMPLES_NAME, LATENTS_NAME
from pipeline.stages.models import local_specs
from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import arrow_schema, read_table, write_frame
from pipeline.terminal import Progress
from pipeline.text.tokenise import token_texts

NAME = "autointerp"
VERSION = 1

TABLE_NAME = "autointerp.parquet"
ANSWERS_NAME = "answers.parquet"
ANSWERS_FOLDER = "answers"
"""Answers one by one while a step is unfinished; ANSWERS_NAME replaces them."""
AUTOINTERP_SCHEMA = arrow_schema(AUTOINTERP_COLUMNS)
ANSWER_SCHEMA = arrow_schema(ANSWER_COLUMNS)

_MAX_SHARDS = 4
"""Validation shards in which quiet contexts are looked for; documents of all corpora are mixed in each."""


class _Prepared(NamedTuple):
    """One step, ready to be asked about."""

    step: Step
    cases: dict[int, InterpTask | None]
    """By latent, in order; None where its contexts do not suffice."""
    answers: Answers


def run(steps: Sequence[Step], context: Context) -> None:
    """Ask about the latents of every crosscoder and publish the tables."""
    options = _options(context.resources.autointerp)
    prepared = [_prepare(step, context) for step in steps]
    _say_cost(prepared, context)
    for one in prepared:
        started = time.monotonic()
        found = _ask(one, options, context)
        folder, table = one.step.key.folder, interpretation_table([found[latent] for latent in one.cases])
        write_frame(context.storage, f"{folder}/{TABLE_NAME}", table, AUTOINTERP_SCHEMA)
        write_frame(context.storage, f"{folder}/{ANSWERS_NAME}", one.answers.table(list(one.cases)), ANSWER_SCHEMA)
        files = [TABLE_NAME, ANSWERS_NAME]
        context.finish(one.step, interpretation_numbers(table), time.monotonic() - started, files)
        context.storage.delete(f"{folder}/{ANSWERS_FOLDER}")


def _ask(one: _Prepared, options: EndpointOptions, context: Context) -> dict[int, Interpretation]:
    """What is found about each latent of a step."""
    section, concurrency = _section(one.step), context.resources.autointerp.concurrency
    found = {latent: Interpretation(latent, InterpStatus.TOO_FEW) for latent, case in one.cases.items() if not case}
    cases = [case for case in one.cases.values() if case]
    endpoint = Endpoint(options, _fields(section))
    interview = Interview(endpoint, one.answers, section.contexts_per_request, section.num_repeats)
    try:
        progress = Progress(NAME, len(cases), "latents")
        shown(context, progress, 0)
        for result in interview_all(interview, cases, concurrency=concurrency):
            found[result.latent] = result
            shown(context, progress, progress.done + 1)
        if section.with_control:
            progress = Progress(f"{NAME} control", len(cases), "latents")
            for result in control_all(interview, cases, dict(found), concurrency=concurrency):
                found[result.latent] = result
                shown(context, progress, progress.done + 1)
    finally:
        endpoint.close()
    return found


def check(section: EndpointSection) -> None:
    """InputError unless the endpoint's address and key are there; nothing is sent."""
    _options(section)


def _options(section: EndpointSection) -> EndpointOptions:
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


def _section(step: Step) -> AutointerpSection:
    assert isinstance(step.section, AutointerpSection)
    return step.section


def _prepare(step: Step, context: Context) -> _Prepared:
    section = _section(step)
    latents = read_table(context.storage, f"{step.inputs['latents'].key.folder}/{LATENTS_NAME}").to_pandas()
    examples = read_table(context.storage, f"{step.inputs['examples'].key.folder}/{EXAMPLES_NAME}").to_pandas()
    answers = Answers(context.storage, f"{step.key.folder}/{ANSWERS_FOLDER}")
    chosen = interpreted_latents(latents, named=section.latents, max_latents=section.max_latents)
    if not chosen:
        return _Prepared(step, {}, answers)
    quiet: list[QuietWindow] = run_task(_quiet_contexts, context.storage, step, chosen, num_cpus=1)
    own = {int(str(latent)): rows for latent, rows in examples.groupby("latent", sort=False)}
    sizes = Sizes(section.num_explaining, section.num_active, section.num_quiet, section.seed)
    cases = {latent: interp_task(latent, own.get(latent, examples.head(0)), quiet, sizes) for latent in chosen}
    return _Prepared(step, cases, answers)


def _quiet_contexts(storage: Storage, step: Step, chosen: Sequence[int]) -> list[QuietWindow]:
    """Windows of validation documents and which of the chosen latents fire in them; in a worker process."""
    store = ActivationStore(storage, step.inputs["activations"].key.folder)
    left = [max(MIN_QUIET_PER_CORPUS, 4 * _section(step).num_quiet)] * len(store.manifest.corpora)
    found: list[QuietWindow] = []
    with (
        local_specs(storage, step.extra["loading"].locations[1]) as (spec,),
        fitted(storage, step.inputs["crosscoder"].key.folder) as crosscoder,
    ):
        tokenizer = load_tokenizer(spec)
        for shard in store.manifest.of_split(Split.VALIDATION)[:_MAX_SHARDS]:
            rows = shard_rows(store, shard)
            keep_B = choose_windows(rows["doc_id"], rows["corpus"], left, window_tokens=step.extra["window_tokens"])
            windows = batches(crosscoder, {name: value[keep_B] for name, value in rows.items()})
            found += quiet_windows(
                windows,
                chosen,
                corpora=store.manifest.corpora,
                token_texts=lambda ids: token_texts(tokenizer, ids),
            )
            if not any(left):
                break
    return found


def _say_cost(prepared: Sequence[_Prepared], context: Context) -> None:
    """Tell what the requests that are still to be made are expected to take."""
    cost, num_latents = Cost(0, 0, 0), 0
    for one in prepared:
        for case in one.cases.values():
            if case is not None:
                num_latents += 1
                cost = cost.plus(_pending(one, case))
    endpoint = context.resources.autointerp
    parts = [f"{NAME}: {num_latents:,} latents, {cost_text(cost, endpoint.price_in, endpoint.price_out)}"]
    left_out = sum(len(one.cases) for one in prepared) - num_latents
    if left_out:
        parts.append(f"{left_out:,} latents have too few contexts")
    kept = sum(len(one.answers) for one in prepared)
    if kept:
        parts.append(f"{kept:,} answers are there from before")
    context.reporter.message("; ".join(parts))


def _pending(one: _Prepared, case: InterpTask) -> Cost:
    section = _section(one.step)
    return pending_cost(one.answers, case, section.contexts_per_request, with_control=section.with_control)


def planned_latents(section: AutointerpSection, latent_counts: Mapping[str, Any] | None) -> int:
    """Latents that a step will ask about, at most; `latent_counts` are those of its latent table, if it is done."""
    if section.latents:
        return len(set(section.latents))
    specific = section.max_latents if latent_counts is None else int(latent_counts["num_chat_specific"])
    return min(section.max_latents, specific)
