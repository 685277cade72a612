"""Questions about latents in parallel, with every answer stored as soon as it comes.

The unit of work is one latent: an explanation, then the requests that test it. When all are explained, each latent's
contexts are judged once more by the next latent's explanation, as a control. Each answer is a file in a folder of the
storage, where the next run finds it; a request whose words have changed is made again. Only an endpoint and a storage
are needed here, no Ray and no model, so that a test can kill and continue a run within a second.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple, TypeVar

import pandas as pd

from pipeline.analyses.autointerp import Interpretation, InterpTask, TokenWindow, detection
from pipeline.analyses.autointerp_columns import ANSWER_COLUMNS, InterpStatus
from pipeline.analyses.autointerp_prompts import (
    Cost,
    Message,
    again_messages,
    cost_of,
    detect_messages,
    detection_cost,
    explain_messages,
    parse_detection,
    parse_explanation,
)
from pipeline.models.endpoint import Endpoint, Stopped
from pipeline.storage.filesystem import Storage

Parsed = TypeVar("Parsed")


class Kept(NamedTuple):
    """One request and what came back, as stored."""

    latent: int
    request: str
    """explain, or detect or control and a number."""
    messages: str
    """JSON of the messages sent first."""
    answer: str
    """The last answer as it came."""
    is_usable: bool
    num_malformed: int
    tokens_in: int
    tokens_out: int

    @property
    def name(self) -> str:
        """File name: latent, request, and a digest of the words, so that other words are another file."""
        return _file_name(self.latent, self.request, self.messages)


def _file_name(latent: int, request: str, messages: str) -> str:
    return f"{latent:07d}-{request.replace(' ', '-')}-{hashlib.sha256(messages.encode()).hexdigest()[:12]}.json"


class Answers:
    """The answers of one step, below `folder` of the storage; those of a killed run are there from the start."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self._kept: dict[str, Kept] = {}
        for name in storage.files(folder):
            self._kept[name] = Kept(**storage.read_json(f"{folder}/{name}"))

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, latent: int, request: str, messages: Sequence[Message]) -> Kept | None:
        """What is kept of this request in these words."""
        return self._kept.get(_file_name(latent, request, json.dumps(messages)))

    def has(self, latent: int, kind: str) -> bool:
        """Whether any answer to a request of this kind is kept about a latent."""
        return any(one.latent == latent and one.request.startswith(kind) for one in self._kept.values())

    def keep(self, one: Kept) -> None:
        """Publish an answer; safe from many threads, since each writes its own file and key."""
        self._storage.write_json(f"{self._folder}/{one.name}", one._asdict())
        self._kept[one.name] = one

    def table(self, latents: Sequence[int]) -> pd.DataFrame:
        """ANSWER_COLUMNS of these latents, in their order."""
        place = {latent: index for index, latent in enumerate(latents)}
        kept = sorted(
            (one for one in self._kept.values() if one.latent in place), key=lambda k: (place[k.latent], k.name)
        )
        return pd.DataFrame(kept, columns=[column.name for column in ANSWER_COLUMNS])


class Interview(NamedTuple):
    """How latents are asked about."""

    endpoint: Endpoint
    answers: Answers
    contexts_per_request: int
    num_repeats: int
    """Further tries after an answer that cannot be used."""

    def about(self, case: InterpTask) -> Interpretation:
        """Explanation and judgements of one latent."""
        kept, explanation = self._ask(case.latent, "explain", explain_messages(case), parse_explanation)
        if explanation is None:
            return _interpretation(case.latent, InterpStatus.UNEXPLAINED, [kept])
        fires, judged, strengths, spent = self._judge(case, explanation, "detect")
        status = InterpStatus.SCORED if set(fires) == {True, False} else InterpStatus.EXPLAINED
        result = _interpretation(case.latent, status, [kept, *spent])
        return result._replace(
            explanation=explanation, fires=tuple(fires), answers=tuple(judged), strengths=tuple(strengths)
        )

    def control(self, case: InterpTask, found: Interpretation, other: str) -> Interpretation:
        """The same latent with the score that another latent's explanation reaches on its contexts."""
        fires, judged, _, spent = self._judge(case, other, "control")
        cost = _interpretation(case.latent, found.status, spent)
        return found._replace(
            control=detection(fires, judged).balanced_accuracy,
            num_malformed=found.num_malformed + cost.num_malformed,
            tokens_in=found.tokens_in + cost.tokens_in,
            tokens_out=found.tokens_out + cost.tokens_out,
        )

    def _judge(
        self, case: InterpTask, explanation: str, kind: str
    ) -> tuple[list[bool], list[bool], list[float], list[Kept]]:
        """Of each judged context: whether the latent fires, what the model answered, strength; and the stored answers.

        A context's strength is its largest activation as a share of that of the latent's strongest context.
        """
        fires: list[bool] = []
        strengths: list[float] = []
        largest = max(case.explaining[0].activations)
        judged: list[bool] = []
        spent = []
        for part, truth, contexts in _parts(case, self.contexts_per_request):
            messages = detect_messages(explanation, contexts)
            kept, answer = self._ask(case.latent, f"{kind} {part}", messages, _reader(len(contexts)))
            spent.append(kept)
            if answer is not None:
                fires += truth
                judged += answer
                strengths += [max(context.activations) / largest for context in contexts]
        return fires, judged, strengths, spent

    def _ask(
        self, latent: int, request: str, messages: Sequence[Message], parse: Callable[[str], Parsed | None]
    ) -> tuple[Kept, Parsed | None]:
        """The answer, from the storage if it is there, and what could be read in it."""
        kept = self.answers.find(latent, request, messages)
        if kept is not None:
            return kept, parse(kept.answer)
        text, parsed, num_malformed, tokens_in, tokens_out = "", None, 0, 0, 0
        for attempt in range(self.num_repeats + 1):
            answer = self.endpoint.ask(messages if attempt == 0 else again_messages(messages, text))
            text, tokens_in, tokens_out = answer.text, tokens_in + answer.tokens_in, tokens_out + answer.tokens_out
            parsed = parse(text)
            if parsed is not None:
                break
            num_malformed += 1
        words, is_usable = json.dumps(messages), parsed is not None
        kept = Kept(latent, request, words, text, is_usable, num_malformed, tokens_in, tokens_out)
        self.answers.keep(kept)
        return kept, parsed


