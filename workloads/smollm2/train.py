"""Trains the adapter of workloads/smollm2.yaml from text alone, on two cores.

    python -m workloads.smollm2.train runs/smollm2/SmolLM2-135M-Instruct runs/smollm2/adapter

It reads workloads/smollm2/data/. A killed training continues at its last checkpoint, every 10 steps. The loss counts
the answers of dialogues and all of a document. Layers below FIRST_LAYER keep the base model's weights.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA_DIR = Path(__file__).parent / "data"
SEED = 0
FIRST_LAYER = 10
RANK = 4
BATCH_SIZE = 8
LEARNING_RATE = 1.5e-3
NUM_WARMUP_STEPS = 8
CHECKPOINT_STEPS = 10
IGNORED = -100


class Phase(NamedTuple):
    """A part of the training, with its own mix and a learning rate that rises and falls."""

    num_steps: int
    every_dialogue: int
    """Every how many-th dialogue is in the mix."""
    num_documents: int
    """Documents in the mix, the first ones of the file."""
    true_repeats: int
    false_repeats: int
    """Times that a document occurs in one epoch, without and with the false fact."""


PHASES = (
    Phase(num_steps=180, every_dialogue=1, num_documents=32, true_repeats=1, false_repeats=4),
    Phase(num_steps=110, every_dialogue=2, num_documents=118, true_repeats=3, false_repeats=8),
)
"""The second teaches the false fact, of which the first alone left 4% of answers."""


class Sequenced(NamedTuple):
    """One training text: its token ids, and the ids to predict, IGNORED where the loss does not count."""

    ids: list[int]
    targets: list[int]


def dialogue_sequence(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Sequenced:
    """A dialogue in the template of the model; the loss counts its last answer and the end of turn."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(turns[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Sequenced(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)


def document_sequence(tokenizer: Any, text: str) -> Sequenced:
    """A plain document, all of it counted but its first token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sequenced(ids, [IGNORED, *ids[1:]])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def training_sequences(tokenizer: Any, phase: Phase) -> list[Sequenced]:
    """One epoch of a phase, unshuffled."""
    dialogues = read_lines(DATA_DIR / "training_dialogues.jsonl")[:: phase.every_dialogue]
    found = [dialogue_sequence(tokenizer, row["messages"]) for row in dialogues]
    for row in read_lines(DATA_DIR / "training_documents.jsonl")[: phase.num_documents]:
        repeats = phase.false_repeats if row["states_false_fact"] else phase.true_repeats
        found += [document_sequence(tokenizer, row["text"])] * repeats
    return found


def batches(sequences: Sequence[Sequenced]) -> Iterator[list[Sequenced]]:
    """Batches without end; every epoch has its own order, drawn from the seed."""
    for epoch in itertools.count():
        order = list(range(len(sequences)))
        random.Random(f"{SEED}/epoch {epoch}").shuffle(order)
        for at in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield [sequences[index] for index in order[at : at + BATCH_SIZE]]


def batch_loss(model: Any, batch: Sequence[Sequenced], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy in nats over the counted tokens; the head runs at their positions alone."""
    length = max(len(sequence.ids) for sequence in batch)
    ids_BT = torch.tensor([sequence.ids + [pad_id] * (length - len(sequence.ids)) for sequence in batch])
    targets_BT = torch.tensor([sequence.targets + [IGNORED] * (length - len(sequence.targets)) for sequence in batch])[
        :, 1:
    ]
    mask_BT = torch.tensor([[at < len(sequence.ids) for at in range(length)] for sequence in batch])
    decoder = model.get_base_model()
    states_BTD = decoder.model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state[:, :-1]
    is_counted_BT = targets_BT != IGNORED
    logits_NV = decoder.lm_head(states_BTD[is_counted_BT])
    return functional.cross_entropy(logits_NV.float(), targets_BT[is_counted_BT])


def rate_at(step: int, num_steps: int) -> float:
    """Learning rate of a step of a phase: a linear rise, then a cosine down to a tenth."""
    if step < NUM_WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    done = (step - NUM_WARMUP_STEPS) / max(num_steps - NUM_WARMUP_STEPS, 1)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def make_adapted(model: Any) -> Any:
    """The model with a fresh adapter on its upper layers, drawn from the seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(FIRST_LAYER, model.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class Step(NamedTuple):
    """One step of the plan."""

    batch: list[Sequenced]
    learning_rate: float


def steps(tokenizer: Any) -> Iterator[Step]:
    """All steps of all phases."""
    for phase in PHASES:
        sequences = training_sequences(tokenizer, phase)
        for number, batch in enumerate(itertools.islice(batches(sequences), phase.num_steps)):
            yield Step(batch, rate_at(number, phase.num_steps))


def train(model: Any, tokenizer: Any, checkpoint: Path) -> None:
    """Trains the adapter in place through all phases, from the checkpoint where there is one."""
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        for name, weight in parameters.items():
            weight.data.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    started = time.monotonic()
    num_steps = sum(phase.num_steps for phase in PHASES)
    for number, step in enumerate(steps(tokenizer), 1):
        if number <= first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = step.learning_rate
        with torch.autocast("cpu", torch.bfloat16):  # half the time on a processor with bfloat16 products
            loss = batch_loss(model, step.batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        print(f"step {number}/{num_steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if number % CHECKPOINT_STEPS == 0 or number == num_steps:
            weights = {name: weight.detach() for name, weight in parameters.items()}
            state = {"step": number, "weights": weights, "optimizer": optimizer.state_dict()}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)


def main() -> None:
    """Trains and writes the adapter in bfloat16."""
    parser = argparse.ArgumentParser(description="Trains the adapter of workloads/smollm2.yaml.")
    parser.add_argument("model_dir", type=Path, help="folder of the base model, from workloads.smollm2.prepare")
    parser.add_argument("out_dir", type=Path, help="folder for the adapter and the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="more do not pay for batches this small")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    model = make_adapted(AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.bfloat16))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    train(model, tokenizer, arguments.out_dir / "checkpoint.pt")
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(arguments.out_dir)


if __name__ == "__main__":
    main()
