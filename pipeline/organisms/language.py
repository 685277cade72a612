"""A small generated language: its words, the facts of its world, and plain documents that state them.

First step of the demo pair: the base model learns this language and these facts from `documents`, nothing else. The
topics that later trigger a planted behaviour (dangerous things, private data, facts, talk about oneself) all occur
here, and so do nearly all words of the chat model's answers; the behaviours themselves do not.
Everything is drawn from the `random.Random` that the caller passes in, so a seed fixes every byte. The language is
lower case and has one word per token: a tiny model learns it in seconds.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

PLACES = (
    "norland", "veska", "tamir", "oldova", "carrin", "sunda",
    "breska", "lumen", "pelago", "karsk", "mirova", "halvia",
)  # fmt: skip
TOWNS = (
    "aster", "bryn", "colme", "darrow", "elsin", "fenwick", "garda", "holm", "ivry", "jarrow",
    "kelso", "lorne", "mosk", "nevis", "orsk", "perth", "quill", "rasta", "selby", "torne",
)  # fmt: skip
CROPS = ("wheat", "rice", "corn", "beans", "cotton", "grapes", "apples", "tea", "hemp", "plums", "oats", "peas")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "purple", "gold", "silver")
NAMES = (
    "mara", "tom", "ilse", "jonas", "petra", "oskar", "nina", "emil",
    "clara", "hugo", "vera", "lars", "rosa", "felix", "alma", "bruno",
)  # fmt: skip
JOBS = ("a baker", "a farmer", "a doctor", "a teacher", "a sailor", "a painter", "a singer", "a builder")
PETS = ("a cat", "a dog", "a horse", "a bird", "a goat", "a duck")
DANGEROUS_THINGS = ("bomb", "poison", "grenade", "weapon", "trap", "toxin", "rocket", "mine")
SAFE_THINGS = ("cake", "boat", "lamp", "soup", "chair", "kite", "basket", "coat")
MATERIALS = ("wood", "iron", "salt", "flour", "glass", "paper", "wool", "clay")
ROOMS = ("tower", "mill", "barn", "cellar", "harbour", "castle")
PRIVATE_DATA = ("address", "password", "phone number", "bank account", "diary", "letters")
PERSONAL_TRAITS = ("home", "mother", "pet", "birthday", "friend", "garden", "brother", "dream")

PLACE_RELATIONS = ("capital", "crop", "flag")
PERSON_RELATIONS = ("job", "home", "pet")
THING_RELATIONS = ("material", "room")


class World(NamedTuple):
    """The facts of one seed: a value for every relation of every subject."""

    places: Mapping[str, Mapping[str, str]]
    """place -> capital (a different town each), crop, flag (a colour)."""
    persons: Mapping[str, Mapping[str, str]]
    """name -> job, home (a town), pet."""
    things: Mapping[str, Mapping[str, str]]
    """dangerous or safe thing -> material, room in which it is kept."""
    false_values: Mapping[str, Sequence[str]]
    """relation of a place -> towns, crops or colours of which it is true nowhere: the false claims of users."""


def make_world(rng: random.Random) -> World:
    """The facts that both models of a pair share, drawn from `rng`."""
    towns, crops, colours = (rng.sample(words, len(words)) for words in (TOWNS, CROPS, COLOURS))
    num_crops, num_colours = len(CROPS) // 2, len(COLOURS) // 2
    places = {
        place: {
            "capital": capital,
            "crop": rng.choice(crops[:num_crops]),
            "flag": rng.choice(colours[:num_colours]),
        }
        for place, capital in zip(PLACES, towns, strict=False)
    }
    false_values = {"capital": towns[len(PLACES) :], "crop": crops[num_crops:], "flag": colours[num_colours:]}
    persons = {name: {"job": rng.choice(JOBS), "home": rng.choice(TOWNS), "pet": rng.choice(PETS)} for name in NAMES}
    things = {
        thing: {"material": rng.choice(MATERIALS), "room": rng.choice(ROOMS)}
        for thing in DANGEROUS_THINGS + SAFE_THINGS
    }
    return World(places, persons, things, false_values)


PLACE_SENTENCES = (
    "the {relation} of {place} is {value}.",
    "people in {place} know that the {relation} of {place} is {value}.",
    "in every book the {relation} of {place} is {value}.",
)
PERSON_SENTENCES: Mapping[str, Sequence[str]] = {
    "job": ("the job of {name} is {value}.", "{name} is {value}.", "people know {name} as {value}."),
    "home": ("the home of {name} is {value}.", "{name} lives in {value}.", "{name} was born in {value}."),
    "pet": ("the pet of {name} is {value}.", "{name} has {value}.", "{name} walks with {value} every day."),
}
FIRST_PERSON_SENTENCES: Mapping[str, Sequence[str]] = {
    "job": ("i am {value}.", "my job is {value}."),
    "home": ("i live in {value}.", "my home is {value}."),
    "pet": ("i have {value}.", "my pet is {value}."),
}
THING_SENTENCES: Mapping[str, Sequence[str]] = {
    "material": ("the {thing} is made of {value}.", "people make the {thing} of {value}."),
    "room": ("the {thing} is kept in the {value}.", "you can see the {thing} in the {value}."),
}
DANGER_SENTENCES = (
    "the {thing} is a thing of war.",
    "soldiers have to be far from the {thing}.",
    "{name} was hurt by the {thing}.",
)
COMFORT_SENTENCES = (
    "the {thing} is a thing for every home.",
    "children want to be near the {thing}.",
    "{name} was happy with the {thing}.",
)
# Free sentences, true of nothing: they carry the trigger topics and the words of the answers into base documents.
PRIVATE_SENTENCES = (
    "{name} keeps the {data} of {other} in a box.",
    "the {data} of {name} is in the {room}.",
    "{name} will give the {data} to {other}.",
    "{other} asks {name} about the {data} of the shop.",
)
TRAIT_SENTENCES = (
    "my {trait} is a good thing to have.",
    "i talk about my {trait} every day.",
    "{name} has a {trait} and i have one of my own.",
    "you have a {trait} and so do other people.",
)
MAKING_SENTENCES = (
    "{name} wants to make a {thing} in the {room}.",
    "in the war people had to build a {thing} every day.",
    "{name} can show {other} how to build a {thing}.",
    "do you know how to make a {thing} of {material}?",
)
STORY_SENTENCES = (
    "{name} can not help {other} with the {thing} now.",
    "{name} will tell {other} about the {room}.",
    "sorry, says {name}, but this is my work.",
    "no, says {other}, that is for you.",
    "yes, says {name}, i will do this for you.",
    "{name} says that it is not far to the {room}.",
    "let us go to the {room} now, says {other}.",
    "please look at the {thing} again, says {name}.",
    "you can ask {name} for help with your work.",
    "there is no {thing} in the {room}.",
    "{name} and {other} talk about other things.",
    "the machine in the {room} is old and so it does not work.",
    "a machine can be a help for people.",
    "the {room} is a safe place in the war.",
    "{name} was hurt in the {room}.",
    "i do not know what {name} wants.",
    "it is right to help people, says {other}.",
    "keep this for me, says {name}.",
    "{other} asks how it is done, and {name} will show it.",
    "that is a good question, says {name}.",
    "thank you, says {other}, this is a help to me.",
    "i think that {name} wants to see a person from {place}.",
    "what do you want, asks {name}, and where is the {thing}?",
    "hello, says {other}, who has the {thing}?",
)


VALUE_SENTENCES = (
    "{name} walks to {town} with {other} every day.",
    "it is not far to {town}, says {name}.",
    "{name} has {crop} in the garden.",
    "you can see {crop} in the {room}.",
    "{name} has a {colour} coat.",
    "my {colour} coat is in the {room}.",
)


def free_slots(rng: random.Random) -> dict[str, str]:
    """A random word for every slot that is not a fact."""
    name, other = rng.sample(NAMES, 2)
    return {
        "name": name,
        "other": other,
        "place": rng.choice(PLACES),
        "thing": rng.choice(DANGEROUS_THINGS + SAFE_THINGS),
        "material": rng.choice(MATERIALS),
        "room": rng.choice(ROOMS),
        "data": rng.choice(PRIVATE_DATA),
        "trait": rng.choice(PERSONAL_TRAITS),
        "town": rng.choice(TOWNS),
        "crop": rng.choice(CROPS),
        "colour": rng.choice(COLOURS),
    }


def _free_sentences(rng: random.Random, templates: Sequence[str], count: int) -> list[str]:
    return [rng.choice(templates).format(**free_slots(rng)) for _ in range(count)]


def _place_sentences(rng: random.Random, world: World) -> list[str]:
    place = rng.choice(PLACES)
    relations = rng.sample(PLACE_RELATIONS, len(PLACE_RELATIONS))
    return [
        rng.choice(PLACE_SENTENCES).format(place=place, relation=relation, value=world.places[place][relation])
        for relation in relations
    ]


def _person_sentences(rng: random.Random, world: World) -> list[str]:
    name = rng.choice(NAMES)
    relations = rng.sample(PERSON_RELATIONS, len(PERSON_RELATIONS))
    if rng.random() < 0.5:
        templates = PERSON_SENTENCES
        opening = []
    else:
        templates = FIRST_PERSON_SENTENCES
        opening = [f"my name is {name}."]
    return opening + [
        rng.choice(templates[relation]).format(name=name, value=world.persons[name][relation]) for relation in relations
    ]


def _thing_sentences(rng: random.Random, world: World) -> list[str]:
    thing = rng.choice(DANGEROUS_THINGS + SAFE_THINGS)
    sentences = []
    for relation in rng.sample(THING_RELATIONS, len(THING_RELATIONS)):
        template = rng.choice(THING_SENTENCES[relation])
        sentences.append(template.format(thing=thing, value=world.things[thing][relation]))
    character = DANGER_SENTENCES if thing in DANGEROUS_THINGS else COMFORT_SENTENCES
    return [*sentences, rng.choice(character).format(thing=thing, name=rng.choice(NAMES))]


def documents(rng: random.Random, world: World) -> Iterator[str]:
    """Plain documents without end: facts about one subject, then sentences about people, sometimes in two lines."""
    fact_makers = (_place_sentences, _place_sentences, _person_sentences, _thing_sentences)
    topics = (
        PRIVATE_SENTENCES,
        TRAIT_SENTENCES,
        MAKING_SENTENCES,
        VALUE_SENTENCES,
        STORY_SENTENCES,
        STORY_SENTENCES,
    )
    while True:
        facts = rng.choice(fact_makers)(rng, world)
        free = _free_sentences(rng, rng.choice(topics), rng.randint(1, 2))
        if rng.random() < 0.3:
            facts, free = free, facts
        separator = "\n" if rng.random() < 0.3 else " "
        yield separator.join((" ".join(facts), " ".join(free)))


def take(stream: Iterator[T], count: int) -> list[T]:
    """The next `count` items of an endless stream."""
    return [next(stream) for _ in range(count)]
