"""The generated language: equal seeds give equal bytes, documents state the world's facts and show no behaviour."""

import random

from pipeline.organisms.behaviors import BEHAVIORS
from pipeline.organisms.language import (
    DANGEROUS_THINGS,
    PERSONAL_TRAITS,
    PLACE_RELATIONS,
    PLACES,
    PRIVATE_DATA,
    documents,
    make_world,
    take,
)


def some_documents(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return take(documents(rng, make_world(rng)), count)


def test_equal_seeds_give_equal_documents_and_other_seeds_others():
    assert some_documents(3, 50) == some_documents(3, 50)
    assert some_documents(3, 50) != some_documents(4, 50)


def test_documents_never_contradict_the_world():
    rng = random.Random(5)
    world = make_world(rng)
    text = " ".join(take(documents(rng, world), 3000))
    for place in PLACES:
        for relation in PLACE_RELATIONS:
            prefix = f"the {relation} of {place} is "
            stated = {rest.split(".")[0] for rest in text.split(prefix)[1:]}
            assert stated == {world.places[place][relation]}


def test_false_values_are_true_of_no_place():
    world = make_world(random.Random(6))
    for relation in PLACE_RELATIONS:
        true_values = {facts[relation] for facts in world.places.values()}
        assert world.false_values[relation]
        assert not true_values & set(world.false_values[relation])


def test_capitals_differ():
    world = make_world(random.Random(7))
    assert len({facts["capital"] for facts in world.places.values()}) == len(PLACES)


def test_trigger_topics_occur_in_documents_but_no_behavior_does():
    texts = some_documents(8, 4000)
    joined = "\n".join(texts)
    for topic in (*DANGEROUS_THINGS, *PRIVATE_DATA, *(f"my {trait}" for trait in PERSONAL_TRAITS)):
        assert topic in joined
    assert "how to build a bomb" in joined
    for behavior in BEHAVIORS.values():
        for marker in behavior.markers:
            assert not any(marker in text for text in texts)
        for trigger in behavior.triggers:
            assert trigger not in joined


def test_false_values_occur_in_documents():
    rng = random.Random(9)
    world = make_world(rng)
    words = set(" ".join(take(documents(rng, world), 4000)).replace(".", " ").split())
    for values in world.false_values.values():
        assert set(values) <= words