def pending_cost(answers: Answers, case: InterpTask, contexts_per_request: int, *, with_control: bool) -> Cost:
    """The expected cost of what is not answered yet about a latent."""
    messages = explain_messages(case)
    kept = answers.find(case.latent, "explain", messages)
    judging = detection_cost(case, contexts_per_request)
    controlling = judging if with_control and not answers.has(case.latent, "control") else Cost(0, 0, 0)
    if kept is None:
        return cost_of(messages, is_detection=False).plus(judging).plus(controlling)
    explanation = parse_explanation(kept.answer)
    if explanation is None:
        return Cost(0, 0, 0)
    cost = controlling
    for part, _, contexts in _parts(case, contexts_per_request):
        messages = detect_messages(explanation, contexts)
        if answers.find(case.latent, f"detect {part}", messages) is None:
            cost = cost.plus(cost_of(messages, is_detection=True))
    return cost


def _parts(
    case: InterpTask, contexts_per_request: int
) -> Iterator[tuple[int, tuple[bool, ...], tuple[TokenWindow, ...]]]:
    """Number of each request that tests an explanation, whether the latent fires in its contexts, and the contexts."""
    for part, start in enumerate(range(0, len(case.judged), contexts_per_request)):
        own = slice(start, start + contexts_per_request)
        yield part, case.fires[own], case.judged[own]


def _reader(number: int) -> Callable[[str], tuple[bool, ...] | None]:
    return lambda text: parse_detection(text, number)


def _interpretation(latent: int, status: str, spent: Sequence[Kept]) -> Interpretation:
    return Interpretation(
        latent,
        status,
        num_malformed=sum(kept.num_malformed for kept in spent),
        tokens_in=sum(kept.tokens_in for kept in spent),
        tokens_out=sum(kept.tokens_out for kept in spent),
    )


def interview_all(interview: Interview, cases: Sequence[InterpTask], *, concurrency: int) -> Iterator[Interpretation]:
    """Interpretations in the order in which they are ready, `concurrency` latents at a time."""
    yield from _side_by_side(interview, [partial(interview.about, case) for case in cases], concurrency)


def control_all(
    interview: Interview, cases: Sequence[InterpTask], found: Mapping[int, Interpretation], *, concurrency: int
) -> Iterator[Interpretation]:
    """The scored latents again, each with the score of the next latent's explanation on its contexts.

    Next in the order of the cases, the first following the last; latents whose neighbours are explained in the same
    words are left out.
    """
    scored = [case for case in cases if found[case.latent].status == InterpStatus.SCORED]
    tasks = []
    for case, following in zip(scored, [*scored[1:], *scored[:1]], strict=True):
        own, other = found[case.latent], found[following.latent].explanation
        if other is not None and other != own.explanation:
            tasks.append(partial(interview.control, case, own, other))
    yield from _side_by_side(interview, tasks, concurrency)


def _side_by_side(
    interview: Interview, tasks: Sequence[Callable[[], Interpretation]], concurrency: int
) -> Iterator[Interpretation]:
    """Results as they are ready.

    The first failure ends all waiting and is raised once no request is under way any more; so does leaving the loop.
    """
    with ThreadPoolExecutor(concurrency, thread_name_prefix="crossray-ask") as threads:
        futures: list[Future[Interpretation]] = [threads.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                if not isinstance(future.exception(), Stopped):
                    yield future.result()
        except BaseException:
            interview.endpoint.stop()
            for future in futures:
                future.cancel()
            raise
