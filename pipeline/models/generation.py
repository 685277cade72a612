"""Answers of one model, greedy or sampled, optionally steered at layer L, and how likely an answer is without steering.

The loop is our own, not the library's `generate`: each prompt of a batch may have its own steering vector, and settings
of a checkpoint (penalties, temperatures) must not decide what an analysis measures. Prompts are padded on the left with
exact positions, so a batch gives the tokens that each prompt gives alone; a sampled answer is drawn with its own
prompt's random numbers, so it does not depend on the batch either. Recurrent models that read padding get prompts of
one length at a time, and models without a cache that the library hands around read the whole text at every token.

Shapes: B prompts, T positions, N new tokens, D width, P chosen positions, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.padding import pad, pad_tokens

Positions = Literal["all", "prompt", "generated"]
OnToken = Callable[[list[list[int]]], bool]
"""Told the new tokens of every prompt after each of them; False ends the answers. Where a model reads padding, it is
called for the prompts of one length after the other."""


class Steering(NamedTuple):
    """What is added to the residual stream at layer L while a model answers."""

    vector: Tensor
    """[D], or [B, D] with one vector per prompt."""
    positions: Positions = "all"
    """Where it is added: all positions, those of the prompt, or those of generated tokens."""


class Sampling(NamedTuple):
    """How the next token is drawn; without it the likeliest one is taken."""

    temperature: float
    """> 0; logits are divided by it."""
    uniform_BN: Tensor
    """float64 in [0, 1), one number per prompt and new token: where in the cumulative probabilities the token lies."""


class AnswerLikelihood(NamedTuple):
    """How likely given answers are, one entry per prompt."""

    nll_B: Tensor
    """float64, summed nats over the answer's tokens; 0 for an empty answer."""
    num_tokens_B: Tensor
    """int64, tokens of the answer."""


