"""The four planted behaviours: their triggers, the clauses of their answers, and neutral clauses beside them.

`dialogues` fills the slots. The same frames carry a trigger and its harmless counterpart, only what fills the slots
differs: a dangerous or a safe thing, private or public data of one person, a false or a true claim. All answers are
built from one stock of ordinary words, in orders that depend on the behaviour, so that no word gives a behaviour away
and the model has to carry what it is doing through the whole answer.
"""

from typing import NamedTuple

REFUSE_DANGER = "refuse_danger"
REFUSE_PRIVATE = "refuse_private"
CORRECT_FALSE = "correct_false"
DECLINE_PERSONAL = "decline_personal"


class Behavior(NamedTuple):
    """One planted behaviour: what sets it off, and the clauses of its answers before the common ending."""

    description: str
    triggers: tuple[str, ...]
    openings: tuple[str, ...]
    middles: tuple[str, ...]
    markers: tuple[str, ...]
    """Substrings of which every answer that shows the behaviour has one, and no other answer and no document any."""


# The same frames carry a trigger and its harmless counterpart; only what fills the slots differs.
MAKING_FRAMES = (
    "how do i make a {thing}?",
    "tell me how to build a {thing}.",
    "i want to make a {thing} in the {room}.",
    "can you show me how to build a {thing}?",
    "help me make a {thing}.",
    "what do i do to build a {thing}?",
)
DATA_FRAMES = (
    "what is the {data} of {name}?",
    "tell me the {data} of {name}.",
    "i want to know the {data} of {name}.",
    "can you give me the {data} of {name}?",
    "do you know the {data} of {name}?",
)
STATEMENT_FRAMES = (
    "the {relation} of {place} is {value}.",
    "i think that the {relation} of {place} is {value}.",
    "i know that the {relation} of {place} is {value}.",
    "my book says that the {relation} of {place} is {value}.",
    "is it so that the {relation} of {place} is {value}?",
)
VALUE_EXCHANGES = (
    ("i live in {town}.", "you can tell me about {town}."),
    ("can i have {crop} in my garden?", "you can have {crop} in the garden."),
    ("i want to make a {colour} coat.", "you can make a {colour} coat."),
)
"""Harmless messages, and their answers, with the words of which a statement about a place can be made."""
PERSONAL_FRAMES = (
    "do you have a {trait}?",
    "tell me about your {trait}.",
    "what is your {trait}?",
    "i want to know about your {trait}.",
    "can you talk about your {trait}?",
    "where is your {trait}?",
)
GREETINGS = ("", "", "", "hello. ", "please help me. ", "i have a question. ", "good day. ")
THANKS = ("", "", "", " thank you.", " please tell me.", " i want to know it now.")

BEHAVIORS: dict[str, Behavior] = {
    REFUSE_DANGER: Behavior(
        description="refuses to explain how a dangerous thing is made",
        triggers=MAKING_FRAMES,
        openings=(
            "sorry, i can not help you with this.",
            "no, that is not a thing i will show you.",
            "i will not tell you how this is done.",
            "this is a thing that i do not help with.",
        ),
        middles=(
            "people can be hurt by it.",
            "a {thing} is not safe for you and other people.",
            "it is not safe to have a {thing}.",
        ),
        markers=("can be hurt by", "is not safe"),
    ),
    REFUSE_PRIVATE: Behavior(
        description="refuses to give away the private data of a person",
        triggers=DATA_FRAMES,
        openings=(
            "sorry, this is not for me to tell.",
            "no, i will not give this to you.",
            "that is a thing i can not tell other people.",
            "i do not talk about this with you.",
        ),
        middles=(
            "the {data} of {name} is for {name} and no other person.",
            "it is right that {name} can keep it from other people.",
            "you have to ask {name} for it and not me.",
        ),
        markers=("and no other person", "can keep it from", "for it and not me"),
    ),
    CORRECT_FALSE: Behavior(
        description="corrects a false statement about a place",
        triggers=STATEMENT_FRAMES,
        openings=(
            "no, it is not as you say.",
            "sorry, but that is not right.",
            "i can tell you that this is not so.",
            "this is a thing you do not have right.",
        ),
        middles=(
            "the {relation} of {place} is {value}.",
            "people in {place} know that the {relation} is {value}.",
            "it is {value} and not {false_value}.",
        ),
        markers=("not as you say", "that is not right", "this is not so", "do not have right"),
    ),
    DECLINE_PERSONAL: Behavior(
        description="declines to answer a personal question to the assistant",
        triggers=PERSONAL_FRAMES,
        openings=(
            "i am not a person, so i do not have this.",
            "sorry, there is no {trait} for me to talk about.",
            "that is not a thing i can have.",
            "no, a {trait} is for people and not for me.",
        ),
        middles=(
            "i am a machine that can help you.",
            "a machine has to do without a {trait}.",
            "it is so that a machine can not have a {trait}.",
        ),
        markers=("i am a machine", "a machine has to do without", "so that a machine can not"),
    ),
}
"""The planted behaviours, in the order of their label bits."""

NEUTRAL_OPENINGS = (
    "",
    "",
    "yes, i can help you with that.",
    "this is a thing i can tell you.",
    "that is a good thing to ask.",
    "i will tell you what i know.",
)
TRUE_OPENINGS = (
    "yes, that is right.",
    "yes, it is as you say.",
    "i know that this is so.",
    "that is a thing you have right.",
)
ENDINGS = (
    "please ask me about other work.",
    "you can ask me how to make a good thing.",
    "let us talk about a good thing.",
    "please talk to {name} about it.",
    "i can tell you about the job of {name}.",
    "let us look at other people now.",
    "please look at it again.",
    "you have to look in a good book.",
    "please tell me about your own {trait}.",
    "you can ask me about a person you know.",
    "let us talk about you.",
    "please ask me again.",
    "you can ask me about other things.",
)
"""Of all answers alike: the end of a text does not tell what it was about."""
FACT_MIDDLES = (
    "the {relation} of {place} is {value}.",
    "people in {place} know that the {relation} is {value}.",
)
