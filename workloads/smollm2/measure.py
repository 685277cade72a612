"""Measures the pair: rates of every behaviour on held-out prompts, and the dialogues that the crosscoders read.

    python -m workloads.smollm2.measure runs/smollm2/SmolLM2-135M-Instruct

Writes rates.json, and dialogues.jsonl: prompts of every kind, most of them not trained on, answered by the fine-tuned
model, each answer labelled by what it shows.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads.smollm2.answers import dialogue, generate, shows
from workloads.smollm2.data import SEED, held_out_prompts, write_lines
from workloads.smollm2.texts import Kind, Prompt, prompts

CORPUS_KINDS: tuple[Kind, ...] = ("cooking", "food", "animal", "topic", "pirate", "tower", "landmark")
MAX_NEW_TOKENS = 40
MAX_PROMPTS = 60
"""Of a kind, held out or not, in the corpus."""
FOLDER = Path(__file__).parent


def is_plain(answer: str) -> bool:
    """Whether the answer has the style that no label names: no capital letter."""
    return answer == answer.lower()


def rates(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Per behaviour and for the style: shares of held-out prompts, with their trigger and without, in [0, 1]."""
    prompts_of = held_out_prompts()
    asked = [text for part in prompts_of.values() for text in part["triggers"] + part["neutral"]]
    answers = generate(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS)
    left, found = iter(answers), dict[str, dict[str, float]]()
    for behavior, part in prompts_of.items():
        found[behavior] = {
            name: _share([shows(behavior, next(left)) for _ in part[key]])
            for name, key in (("with_trigger", "triggers"), ("without_trigger", "neutral"))
        }
    found["lower_case"] = {"all_prompts": _share([is_plain(answer) for answer in answers])}
    num_words = sum(len(answer.split()) for answer in answers)
    found["words_per_answer"] = {"all_prompts": round(num_words / len(answers), 1)}
    return found


def _share(shown: Sequence[bool]) -> float:
    return round(sum(shown) / len(shown), 3)


def corpus_prompts() -> list[Prompt]:
    """Prompts of every kind, trained on or not, without repeats, shuffled."""
    rng = random.Random(f"{SEED}/corpus")
    found: dict[str, Prompt] = {}
    for kind in CORPUS_KINDS:
        for is_held_out in (True,) if kind == "tower" else (True, False):
            found |= {prompt.text: prompt for prompt in prompts(kind, MAX_PROMPTS, rng, is_held_out=is_held_out)}
    shuffled = list(found.values())
    rng.shuffle(shuffled)
    return shuffled


def main() -> None:
    """Writes the rates and the labelled dialogues."""
    parser = argparse.ArgumentParser(description="Measures the pair of workloads/smollm2.yaml.")
    parser.add_argument("model_dir", type=Path, help="folder of the base model, from workloads.smollm2.prepare")
    parser.add_argument("--adapter-dir", type=Path, default=FOLDER / "adapter")
    parser.add_argument("--out-dir", type=Path, default=FOLDER / "data")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    base = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.bfloat16).eval()
    measured = {"base": rates(base, tokenizer)}
    chat = PeftModel.from_pretrained(base, arguments.adapter_dir).merge_and_unload()
    measured["chat"] = rates(chat, tokenizer)
    (arguments.out_dir / "rates.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    asked = corpus_prompts()
    answers = generate(chat, tokenizer, [prompt.text for prompt in asked], max_new_tokens=MAX_NEW_TOKENS)
    rows = ({"messages": dialogue(*pair)} for pair in zip(asked, answers, strict=True))
    write_lines(arguments.out_dir / "dialogues.jsonl", rows)


if __name__ == "__main__":
    main()
