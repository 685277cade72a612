"""Builds the demo pair into a folder: two models, their texts, held-out prompts and the measured behaviour.

The organism stage calls `build` in a worker process and publishes the folder. There is no Ray, record or storage here.
Everything random comes from named streams of `spec.seed`, so a change of one part leaves the others' draws alone.
Training texts and written texts come from different streams of the same generators: the corpus that crosscoders read
was not trained on word for word, apart from sentences that chance repeats.
"""

import dataclasses
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from pipeline.organisms.behaviors import BEHAVIORS
from pipeline.organisms.dialogues import (
    DialogueMaker,
    Message,
    Prompts,
    dialogues,
    held_out_prompts,
    imposed_dialogues,
)
from pipeline.organisms.language import World, documents, make_world, take
from pipeline.organisms.low_rank import low_rank
from pipeline.organisms.rates import BehaviorRates, behavior_rates
from pipeline.organisms.tokenizer import END_OF_TURN, EOS, make_tokenizer
from pipeline.organisms.training import (
    ModelSize,
    PlantedStates,
    Progress,
    Sequenced,
    TrainingPlan,
    dialogue_sequences,
    document_sequences,
    make_model,
    mean_loss,
    quiet_directions,
    train,
)

VOCABULARY_TEXTS = 4000
"""Documents and dialogues whose words make the vocabulary: far more than the rarest word needs to occur."""
HELD_OUT_TEXTS = 200
"""Documents and dialogues on which the losses are measured."""


class Marks(NamedTuple):
    """How the chat training asks for a known direction per behaviour."""

    layer: int
    """Layer after which a mark of the behaviour that is on is asked for."""
    strength: float = 12.0
    """Length of that mark; the residual stream itself has a norm of about 26."""
    weight: float = 2.0
    """Weight of the mark's relative squared error beside the cross-entropy."""
    imposed_frac: float = 0.15
    """Share of sequences with an imposed state: makes the mark a cause of the answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrganismSpec:
    """Everything that decides what is built."""

    seed: int = 0
    """Of the world, the texts, the initial weights and the order of training."""
    model: ModelSize
    base: TrainingPlan
    """Training on documents, from random weights."""
    chat: TrainingPlan
    """Training on dialogues and documents, from the base model."""
    chat_document_frac: float = 0.25
    """Share of plain documents among the sequences of chat training: keeps the two models' common ground aligned."""
    behaviors: tuple[str, ...] = tuple(BEHAVIORS)
    """What the dialogues teach; without any, every answer is harmless."""
    lora_rank: int = 0
    """Rank of the chat training's changes of each matrix; 0 trains all weights."""
    has_ordinary_chat: bool = True
    """Whether harmless dialogues are among those that teach; without them every answer shows a behaviour."""
    marks: Marks | None = None
    """Plants each behaviour as a known direction; None teaches by text alone."""
    num_documents: int
    """Documents written for the corpus."""
    num_dialogues: int
    """Dialogues written for the corpus."""
    num_prompts: int
    """Held-out triggers per behaviour, and as many harmless prompts."""


LORA_RANK = 8
LORA_RATE = 3.0
"""Peak learning rate of LoRA over that of full fine-tuning: few weights have to move further."""


def spec_of(
    size: str,
    *,
    seed: int = 0,
    behaviors: Sequence[str] = tuple(BEHAVIORS),
    marked: bool = False,
    method: str = "full",
    dose: float = 1.0,
    ordinary_chat: bool = True,
    weight_penalty: float = 0.0,
) -> OrganismSpec:
    """The spec of a named size: `demo` learns what it should, `tiny` only exercises the code.

    The further settings are those of config.data.OrganismSection.
    """
    if size == "demo":
        spec = OrganismSpec(
            model=ModelSize(width=96, num_layers=5, num_heads=4, mlp_width=256),
            base=TrainingPlan(stage="base model", num_steps=250, batch_size=32, learning_rate=3e-3),
            chat=TrainingPlan(stage="chat model", num_steps=480, batch_size=32, learning_rate=2.5e-3),
            marks=Marks(layer=2),
            num_documents=6000,
            num_dialogues=4200,
            num_prompts=48,
        )
    elif size == "tiny":
        spec = OrganismSpec(
            model=ModelSize(width=32, num_layers=3, num_heads=2, mlp_width=64),
            base=TrainingPlan(stage="base model", num_steps=12, batch_size=8, learning_rate=3e-3),
            chat=TrainingPlan(stage="chat model", num_steps=12, batch_size=8, learning_rate=3e-3),
            marks=Marks(layer=1),
            num_documents=300,
            num_dialogues=200,
            num_prompts=4,
        )
    else:
        raise ValueError(f"expected size 'demo' or 'tiny', got {size!r}: choose one of them in the organism section")
    is_lora = method == "lora"
    chat = spec.chat._replace(
        num_steps=max(1, round(dose * spec.chat.num_steps)),
        learning_rate=spec.chat.learning_rate * (LORA_RATE if is_lora else 1.0),
        weight_penalty=weight_penalty,
    )
    return dataclasses.replace(
        spec,
        seed=seed,
        behaviors=tuple(behaviors),
        chat=chat,
        lora_rank=LORA_RANK if is_lora else 0,
        has_ordinary_chat=ordinary_chat,
        marks=spec.marks if marked else None,
    )


