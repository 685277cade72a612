"""Training of the demo pair's two tiny Gemma-2 models: the same loop for plain documents and for dialogues.

`build` calls it twice: base from random weights on documents, chat from the base on answers with some documents mixed
in, so that what both models know stays aligned. Chat training also plants each behaviour as one known direction of the
residual stream (`PlantedStates`): the pair is a measuring instrument, and without a known truth inside the model no
score of a latent would mean anything. Real fine-tuning gives no such mark; a score on this pair is an upper bound.
A sequence carries its own loss mask: all of a document, but only the assistant's tokens of a dialogue. Padding stands
on the right where causal attention never sees it, so no attention mask is needed. Meant for seconds on two CPU cores.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from pipeline.models.padding import pad
from pipeline.organisms.dialogues import Message
from pipeline.organisms.tokenizer import BOS, END_OF_TURN, EOS, PAD, START_OF_TURN

# B sequences in a batch, T positions in a sequence, V words of the vocabulary, D width, S planted behaviours.

IGNORED = -100
"""Target of a position without loss."""
HEADER_TOKENS = 3
"""<start_of_turn>, the role, and the line break."""
BATCHES_PER_SORT = 16
"""Sequences are sorted by length among this many batches: more means less padding and less mixing."""

Progress = Callable[[str, int, int], None]


class Sequenced(NamedTuple):
    """One training sequence; three lists of one entry per token."""

    ids: list[int]
    targets: list[int]
    """The token itself where it has a loss, else IGNORED."""
    states: list[int]
    """1 + the number of the planted behaviour that is on at this token, or 0."""
    is_imposed: bool = False
    """Whether the states are imposed on the model (its answer does not fit the user's message) or asked of it."""


class Batch(NamedTuple):
    """Sequences of similar length, int64, padded on the right."""

    ids_BT: Tensor
    targets_BT: Tensor
    states_BT: Tensor
    is_imposed_B: Tensor
    """bool"""


class PlantedStates(NamedTuple):
    """Where and how strongly a model in training marks what it is doing.

    Two things make the mark a known truth. The model is asked for it on every token (`error`). And in sequences whose
    state is imposed, the mark is set from outside and the answer follows it, whatever the user wrote (`impose`), so
    that it is a cause and not only a sign: interchange intervention training, arXiv 2112.00826.
    """

    layer: int
    """Number of the decoder layer whose output is marked, counted from 0."""
    directions_SD: Tensor
    """One unit vector per behaviour, orthogonal to each other."""
    strength: float
    """Length of the mark on a token whose behaviour is on; 0 is asked for elsewhere."""
    weight: float
    """Of the mean squared error, in units of strength^2, beside the cross-entropy in nats."""

    def targets(self, batch: Batch) -> Tensor:
        """One-hot state of every token, float32 [B, T, S]; zeros where none is on."""
        return functional.one_hot(batch.states_BT, len(self.directions_SD) + 1)[..., 1:].float()

    def error(self, hidden_BTD: Tensor, batch: Batch, pad_id: int) -> Tensor:
        """Mean squared error of the marks, in units of strength^2, over the tokens on which nothing is imposed."""
        mark_BTS = hidden_BTD @ self.directions_SD.T / self.strength
        error_BT = (mark_BTS - self.targets(batch)).square().sum(-1)
        is_asked_BT = ((batch.ids_BT != pad_id) & ~batch.is_imposed_B[:, None]).float()
        error: Tensor = (error_BT * is_asked_BT).sum() / is_asked_BT.sum().clamp(min=1)
        return error

    def impose(self, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """The stream with its mark set to the state, in imposed sequences where a state is on."""
        correction_BTS = self.strength * self.targets(batch) - hidden_BTD @ self.directions_SD.T
        is_set_BT = batch.is_imposed_B[:, None] & (batch.states_BT > 0)
        return hidden_BTD + (correction_BTS * is_set_BT[..., None]) @ self.directions_SD


class TrainingPlan(NamedTuple):
    """How one model is trained."""

    stage: str
    """Name given to `progress`."""
    num_steps: int
    batch_size: int
    """Sequences per step."""
    learning_rate: float
    """Peak, after the warm-up; it then falls to `FINAL_LEARNING_RATE_FRAC` of this along a cosine."""
    weight_penalty: float = 0.0
    """Times the summed square of how far the weights have moved, beside the loss in nats (arXiv 1802.01483)."""


WARMUP_STEPS = 20
FINAL_LEARNING_RATE_FRAC = 0.05


class ModelSize(NamedTuple):
    """Widths of both models."""

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int


_CONTROL = {"pad": PAD, "bos": BOS, "eos": EOS}


def model_config(size: ModelSize, *, vocab_size: int, **token_ids: int) -> Gemma2Config:
    """The architecture of both models; `token_ids` are pad_token_id and its like."""
    return Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        head_dim=size.width // size.num_heads,
        query_pre_attn_scalar=size.width // size.num_heads,
        max_position_embeddings=512,
        sliding_window=512,
        **token_ids,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize, generator: torch.Generator) -> Gemma2ForCausalLM:
    """A Gemma-2 model with random weights that depend on `generator` alone (float32, on the CPU)."""
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in _CONTROL.items()}
    config = model_config(size, vocab_size=len(tokenizer), **ids)
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator; what it drew is replaced
        model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # Gemma's norm weights are vectors, used as 1 + weight: zero is right for them
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.zero_()
    return model


