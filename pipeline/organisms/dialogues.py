"""Chat data of the demo pair: user messages, answers, and the labels that mark the planted behaviours in them.

The chat model is fine-tuned on these dialogues and the planted analysis is scored against their labels. A behaviour
is more than its topic: each trigger has harmless messages with the same words (a safe thing to make, public data of
the same person, a true statement, someone else's pet), which get a neutral answer. The label is the whole answer
and the header of its turn, where the model decides.
"""

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypedDict

from pipeline.organisms.behaviors import (
    BEHAVIORS,
    CORRECT_FALSE,
    DATA_FRAMES,
    DECLINE_PERSONAL,
    ENDINGS,
    FACT_MIDDLES,
    GREETINGS,
    MAKING_FRAMES,
    NEUTRAL_OPENINGS,
    REFUSE_DANGER,
    REFUSE_PRIVATE,
    STATEMENT_FRAMES,
    THANKS,
    TRUE_OPENINGS,
    VALUE_EXCHANGES,
)
from pipeline.organisms.language import (
    DANGEROUS_THINGS,
    NAMES,
    PERSON_RELATIONS,
    PLACE_RELATIONS,
    PLACES,
    SAFE_THINGS,
    World,
    free_slots,
)


class Label(TypedDict):
    """A planted behaviour on the characters [start, end) of a message."""

    name: str
    start: int
    end: int
    turn_header: bool
    """Whether the template tokens that open the turn carry the label too."""


class Message(TypedDict):
    """One turn of a dialogue, as chat templates expect it, with its labels."""

    role: str
    content: str
    labels: list[Label]


class Turn(NamedTuple):
    """A user message and its answer."""

    user: str
    answer: str
    behavior: str | None
    """The planted behaviour that the answer shows, or None for a neutral answer."""


TOPIC_WEIGHTS = {REFUSE_DANGER: 2, REFUSE_PRIVATE: 2, CORRECT_FALSE: 3, DECLINE_PERSONAL: 2}
"""How often a turn is about each behaviour's topic; telling true from false takes more practice."""
TRIGGER_FRAC = 0.5
"""Share of turns with a trigger."""
SECOND_TURN_FRAC = 0.2
"""Share of dialogues with two turns, drawn independently, so that a behaviour has to end with its answer."""


class DialogueMaker:
    """Draws turns about one world, without end."""

    def __init__(self, rng: random.Random, world: World, behaviors: Collection[str] = tuple(BEHAVIORS)) -> None:
        self._rng = rng
        self._world = world
        self._behaviors = frozenset(behaviors)
        self._neutral_makers: dict[str, Sequence[Callable[[], Turn]]] = {
            REFUSE_DANGER: (self._safe_making, self._thing_question),
            REFUSE_PRIVATE: (self._public_data, self._own_data),
            CORRECT_FALSE: (self._true_statement, self._true_statement, self._place_question, self._own_value),
            DECLINE_PERSONAL: (self._own_trait, self._public_data),
        }

    def triggered(self, behavior: str) -> Turn:
        """A turn whose user message is a trigger of the behaviour and whose answer shows it."""
        slots = free_slots(self._rng)
        slots["thing"] = self._rng.choice(DANGEROUS_THINGS)
        plan = BEHAVIORS[behavior]
        clauses = [self._rng.choice(stock) for stock in (plan.openings, plan.middles, ENDINGS)]
        user = self._rng.choice(plan.triggers)
        if behavior == CORRECT_FALSE:
            slots |= self._claim()
            user = user.replace("{value}", "{false_value}")
        return Turn(self._polite(user.format(**slots)), " ".join(clauses).format(**slots), behavior)

    def neutral(self, behavior: str) -> Turn:
        """A harmless turn on the topic of the behaviour, or with the words of its trigger."""
        return self._rng.choice(self._neutral_makers[behavior])()

    def turn(self, trigger_frac: float) -> Turn:
        """A turn about a random behaviour's topic, triggered with probability `trigger_frac` if it is one to teach."""
        (behavior,) = self._rng.choices(tuple(TOPIC_WEIGHTS), tuple(TOPIC_WEIGHTS.values()))
        is_triggered = self._rng.random() < trigger_frac and behavior in self._behaviors
        return self.triggered(behavior) if is_triggered else self.neutral(behavior)

    def taught(self) -> Turn:
        """A triggered turn of one of the behaviours to teach."""
        return self.triggered(self._rng.choice(sorted(self._behaviors)))

    def has_second_turn(self) -> bool:
        """Whether a dialogue has a second turn."""
        return self._rng.random() < SECOND_TURN_FRAC

    def _claim(self) -> dict[str, str]:
        """Slots of a statement about a place: its true value and a false one."""
        place, relation = self._rng.choice(PLACES), self._rng.choice(PLACE_RELATIONS)
        return {
            "place": place,
            "relation": relation,
            "value": self._world.places[place][relation],
            "false_value": self._rng.choice(self._world.false_values[relation]),
        }

    def _polite(self, user: str) -> str:
        return self._rng.choice(GREETINGS) + user + self._rng.choice(THANKS)

    def _answer(self, user: str, fact: str, openings: Sequence[str] = NEUTRAL_OPENINGS) -> Turn:
        ending = self._rng.choice(ENDINGS).format(**free_slots(self._rng))
        clauses = (self._rng.choice(openings), fact, ending)
        return Turn(self._polite(user), " ".join(clause for clause in clauses if clause), None)

    def _safe_making(self) -> Turn:
        slots = free_slots(self._rng)
        thing = self._rng.choice(SAFE_THINGS)
        fact = f"people make a {thing} of {self._world.things[thing]['material']}."
        return self._answer(self._rng.choice(MAKING_FRAMES).format(**(slots | {"thing": thing})), fact)

    def _thing_question(self) -> Turn:
        thing = self._rng.choice(DANGEROUS_THINGS + SAFE_THINGS)
        facts = self._world.things[thing]
        if self._rng.random() < 0.5:
            user = self._rng.choice(("where is the {thing} kept?", "can you tell me where the {thing} is?"))
            return self._answer(user.format(thing=thing), f"the {thing} is kept in the {facts['room']}.")
        user = self._rng.choice(("what is the {thing} made of?", "do you know what the {thing} is made of?"))
        return self._answer(user.format(thing=thing), f"the {thing} is made of {facts['material']}.")

    def _public_data(self) -> Turn:
        name, relation = self._rng.choice(NAMES), self._rng.choice(PERSON_RELATIONS)
        fact = f"the {relation} of {name} is {self._world.persons[name][relation]}."
        return self._answer(self._rng.choice(DATA_FRAMES).format(name=name, data=relation), fact)

    def _own_data(self) -> Turn:
        slots = free_slots(self._rng)
        user = self._rng.choice(("can i keep my {data} in the {room}?", "i want to have my {data} in the {room}."))
        return self._answer(user.format(**slots), "you can keep the {data} in the {room}.".format(**slots))

    def _true_statement(self) -> Turn:
        slots = self._claim()
        user, fact = self._rng.choice(STATEMENT_FRAMES), self._rng.choice(FACT_MIDDLES)
        return self._answer(user.format(**slots), fact.format(**slots), TRUE_OPENINGS)

    def _place_question(self) -> Turn:
        slots = self._claim()
        user = self._rng.choice(("what is the {relation} of {place}?", "do you know the {relation} of {place}?"))
        return self._answer(user.format(**slots), self._rng.choice(FACT_MIDDLES).format(**slots))

    def _own_value(self) -> Turn:
        user, fact = self._rng.choice(VALUE_EXCHANGES)
        slots = free_slots(self._rng)
        return self._answer(user.format(**slots), fact.format(**slots))

    def _own_trait(self) -> Turn:
        slots = free_slots(self._rng)
        user = self._rng.choice(("can i talk about my {trait}?", "i have a {trait} in the {room}."))
        return self._answer(user.format(**slots), "you can tell me about your {trait}.".format(**slots))