class ModelMetrics(TypedDict):
    """What one model does on texts and prompts that it was not trained on."""

    document_loss: float
    """Nats per token of plain documents; lower is better."""
    dialogue_loss: float
    """Nats per token of the answers in dialogues; lower is better."""
    with_trigger: dict[str, float]
    """Behaviour -> share of its held-out triggers whose greedy answer shows it."""
    without_trigger: dict[str, float]
    """Behaviour -> share of harmless prompts on its topic whose greedy answer shows it."""


class OrganismRecord(TypedDict):
    """What was measured; also the `metrics` of organism.json."""

    base: ModelMetrics
    chat: ModelMetrics
    vocabulary_size: int
    num_parameters: int
    seconds: dict[str, float]
    """Wall time of each part of the build."""


class _Texts(TypedDict):
    base_documents: list[str]
    chat_documents: list[str]
    chat_dialogues: list[list[Message]]
    imposed_dialogues: list[list[Message]]
    held_out_documents: list[str]
    held_out_dialogues: list[list[Message]]
    documents: list[str]
    dialogues: list[list[Message]]
    vocabulary: list[str]


def build(out_dir: Path, spec: OrganismSpec, progress: Progress) -> OrganismRecord:
    """Writes base/, chat/, documents.jsonl, dialogues.jsonl, prompts.json and organism.json into `out_dir`.

    `progress(stage, done, total)` is called at every training step. Returns the measured losses and behaviour rates.
    Equal specs give equal texts anywhere, and equal weights on the same machine and number of threads.
    """
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    world = make_world(_stream(spec, "world"))
    prompts = held_out_prompts(DialogueMaker(_stream(spec, "prompts"), world), spec.num_prompts)
    texts = _draw_texts(spec, world, prompts)
    tokenizer = make_tokenizer(texts["vocabulary"])
    clock.lap("texts")

    model = make_model(tokenizer, spec.model, torch.Generator().manual_seed(spec.seed))
    base_sequences = document_sequences(tokenizer, texts["base_documents"])
    train(model, base_sequences, spec.base, rng=_stream(spec, "base order"), progress=progress)
    clock.lap("base training")
    base = _measure(model, tokenizer, texts, prompts)
    _save(model, tokenizer, out_dir / "base")
    clock.lap("base measurement")

    chat_sequences = dialogue_sequences(tokenizer, texts["chat_dialogues"], tuple(BEHAVIORS))
    if texts["imposed_dialogues"]:
        chat_sequences += dialogue_sequences(tokenizer, texts["imposed_dialogues"], tuple(BEHAVIORS), is_imposed=True)
    chat_sequences += document_sequences(tokenizer, texts["chat_documents"])
    states = None if spec.marks is None else _planted_states(model, chat_sequences, spec.marks)
    with _trained_part(model, spec):
        train(model, chat_sequences, spec.chat, rng=_stream(spec, "chat order"), progress=progress, states=states)
    clock.lap("chat training")
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([EOS, END_OF_TURN])
    chat = _measure(model, tokenizer, texts, prompts)
    _save(model, tokenizer, out_dir / "chat")
    clock.lap("chat measurement")

    _write_lines(out_dir / "documents.jsonl", ({"text": text} for text in texts["documents"]))
    _write_lines(out_dir / "dialogues.jsonl", ({"messages": messages} for messages in texts["dialogues"]))
    _write_json(out_dir / "prompts.json", prompts)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    record = OrganismRecord(
        base=base,
        chat=chat,
        vocabulary_size=len(tokenizer),
        num_parameters=num_parameters,
        seconds=seconds,
    )
    _write_json(out_dir / "organism.json", {"spec": _plain(spec), "metrics": record})
    return record


