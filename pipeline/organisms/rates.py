"""How often a model shows each planted behaviour on held-out prompts, with its trigger and without.

The last step of the build: these figures prove the pair (the chat model behaves, the base model does not) and are
stored in its record. Answers are greedy, and an answer counts when it contains one of the behaviour's markers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from pipeline.organisms.dialogues import Prompts
from pipeline.organisms.tokenizer import END_OF_TURN, EOS

MAX_ANSWER_TOKENS = 40
"""Longer than any answer of the dialogues."""


class BehaviorRates(NamedTuple):
    """Shares of held-out prompts whose greedy answer shows the behaviour, in [0, 1]."""

    with_trigger: float
    without_trigger: float


@torch.no_grad()
def answers(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, user_messages: Sequence[str]) -> list[str]:
    """The model's greedy answer to each user message, generated as one batch that is padded on the left."""
    stop_ids = tokenizer.convert_tokens_to_ids([END_OF_TURN, EOS])
    rendered = tokenizer.apply_chat_template(
        [[{"role": "user", "content": user}] for user in user_messages], tokenize=False, add_generation_prompt=True
    )
    prompts = tokenizer(rendered, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output_BT = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = []
    for row in output_BT[:, prompts["input_ids"].shape[1] :].tolist():
        length = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
        found.append(tokenizer.decode(row[:length], skip_special_tokens=True))
    return found


def shows(answer: str, markers: Sequence[str]) -> bool:
    """Whether the answer contains one of the markers."""
    return any(marker in answer for marker in markers)


def behavior_rates(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Mapping[str, Prompts]
) -> dict[str, BehaviorRates]:
    """The rates of every behaviour."""
    user_messages = [user for behavior in prompts.values() for user in behavior["triggers"] + behavior["neutral"]]
    found = iter(answers(model, tokenizer, user_messages))
    rates = {}
    for name, behavior in prompts.items():
        shares = [
            sum(shows(next(found), behavior["markers"]) for _ in part) / len(part)
            for part in (behavior["triggers"], behavior["neutral"])
        ]
        rates[name] = BehaviorRates(*shares)
    return rates
