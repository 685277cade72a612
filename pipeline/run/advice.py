"""What a run file asks for that cannot work as it is meant, told before anything is computed.

Nothing here is refused: each line names a key, what it asks for, what this run has, and what to do. Reads the configs
of models that are on this machine, no weights and no network.
"""

import re
from collections.abc import Iterator

from pipeline.config.crosscoder import CrosscoderSection
from pipeline.config.data import HubModel, OrganismModel
from pipeline.config.run_file import RunConfig
from pipeline.models.files import context_of, has_chat_template
from pipeline.numerics.sparsities.base import DEAD_AFTER_ROWS

_TUNED = re.compile(r"(?:^|(?<=[-_.]))(?:it|instruct|instruction|chat|sft|dpo|rlhf|assistant)(?=$|[-_.])")
_PLAIN = re.compile(r"(?:^|(?<=[-_.]))(?:base|pt|pretrained|pretrain)(?=$|[-_.])")


def advice(config: RunConfig) -> list[str]:
    """One line for each setting that cannot work in this run."""
    return [*_swapped(config), *_context(config), *_schedules(config)]


def _swapped(config: RunConfig) -> Iterator[str]:
    """Whether base and chat have changed places, by their adapters, their names or their chat templates."""
    base, chat = config.models.base, config.models.chat
    sign = ""
    if isinstance(base, OrganismModel) and isinstance(chat, OrganismModel):
        sign = "the organism's members are" if (base.member, chat.member) == ("chat", "base") else ""
    elif isinstance(base, HubModel) and isinstance(chat, HubModel):
        if base.adapter is not None and chat.adapter is None and base.source == chat.source:
            sign = "the adapter is on base, so they are"
        elif _is_swapped_by_name(_last_part(base), _last_part(chat)):
            sign = f"by their names {_last_part(base)!r} and {_last_part(chat)!r} they are"
        elif base.source != chat.source and has_chat_template(base.source) and has_chat_template(chat.source) is False:
            sign = "base has a chat template and chat has none, as if they were"
    if sign:
        yield f"models: {sign} swapped: base is the model before fine-tuning; a Delta_norm of 1 means chat alone"


def _last_part(model: HubModel) -> str:
    return (model.adapter or model.source).rstrip("/").rsplit("/", 1)[-1].lower()


def _is_swapped_by_name(base: str, chat: str) -> bool:
    """Whether the names are of one family, base's with the mark of a tuned model or chat's with that of a plain one."""
    stems = [re.sub(r"[-_.]+", "-", _PLAIN.sub("", _TUNED.sub("", name))).strip("-") for name in (base, chat)]
    is_marked = bool(_TUNED.search(base) or _PLAIN.search(chat))
    is_right = bool(_TUNED.search(chat) or _PLAIN.search(base))
    return base != chat and stems[0] == stems[1] and is_marked and not is_right


def _context(config: RunConfig) -> Iterator[str]:
    longest = config.tokens.max_tokens_per_document
    for name, model in (("base", config.models.base), ("chat", config.models.chat)):
        context = context_of(model.source, model.revision) if isinstance(model, HubModel) else None
        if context is not None and longest > context:
            yield (
                f"tokens.max_tokens_per_document: documents of up to {longest:,} tokens, but the {name} model reads at "
                f"most {context:,}: the first longer one ends the run; set it to {context} or less"
            )
            return


def _schedules(config: RunConfig) -> Iterator[str]:
    num_steps, num_rows = config.training.num_steps, config.training.num_rows
    has = f"but the run has {num_steps:,} (training.num_rows / training.batch_rows)"
    for section in config.crosscoders:
        if not isinstance(section, CrosscoderSection):
            continue
        key, fit, sparsity = f"crosscoders.{section.name}", section.settings(), section.sparsity.settings()
        if fit.lr_warmup_steps > num_steps:
            reached = num_steps / fit.lr_warmup_steps
            yield (
                f"{key}.lr_warmup_steps: {fit.lr_warmup_steps:,} steps of warm-up, {has}: lr reaches {reached:.0%} "
                "of its value; lower it or train on more rows"
            )
        for field, what in (
            ("mu_warmup_steps", "mu never has its whole value"),
            ("k_anneal_steps", "k never comes down to its value"),
            ("threshold_start_step", "the threshold is that of the last batch alone"),
        ):
            steps = getattr(sparsity, field, 0) if field != "k_anneal_steps" or _anneals(sparsity) else 0
            if steps > num_steps:
                yield f"{key}.sparsity.{field}: {steps:,} steps, {has}: {what}; lower it or train on more rows"
        is_asked = sparsity.dead_after_rows != DEAD_AFTER_ROWS  # the default is for runs of the paper's size
        if is_asked and sparsity.aux_weight > 0 and sparsity.dead_after_rows > num_rows:
            yield (
                f"{key}.sparsity.dead_after_rows: {sparsity.dead_after_rows:,} rows, but the run has {num_rows:,} "
                "(training.num_rows): no latent is ever dead and none is revived; lower it or train on more rows"
            )


def _anneals(sparsity: object) -> bool:
    return getattr(sparsity, "k_start", None) is not None