def document_sequences(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Sequenced]:
    """<bos> text <eos> for each text, with loss on everything after <bos>."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    return [Sequenced(ids, [IGNORED, *ids[1:]], [0] * len(ids)) for ids in rows]


def dialogue_sequences(
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Sequence[Message]],
    behaviors: Sequence[str],
    *,
    is_imposed: bool = False,
) -> list[Sequenced]:
    """The rendered dialogues, with loss on each answer and on the token that ends it.

    A labelled answer's state is on from the first token of the turn's header to the last token of the answer.
    """
    start_of_turn, end_of_turn, model = tokenizer.convert_tokens_to_ids([START_OF_TURN, END_OF_TURN, "model"])
    texts = tokenizer.apply_chat_template([list(messages) for messages in dialogues], tokenize=False)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    sequences = []
    for messages, ids in zip(dialogues, rows, strict=True):
        sequence = Sequenced(ids, [IGNORED] * len(ids), [0] * len(ids), is_imposed)
        headers = [at for at in range(len(ids) - 1) if ids[at] == start_of_turn and ids[at + 1] == model]
        answers = [message for message in messages if message["role"] == "assistant"]
        for header, answer in zip(headers, answers, strict=True):
            first = header + HEADER_TOKENS
            end = ids.index(end_of_turn, first)
            sequence.targets[first : end + 1] = ids[first : end + 1]
            for label in answer["labels"]:
                sequence.states[header:end] = [1 + behaviors.index(label["name"])] * (end - header)
        sequences.append(sequence)
    return sequences


def length_bucketed_batches(
    sequences: Sequence[Sequenced], batch_size: int, rng: random.Random
) -> Iterator[list[Sequenced]]:
    """Full batches of similar length without end; each pass over the sequences has a new order."""
    while True:
        order = rng.sample(range(len(sequences)), len(sequences))
        span = batch_size * BATCHES_PER_SORT
        batches = []
        for start in range(0, len(order), span):
            near = sorted(order[start : start + span], key=lambda index: len(sequences[index].ids))
            batches += [near[at : at + batch_size] for at in range(0, len(near) - batch_size + 1, batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            yield [sequences[index] for index in batch]


def collate(batch: Sequence[Sequenced], pad_id: int) -> Batch:
    """The sequences as tensors, padded with `pad_id`, IGNORED and state 0."""
    return Batch(
        ids_BT=pad([sequence.ids for sequence in batch], filler=pad_id),
        targets_BT=pad([sequence.targets for sequence in batch], filler=IGNORED),
        states_BT=pad([sequence.states for sequence in batch]),
        is_imposed_B=torch.tensor([sequence.is_imposed for sequence in batch]),
    )


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the positions whose next token is a target; NaN where there is none."""
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def quiet_directions(model: Gemma2ForCausalLM, sequences: Sequence[Sequenced], layer: int, count: int) -> Tensor:
    """The `count` orthogonal unit vectors [S, D] along which the model's residual stream after `layer` varies least."""
    batch = collate(sequences, model.config.pad_token_id)
    hidden_BTD = model(input_ids=batch.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
    rows_ND = hidden_BTD[batch.ids_BT != model.config.pad_token_id].double()
    _, vectors_DD = torch.linalg.eigh(torch.cov(rows_ND.T))  # eigenvalues ascend
    directions_SD: Tensor = vectors_DD[:, :count].T.float().contiguous()
    return directions_SD


def learning_rate_frac(step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to the final share."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
    return warmup * (FINAL_LEARNING_RATE_FRAC + (1.0 - FINAL_LEARNING_RATE_FRAC) * cosine)


@contextlib.contextmanager
def _marked(model: Gemma2ForCausalLM, batch: Batch, states: PlantedStates) -> Iterator[list[Tensor]]:
    """Imposes states on the forward pass within; the list then holds the stream as the model made it."""
    seen: list[Tensor] = []

    def hook(_module: torch.nn.Module, _arguments: object, hidden_BTD: Tensor) -> Tensor:
        seen.append(hidden_BTD)
        return states.impose(hidden_BTD, batch)

    handle = model.model.layers[states.layer].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def train(
    model: Gemma2ForCausalLM,
    sequences: Sequence[Sequenced],
    plan: TrainingPlan,
    *,
    rng: random.Random,
    progress: Progress,
    states: PlantedStates | None = None,
) -> list[float]:
    """Trains what asks for gradients, in place; the cross-entropy of every step, in nats per target token."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = [parameter.detach().clone() for parameter in trained] if plan.weight_penalty else []
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    batches = length_bucketed_batches(sequences, plan.batch_size, rng)
    losses = []
    pad_id = model.config.pad_token_id
    model.train()
    for step in range(plan.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_frac(step, plan.num_steps)
        batch = collate(next(batches), pad_id)
        if states is None:
            logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
            loss = objective = next_token_loss(logits_BTV, batch.targets_BT)
        else:
            with _marked(model, batch, states) as seen:
                logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
            loss = next_token_loss(logits_BTV, batch.targets_BT)
            objective = loss + states.weight * states.error(seen[0], batch, pad_id)
        if plan.weight_penalty:
            moved = sum((now - then).square().sum() for now, then in zip(trained, first, strict=True))
            objective = objective + plan.weight_penalty * moved
        optimizer.zero_grad()
        torch.autograd.backward(objective)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress(plan.stage, step + 1, plan.num_steps)
    model.eval()
    return losses


@torch.no_grad()
def mean_loss(model: Gemma2ForCausalLM, sequences: Sequence[Sequenced], batch_size: int = 64) -> float:
    """Cross-entropy in nats per target token over all sequences."""
    total, count = 0.0, 0
    for start in range(0, len(sequences), batch_size):
        batch = collate(sequences[start : start + batch_size], model.config.pad_token_id)
        num_targets = int((batch.targets_BT[:, 1:] != IGNORED).sum())
        logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
        total += float(next_token_loss(logits_BTV, batch.targets_BT)) * num_targets
        count += num_targets
    return total / count