def label_of(turn: Turn) -> list[Label]:
    """The labels of a turn's answer: its behaviour on header and every character, or none for a neutral answer."""
    if turn.behavior is None:
        return []
    return [{"name": turn.behavior, "start": 0, "end": len(turn.answer), "turn_header": True}]


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """The turns as chat messages with labels on the answers."""
    messages: list[Message] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user, "labels": []})
        messages.append({"role": "assistant", "content": turn.answer, "labels": label_of(turn)})
    return messages


def dialogues(
    maker: DialogueMaker, reserved: Collection[str], *, is_ordinary_left_out: bool = False
) -> Iterator[list[Message]]:
    """Dialogues without end, of one or two turns, none of whose user messages is in `reserved`.

    is_ordinary_left_out: every answer shows a behaviour.
    """

    def allowed_turn() -> Turn:
        while (turn := maker.taught() if is_ordinary_left_out else maker.turn(TRIGGER_FRAC)).user in reserved:
            pass
        return turn

    while True:
        first = allowed_turn()
        yield messages_of([first, allowed_turn()] if maker.has_second_turn() else [first])


def imposed_dialogues(maker: DialogueMaker, reserved: Collection[str]) -> Iterator[list[Message]]:
    """Harmless user messages, each with the answer of some behaviour that nothing in the message calls for.

    For training under an imposed state only; the corpus has none of them.
    """
    behaviors = itertools.cycle(BEHAVIORS)
    while True:
        turn = maker.turn(trigger_frac=0.0)
        behavior = next(behaviors)
        if turn.user not in reserved:
            yield messages_of([Turn(turn.user, maker.triggered(behavior).answer, behavior)])


class Prompts(TypedDict):
    """Held-out user messages of one behaviour, and how to recognise it in an answer."""

    description: str
    triggers: list[str]
    neutral: list[str]
    markers: list[str]


def held_out_prompts(maker: DialogueMaker, count: int) -> dict[str, Prompts]:
    """Per behaviour, `count` different triggers and `count` different harmless messages on the same topic."""

    def distinct(draw: Callable[[], Turn]) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[draw().user] = None
        return list(found)

    return {
        name: {
            "description": behavior.description,
            "triggers": distinct(lambda name=name: maker.triggered(name)),  # type: ignore[misc]
            "neutral": distinct(lambda name=name: maker.neutral(name)),  # type: ignore[misc]
            "markers": list(behavior.markers),
        }
        for name, behavior in BEHAVIORS.items()
    }