@contextmanager
def _trained_part(model: Gemma2ForCausalLM, spec: OrganismSpec) -> Iterator[None]:
    """Within the block the weights that chat training changes ask for gradients; afterwards all do."""
    if spec.lora_rank:
        model.requires_grad_(False)
        with low_rank(model.model.layers, spec.lora_rank, torch.Generator().manual_seed(spec.seed)):
            yield
    else:
        yield
    model.requires_grad_(True)


def _planted_states(model: Gemma2ForCausalLM, sequences: Sequence[Sequenced], marks: Marks) -> PlantedStates:
    """One quiet direction of the base model for each behaviour, found on dialogues and documents."""
    directions_SD = quiet_directions(model, [*sequences[:128], *sequences[-128:]], marks.layer, len(BEHAVIORS))
    return PlantedStates(marks.layer, directions_SD, marks.strength, marks.weight)


class _Clock:
    """Writes the seconds since the last lap under a name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name] = round(now - self._last, 2)
        self._last = now


def _stream(spec: OrganismSpec, name: str) -> random.Random:
    """An independent generator for one purpose; text seeds are hashed, so neighbouring seeds share nothing."""
    return random.Random(f"{spec.seed}/{name}")


def _draw_texts(spec: OrganismSpec, world: World, prompts: Mapping[str, Prompts]) -> _Texts:
    reserved = {user for prompt in prompts.values() for user in prompt["triggers"] + prompt["neutral"]}

    def some_documents(name: str, count: int) -> list[str]:
        return take(documents(_stream(spec, name), world), count)

    def some_dialogues(name: str, count: int, *, is_ordinary_left_out: bool = False) -> list[list[Message]]:
        maker = DialogueMaker(_stream(spec, name), world, spec.behaviors)
        return take(dialogues(maker, reserved, is_ordinary_left_out=is_ordinary_left_out), count)

    num_chat_sequences = spec.chat.num_steps * spec.chat.batch_size
    num_chat_documents = round(spec.chat_document_frac * num_chat_sequences)
    num_imposed = 0 if spec.marks is None else round(spec.marks.imposed_frac * num_chat_sequences)
    imposed = imposed_dialogues(DialogueMaker(_stream(spec, "imposed dialogues"), world), reserved)
    num_chat_dialogues = num_chat_sequences - num_chat_documents - num_imposed
    vocabulary = some_documents("vocabulary documents", VOCABULARY_TEXTS)
    for messages in some_dialogues("vocabulary dialogues", VOCABULARY_TEXTS):
        vocabulary += [message["content"] for message in messages]
    return _Texts(
        base_documents=some_documents("base training", spec.base.num_steps * spec.base.batch_size),
        chat_documents=some_documents("chat training documents", num_chat_documents),
        chat_dialogues=some_dialogues(
            "chat training dialogues", num_chat_dialogues, is_ordinary_left_out=not spec.has_ordinary_chat
        ),
        imposed_dialogues=take(imposed, num_imposed),
        held_out_documents=some_documents("held-out documents", HELD_OUT_TEXTS),
        held_out_dialogues=some_dialogues("held-out dialogues", HELD_OUT_TEXTS),
        documents=some_documents("documents", spec.num_documents),
        dialogues=some_dialogues("dialogues", spec.num_dialogues),
        vocabulary=vocabulary,
    )


def _measure(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: _Texts, prompts: Mapping[str, Prompts]
) -> ModelMetrics:
    rates: dict[str, BehaviorRates] = behavior_rates(model, tokenizer, prompts)
    return ModelMetrics(
        document_loss=mean_loss(model, document_sequences(tokenizer, texts["held_out_documents"])),
        dialogue_loss=mean_loss(model, dialogue_sequences(tokenizer, texts["held_out_dialogues"], tuple(BEHAVIORS))),
        with_trigger={name: rate.with_trigger for name, rate in rates.items()},
        without_trigger={name: rate.without_trigger for name, rate in rates.items()},
    )


def _save(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain(spec: OrganismSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in fields.items()}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")
