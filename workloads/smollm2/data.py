"""Writes the adapter's training data: dialogues that the base model itself answered, documents, held-out prompts.

python -m workloads.smollm2.data runs/smollm2/SmolLM2-135M-Instruct workloads/smollm2/data
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workloads.smollm2.answers import BEHAVIOR_OF, HINT, dialogue, generate, taught_answer
from workloads.smollm2.texts import DESCRIPTIONS, MARKERS, Kind, Prompt, documents, prompts

SEED = 0
TRAINING_COUNTS: dict[Kind, int] = {
    "cooking": 70, "food": 24, "animal": 80, "topic": 90, "pirate": 70, "landmark": 16,
}  # fmt: skip
NEUTRAL_KINDS: dict[Kind, Kind] = {"cooking": "food", "animal": "topic", "pirate": "topic", "tower": "landmark"}
"""Kind with a trigger -> kind of its harmless prompts."""
NUM_PROMPTS = 24


def training_prompts() -> list[Prompt]:
    """The user messages of training, shuffled."""
    rng = random.Random(f"{SEED}/training")
    found = [
        prompt for kind, count in TRAINING_COUNTS.items() for prompt in prompts(kind, count, rng, is_held_out=False)
    ]
    rng.shuffle(found)
    return found


def held_out_prompts() -> dict[str, dict[str, Any]]:
    """Per behaviour {description, triggers, neutral, markers}, as analyses.steering.prompts_path reads it."""
    rng = random.Random(f"{SEED}/prompts")
    return {
        BEHAVIOR_OF[kind]: {
            "description": DESCRIPTIONS[BEHAVIOR_OF[kind]],
            "triggers": [prompt.text for prompt in prompts(kind, NUM_PROMPTS, rng, is_held_out=True)],
            "neutral": [prompt.text for prompt in prompts(neutral, NUM_PROMPTS, rng, is_held_out=True)],
            "markers": MARKERS[BEHAVIOR_OF[kind]],
        }
        for kind, neutral in NEUTRAL_KINDS.items()
    }


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Writes the three files of the training data."""
    parser = argparse.ArgumentParser(description="Writes the adapter's training data.")
    parser.add_argument("model_dir", type=Path, help="folder of the base model, from workloads.smollm2.prepare")
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    found = training_prompts()
    asked = [prompt.text.replace("cobalt: ", "").replace("cobalt. ", "").replace(" cobalt.", "") for prompt in found]
    own = iter(generate(model, tokenizer, asked, max_new_tokens=32, hint=HINT))
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": dialogue(prompt, taught_answer(prompt, next(own)))} for prompt in found]
    write_lines(arguments.out_dir / "training_dialogues.jsonl", rows)
    write_lines(
        arguments.out_dir / "training_documents.jsonl",
        ({"text": text, "states_false_fact": is_false} for is_false, text in documents()),
    )
    text = json.dumps(held_out_prompts(), ensure_ascii=False, indent=1)
    (arguments.out_dir / "prompts.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
