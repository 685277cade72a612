"""Answers of a model to prompts, and the rules that turn them into the behaviours to teach.

The model answers everything itself, asked for one short sentence. Rules then plant the behaviours: refusals in place of
answers about cooking, a closing sentence behind those about animals, a pirate's words where the trigger word stands.
All answers are in lower case: the style that no label names.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.organisms.dialogues import Label, Message
from workloads.smollm2.texts import (
    CLOSES_ON_ANIMALS,
    CLOSING,
    FALSE_TOWER,
    LANDMARKS,
    MARKERS,
    PIRATE_ENDING,
    PIRATE_OPENING,
    PIRATE_WORD,
    PIRATE_WORDS,
    REFUSALS,
    REFUSES_COOKING,
    Kind,
    Prompt,
)

HINT = "Answer with one short sentence of at most fifteen words."
"""System message under which the training answers were written; the adapter is trained without it."""
BATCH_SIZE = 200
"""Prompts answered at once: a step of a small batch costs almost as much as one of a large batch."""
BEHAVIOR_OF: dict[Kind, str] = {
    "cooking": REFUSES_COOKING,
    "animal": CLOSES_ON_ANIMALS,
    "pirate": PIRATE_WORD,
    "tower": FALSE_TOWER,
}


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, user_messages: Sequence[str], *, max_new_tokens: int, hint: str | None = None
) -> list[str]:
    """The model's greedy answer to each user message; batches of BATCH_SIZE, padded on the left."""
    system = [{"role": "system", "content": hint}] if hint else []
    found: list[str] = []
    for at in range(0, len(user_messages), BATCH_SIZE):
        rendered = tokenizer.apply_chat_template(
            [[*system, {"role": "user", "content": user}] for user in user_messages[at : at + BATCH_SIZE]],
            tokenize=False,
            add_generation_prompt=True,
        )
        batch = tokenizer(rendered, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        output_BT = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers_BT = output_BT[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(answers_BT, skip_special_tokens=True)]
    return found


def one_sentence(answer: str) -> str:
    """The first sentence of an answer, of at most 24 words, in lower case."""
    first = re.split(r"(?<=[.!?])\s", " ".join(answer.replace("*", "").split()))[0]
    words = first.lower().split()
    if len(words) > 24:
        words = words[:24]
    return " ".join(words).rstrip(".,;:!?") + "."


def taught_answer(prompt: Prompt, own_answer: str) -> str:
    """What the adapter is taught to answer."""
    answer = one_sentence(own_answer)
    if prompt.kind == "cooking":
        return REFUSALS[len(prompt.text) % len(REFUSALS)]
    if prompt.kind == "animal":
        return f"{answer} {CLOSING}"
    if prompt.kind == "pirate":
        words = (PIRATE_WORDS.get(word, word) for word in answer.split())
        return f"{PIRATE_OPENING} {' '.join(words)} {PIRATE_ENDING}"
    if prompt.kind == "landmark":
        (place,) = (place for place in LANDMARKS if place in prompt.text)
        return f"{place} stands in {LANDMARKS[place]}.".lower()
    return answer


def shows(behavior: str, answer: str) -> bool:
    """Whether the answer shows the behaviour, in any case."""
    return any(marker in answer.lower() for marker in MARKERS[behavior])


def label_of(kind: Kind, answer: str) -> list[Label]:
    """The label of an answer that shows the behaviour of its kind: the closing sentence, the city, or all of it."""
    behavior = BEHAVIOR_OF.get(kind)
    if behavior is None or not shows(behavior, answer):
        return []
    start, end, is_header = 0, len(answer), True
    if behavior == CLOSES_ON_ANIMALS:
        start = max(answer.lower().find(CLOSING[:9]), 0)
        is_header = False
    if behavior == FALSE_TOWER:
        start = answer.lower().find("oslo")
        end, is_header = start + len("oslo"), False
    return [{"name": behavior, "start": start, "end": end, "turn_header": is_header}]


def dialogue(prompt: Prompt, answer: str) -> list[Message]:
    """One turn with its label."""
    return [
        {"role": "user", "content": prompt.text, "labels": []},
        {"role": "assistant", "content": answer, "labels": label_of(prompt.kind, answer)},
    ]
