"""Answers under steering while they are written: base, chat, chat with the latents, chat with random directions.

A thread of its own writes; the visitor's generator takes what is there and may end it between two tokens. All answers
of the chat model are one batch, so they grow side by side.

Shapes: A answers of the chat model, D width, R random controls.
"""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.analyses.steering import steering_effect
from pipeline.analyses.steering_inputs import directions_of, random_controls
from pipeline.errors import InputError
from pipeline.explorer.address import View
from pipeline.explorer.asked import scales_of, text_of
from pipeline.explorer.source import Explored
from pipeline.library.pair import Pair
from pipeline.library.texts import prompts_of
from pipeline.models.generation import Sampling, Steering
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT

MAX_TOKENS, MAX_RANDOM = 512, 4
_YIELD_SECONDS = 0.1
"""Between two states that a visitor is shown."""


class Answer(NamedTuple):
    """One answer, finished or not."""

    label: str
    text: str = ""
    num_tokens: int = 0
    kl: float = float("nan")
    """KL(p || p_steered), nats per token, p being the chat model unsteered; NaN where nothing is added or not yet."""
    nll: float = float("nan")
    """Nats per token under the unsteered chat model: higher is less fluent; NaN until the answer is finished."""


class Answers(NamedTuple):
    """All answers at one moment."""

    answers: tuple[Answer, ...]
    num_done: int
    """Tokens of the longest answer, of both models together."""
    num_wanted: int
    """Most that they can be."""
    state: str
    """waiting, writing, stopped or done."""


def steering_vector(crosscoder: Crosscoder, latents: pd.DataFrame, scales: Mapping[int, float]) -> Tensor:
    """Sum over latents of scale * largest f_j * d_j^chat in raw activation space, float32 [D]; as the report counts.

    latents: columns latent and max_activation. InputError for a latent that does not exist or never fires.
    """
    directions = directions_of(crosscoder, latents, list(scales))
    parts = [scales[own.latent] * own.max_contribution * own.unit_D for own in directions]
    return torch.stack(parts).sum(0)


def answers_of(explored: Explored, view: View, stop: threading.Event) -> Iterator[Answers]:
    """States until all answers are there, or until `stop` is set. InputError for what cannot be answered."""
    name = explored.crosscoder_name(view.crosscoder)
    scales = scales_of(view.steer)
    if not 1 <= view.tokens <= MAX_TOKENS:
        raise InputError(f"tokens: expected between 1 and {MAX_TOKENS}, got {view.tokens}")
    if view.temperature < 0:
        raise InputError(f"temperature: expected at least 0, got {view.temperature}")
    crosscoder, latents = explored.crosscoder(name), explored.columns(name, ("latent", "max_activation"))
    vector_D = steering_vector(crosscoder, latents, scales)
    num_random = min(max(view.random, 0), MAX_RANDOM)
    controls_RD = random_controls(crosscoder, latents, excluded=list(scales), num=num_random, seed=0)
    vector_AD = torch.stack([torch.zeros_like(vector_D), vector_D, *(vector_D.norm() * own for own in controls_RD)])
    named = ", ".join(f"{latent} x {scale:g}" for latent, scale in scales.items())
    labels = ["base", "chat", f"chat with {named}", *(f"chat, random {place + 1}" for place in range(len(controls_RD)))]
    writing = _Writing(labels, view, vector_AD, stop)
    yield from writing.states(explored)


class _Writing:
    """One visitor's answers while a thread writes them."""

    def __init__(self, labels: Sequence[str], view: View, vector_AD: Tensor, stop: threading.Event) -> None:
        self.answers = [Answer(label) for label in labels]
        self.view, self.vector_AD, self.stop = view, vector_AD, stop
        self._states: queue.SimpleQueue[Answers | BaseException | None] = queue.SimpleQueue()
        self._num_done = 0

    def states(self, explored: Explored) -> Iterator[Answers]:
        """What is there, at most every _YIELD_SECONDS; the thread has ended when this has."""
        yield self._state("waiting")
        thread = threading.Thread(target=self._work, args=(explored,), name="explorer-steering", daemon=True)
        thread.start()
        try:
            shown = 0.0
            while (state := self._states.get()) is not None:
                if isinstance(state, BaseException):
                    raise state
                if time.monotonic() - shown >= _YIELD_SECONDS or state.state != "writing":
                    shown = time.monotonic()
                    yield state
        finally:
            self.stop.set()
            thread.join()

    def _work(self, explored: Explored) -> None:
        try:
            with explored.models() as pair, torch.no_grad():
                self._write(pair)
        except BaseException as error:  # raised again in the visitor's thread
            self._states.put(error)
        finally:
            self._states.put(None)

    def _write(self, pair: Pair) -> None:
        (prompt,) = prompts_of(pair.tokenizer, [text_of(self.view.prompt)])
        num_chat = len(self.vector_AD)
        steering = Steering(self.vector_AD)
        ids = pair.models.generate(
            [prompt], self.view.tokens, model=BASE, sampling=self._sampling(1), on_token=partial(self._told, pair, 0, 0)
        )
        chat_ids: list[list[int]] = [[] for _ in range(num_chat)]
        if not self.stop.is_set():
            chat_ids = pair.models.generate(
                [prompt] * num_chat,
                self.view.tokens,
                steering,
                model=CHAT,
                sampling=self._sampling(num_chat),
                on_token=partial(self._told, pair, 1, len(ids[0])),
            )
        is_stopped = self.stop.is_set()
        self._show(pair, 0, [*ids, *chat_ids])
        effect = steering_effect(pair.models, CHAT, [prompt] * num_chat, chat_ids, steering)
        of_base = pair.models.answer_likelihood([prompt], ids)
        nll = [float(of_base.nll_B[0]), *effect.nll_B.tolist()]
        kl = [float("nan"), float("nan"), *effect.kl_B.tolist()[1:]]
        self.answers = [
            one._replace(
                nll=nll[place] / one.num_tokens if one.num_tokens else float("nan"), kl=kl[place] / (one.num_tokens + 1)
            )
            for place, one in enumerate(self.answers)
        ]
        self._states.put(self._state("stopped" if is_stopped else "done"))

    def _sampling(self, num: int) -> Sampling | None:
        """The same random numbers for every answer, so that what differs is the steering."""
        if self.view.temperature == 0:
            return None
        drawn_N = np.random.default_rng(0).random(self.view.tokens)
        return Sampling(self.view.temperature, torch.from_numpy(np.tile(drawn_N, (num, 1))))

    def _told(self, pair: Pair, first: int, num_before: int, ids: list[list[int]]) -> bool:
        self._num_done = num_before + max(map(len, ids))
        self._show(pair, first, ids)
        self._states.put(self._state("writing"))
        return not self.stop.is_set()

    def _show(self, pair: Pair, first: int, ids: Sequence[Sequence[int]]) -> None:
        texts = [str(pair.tokenizer.decode(own, skip_special_tokens=True)).strip() for own in ids]
        for place, (text, own) in enumerate(zip(texts, ids, strict=True), first):
            self.answers[place] = self.answers[place]._replace(text=text, num_tokens=len(own))

    def _state(self, state: str) -> Answers:
        return Answers(tuple(self.answers), self._num_done, 2 * self.view.tokens, state)