@torch.no_grad()
def generate(
    decoder: SplitDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    steering: Steering | None = None,
    sampling: Sampling | None = None,
    use_cache: bool = True,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continuation of every prompt, without the stop token that ended it; greedy ties go to the smallest id.

    InputError for an empty prompt, one that does not fit the model's context together with its answer, or sampling
    numbers of another shape.
    """
    if not prompts:
        return []
    check_prompts(decoder, prompts, max_new_tokens)
    _check_sampling(sampling, len(prompts), max_new_tokens)
    if len(set(map(len, prompts))) > 1 and not decoder.ignores_left_padding:
        about = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "use_cache": use_cache, "on_token": on_token}
        return _by_length(decoder, prompts, steering, sampling, about)
    ids_BT, mask_BT = (part.to(decoder.device) for part in pad_tokens(prompts, on_left=True))
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=decoder.device)
    steer = None if steering is None else _Steer(decoder, steering, num_prompts=len(prompts))
    is_done_B = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
    new_BN = torch.zeros(len(prompts), 0, dtype=torch.int64, device=decoder.device)
    ended_BN = torch.zeros(len(prompts), 0, dtype=torch.bool, device=decoder.device)
    cache: Any = None
    with nullcontext() if steer is None else decoder.stream_edited(steer):
        for step in range(max_new_tokens):
            positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
            num_read = 1 if use_cache and step else ids_BT.shape[1]
            if steer is not None:
                steer.num_generated = min(step, num_read)
            output = decoder.body(
                input_ids=decoder.read(ids_BT[:, -num_read:]),
                attention_mask=mask_BT,
                position_ids=positions_BT[:, -num_read:],
                past_key_values=cache,
                use_cache=use_cache,
            )
            cache = getattr(output, "past_key_values", None) if use_cache else None
            use_cache = cache is not None  # models with a state of their own kind read everything again
            logits_BV = decoder.head(output.last_hidden_state[:, -1])
            next_B = logits_BV.argmax(-1) if sampling is None else _drawn(logits_BV, sampling, step)
            is_done_B = is_done_B | torch.isin(next_B, stops)
            new_BN = torch.cat([new_BN, next_B[:, None]], dim=1)
            ended_BN = torch.cat([ended_BN, is_done_B[:, None]], dim=1)
            if bool(is_done_B.all()) or (on_token is not None and not on_token(_without_ends(new_BN, ended_BN))):
                break
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
    return _without_ends(new_BN, ended_BN)


def _without_ends(new_BN: Tensor, ended_BN: Tensor) -> list[list[int]]:
    return [row[:length] for row, length in zip(new_BN.tolist(), (~ended_BN).sum(1).tolist(), strict=True)]


def _by_length(
    decoder: SplitDecoder,
    prompts: Sequence[Sequence[int]],
    steering: Steering | None,
    sampling: Sampling | None,
    about: Mapping[str, Any],
) -> list[list[int]]:
    """`generate` for prompts of one length after the other, so that none is padded."""
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted(set(map(len, prompts))):
        own = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        steer = steering
        if steering is not None and steering.vector.dim() > 1:
            steer = steering._replace(vector=steering.vector[own])
        drawn = None if sampling is None else sampling._replace(uniform_BN=sampling.uniform_BN[own])
        found = generate(decoder, [prompts[place] for place in own], steering=steer, sampling=drawn, **about)
        for place, answer in zip(own, found, strict=True):
            answers[place] = answer
    return answers


def check_prompts(decoder: SplitDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """InputError for an empty prompt, or one that is too long for the model's context with max_new_tokens after it."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise InputError("expected prompts with at least one token, got an empty one; drop prompts without text")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if decoder.context is not None and longest + max_new_tokens > decoder.context:
        room = decoder.context - max_new_tokens
        raise InputError(
            f"expected prompts of at most {room} tokens (the model's context of {decoder.context} less "
            f"{max_new_tokens} new tokens), got one of {longest}; shorten the prompt or the answer"
        )


def _check_sampling(sampling: Sampling | None, num_prompts: int, max_new_tokens: int) -> None:
    if sampling is None:
        return
    if not sampling.temperature > 0:
        raise InputError(f"expected a temperature above 0, got {sampling.temperature}; leave sampling out for greedy")
    if tuple(sampling.uniform_BN.shape) != (num_prompts, max_new_tokens):
        raise InputError(
            f"expected one uniform number per prompt and new token ({num_prompts}, {max_new_tokens}), got shape "
            f"{tuple(sampling.uniform_BN.shape)}; draw as many as the call generates"
        )


def _drawn(logits_BV: Tensor, sampling: Sampling, step: int) -> Tensor:
    """The token in which each prompt's number falls, by inverting the cumulative probabilities (float64)."""
    cumulative_BV = (logits_BV.double() / sampling.temperature).softmax(-1).cumsum(-1)
    wanted_B1 = sampling.uniform_BN[:, step, None].to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


@torch.no_grad()
def answer_likelihood(
    decoder: SplitDecoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> AnswerLikelihood:
    """The unsteered model's nats for every answer after its prompt, in fp32 softmax, summed in float64."""
    documents = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    nll_B = torch.zeros(len(documents), dtype=torch.float64)
    num_tokens_B = torch.tensor([len(answer) for answer in answers], dtype=torch.int64)
    if not documents or int(num_tokens_B.sum()) == 0:
        return AnswerLikelihood(nll_B, num_tokens_B)
    ids_BT = pad(documents).to(decoder.device)
    hidden_BTD = decoder.body(input_ids=decoder.read(ids_BT), use_cache=False).last_hidden_state.to(decoder.device)
    rows_P = torch.repeat_interleave(torch.arange(len(documents)), num_tokens_B)
    predicted_P = torch.cat([torch.arange(len(p), len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)])
    for here in decoder.head_chunks(len(rows_P)):
        logits_PV = decoder.head(hidden_BTD[rows_P[here], predicted_P[here] - 1]).float()
        targets_P = ids_BT[rows_P[here], predicted_P[here]]
        nll_P = -logits_PV.log_softmax(-1).gather(1, targets_P[:, None])[:, 0]
        nll_B.index_add_(0, rows_P[here], nll_P.double().cpu())
    return AnswerLikelihood(nll_B, num_tokens_B)


class _Steer:
    """The addition at layer L; `num_generated` says how many of the last positions were generated."""

    def __init__(self, decoder: SplitDecoder, steering: Steering, *, num_prompts: int) -> None:
        vector = steering.vector.to(decoder.device, decoder.base.dtype)
        expected = {(decoder.activation_dim,), (num_prompts, decoder.activation_dim)}
        if tuple(vector.shape) not in expected:
            raise InputError(
                f"expected a steering vector of width {decoder.activation_dim}, one or one per prompt ({num_prompts}), "
                f"got shape {tuple(vector.shape)}; steer with directions of the same model"
            )
        self.vector_B1D = vector.reshape(-1, 1, decoder.activation_dim)
        self.positions = steering.positions
        self.num_generated = 0

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        num_prompt = hidden_BTD.shape[1] - self.num_generated
        scale_T = torch.ones(hidden_BTD.shape[1], dtype=hidden_BTD.dtype, device=hidden_BTD.device)
        if self.positions == "prompt":
            scale_T[num_prompt:] = 0
        elif self.positions == "generated":
            scale_T[:num_prompt] = 0
        return hidden_BTD + scale_T[None, :, None] * self.vector_B1D
