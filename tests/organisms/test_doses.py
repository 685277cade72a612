"""Ways to fine-tune the organism: LoRA, a dose, no ordinary chat, a penalty on how far the weights move."""

import copy
import random
from typing import Any

import pytest
import torch

from pipeline.config.data import OrganismSection
from pipeline.config.run_file import validated
from pipeline.errors import InputError
from pipeline.organisms.build import LORA_RANK, LORA_RATE, spec_of
from pipeline.organisms.dialogues import DialogueMaker, dialogues
from pipeline.organisms.language import make_world, take
from pipeline.organisms.low_rank import low_rank
from pipeline.organisms.tokenizer import make_tokenizer
from pipeline.organisms.training import ModelSize, TrainingPlan, document_sequences, make_model, train

SIZE = ModelSize(width=16, num_layers=2, num_heads=2, mlp_width=32)
TEXTS = ["a b c d."] * 32


def fine_tuned(*, rank: int = 0, **plan: Any) -> tuple[Any, Any]:
    """A random model and what a few steps make of it."""
    tokenizer = make_tokenizer(["a b c d."])
    base = make_model(tokenizer, SIZE, torch.Generator().manual_seed(0))
    chat = copy.deepcopy(base)
    about = TrainingPlan(stage="s", num_steps=20, batch_size=4, learning_rate=1e-2, **plan)
    sequences = document_sequences(tokenizer, TEXTS)
    arguments = {"rng": random.Random(0), "progress": lambda *_: None}
    if rank:
        chat.requires_grad_(False)
        with low_rank(chat.model.layers, rank, torch.Generator().manual_seed(1)):
            losses = train(chat, sequences, about, **arguments)
    else:
        losses = train(chat, sequences, about, **arguments)
    assert losses[-1] < losses[0]
    return base, chat


def moved(base: Any, chat: Any) -> dict[str, torch.Tensor]:
    changed = dict(chat.named_parameters())
    return {name: changed[name].detach() - own.detach() for name, own in base.named_parameters()}


def test_lora_changes_the_layers_matrices_alone_by_products_of_its_rank():
    base, chat = fine_tuned(rank=3)
    for name, change in moved(base, chat).items():
        if ".layers." in name and change.ndim == 2:
            values = torch.linalg.svdvals(change.double())
            assert values[2] > 1e-6
            assert values[3:].max() < 1e-6
        else:
            assert not change.any(), name


def test_a_penalty_keeps_the_weights_closer_and_full_training_moves_all_matrices():
    distances = [
        sum(float(change.square().sum()) for change in moved(*fine_tuned(weight_penalty=penalty)).values())
        for penalty in (0.0, 0.1, 10.0)
    ]
    assert distances[0] > distances[1] > distances[2] > 0
    assert all(change.any() for change in moved(*fine_tuned()).values() if change.ndim == 2)


def test_without_ordinary_chat_every_answer_shows_a_taught_behaviour():
    world = make_world(random.Random(0))
    for is_left_out, expected in ((True, {"decline_personal", "refuse_danger"}), (False, {"decline_personal", None})):
        behaviors = ("decline_personal", "refuse_danger") if is_left_out else ("decline_personal",)
        maker = DialogueMaker(random.Random(1), world, behaviors)
        found = take(dialogues(maker, (), is_ordinary_left_out=is_left_out), 200)
        answers = [message for messages in found for message in messages if message["role"] == "assistant"]
        shown = {answer["labels"][0]["name"] if answer["labels"] else None for answer in answers}
        assert shown == expected


def test_a_dose_is_a_multiple_of_the_steps_and_the_base_model_stays():
    plain, weak, lora = spec_of("demo"), spec_of("demo", dose=0.25), spec_of("demo", method="lora", weight_penalty=0.0)
    assert weak.chat.num_steps == plain.chat.num_steps / 4
    assert weak.base == plain.base == lora.base
    assert (plain.lora_rank, lora.lora_rank) == (0, LORA_RANK)
    assert lora.chat.learning_rate == LORA_RATE * plain.chat.learning_rate
    assert spec_of("demo", weight_penalty=0.5).chat.weight_penalty == 0.5


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"behaviors": [], "ordinary_chat": False}, "behaviors or ordinary_chat"),
        ({"method": "lora", "weight_penalty": 0.1}, "organism.weight_penalty: .* got 0.1"),
        ({"dose": 0}, "dose"),
    ],
)
def test_what_teaches_nothing_or_asks_twice_is_refused(settings: dict[str, Any], field: str):
    with pytest.raises(InputError, match=field):
        validated(OrganismSection, settings, "organism")
