"""What is planted is there: frequencies, classes, strengths, cosines, attachment; and shards in any order are equal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.run_file import load_as
from pipeline.planted.settings import BenchmarkConfig
from pipeline.planted.world import Truth, World, WorldSpec
from pipeline.schema import BASE, CHAT
from tests.planted.conftest import FILE


@pytest.fixture(scope="module")
def spec() -> WorldSpec:
    return load_as(BenchmarkConfig, Path(FILE)).world.spec()


def of(world: World, truth: str) -> list[int]:
    return [index for index, name in enumerate(world.concepts.truth) if name == truth]


def test_concepts_have_the_directions_that_their_kind_says(spec: WorldSpec) -> None:
    world = World(spec, 0)
    concepts = world.concepts
    assert {name: len(of(world, name)) for name in Truth.ALL} == spec.concepts
    norm_CM = concepts.direction_CMD.norm(dim=2)
    assert (norm_CM[of(world, Truth.CHAT_ONLY), BASE] == 0).all() and (
        norm_CM[of(world, Truth.BASE_ONLY), CHAT] == 0
    ).all()
    assert (norm_CM[of(world, Truth.CHAT_ONLY), CHAT] > 0.3).all()
    for truth, strengths, cosines in (
        (Truth.SHARED, (1, 1), (1, 1)),
        (Truth.HALF_PRESENT, spec.base_strength, (1, 1)),
        (Truth.ROTATED, (1, 1), spec.base_cosine),
        (Truth.LOOSE, (1, 1), (1, 1)),
    ):
        index = of(world, truth)
        strength, cosine = concepts.base_strength_C[index], concepts.base_cosine_C[index]
        assert (strength > strengths[0] - 1e-5).all() and (strength < strengths[1] + 1e-5).all()
        assert (cosine > cosines[0] - 1e-5).all() and (cosine < cosines[1] + 1e-5).all()
    assert float(concepts.frequency_C.max()) == pytest.approx(spec.frequency_max)
    assert float(concepts.frequency_C.min()) == pytest.approx(spec.frequency_min)


def test_every_kind_is_as_frequent_as_the_others(spec: WorldSpec) -> None:
    world = World(spec, 1)
    ranks = {name: sum(of(world, name)) / len(of(world, name)) for name in Truth.ALL}
    middle = (len(world.concepts.truth) - 1) / 2
    assert all(abs(rank - middle) < 0.12 * len(world.concepts.truth) for rank in ranks.values())


def test_rows_hold_the_concepts_at_their_frequencies_in_bursts(spec: WorldSpec) -> None:
    world = World(spec, 0)
    rows = world.documents("train", 0, 1500)
    frequency_C = rows.present_BC.double().mean(0)
    torch.testing.assert_close(frequency_C, world.concepts.frequency_C, rtol=0.3, atol=4e-3)
    by_document = rows.present_BC.view(1500, spec.document_rows, -1).any(1).double().mean(0)
    independent = 1 - (1 - frequency_C) ** spec.document_rows
    is_own_topic = (frequency_C < 0.05) & (world.concepts.parent_C < 0)
    assert (by_document[is_own_topic] < 0.6 * independent[is_own_topic]).all()


def test_attached_concepts_occur_only_with_their_parent_and_on_few_of_its_rows(spec: WorldSpec) -> None:
    world = World(spec, 0)
    present_BC = world.documents("train", 0, 1500).present_BC
    attached = (world.concepts.parent_C >= 0).nonzero().flatten().tolist()
    assert len(attached) == round(spec.attached_share * spec.concepts[Truth.CHAT_ONLY])
    for index in attached:
        parent = int(world.concepts.parent_C[index])
        assert world.concepts.truth[index] == Truth.CHAT_ONLY and world.concepts.truth[parent] == Truth.SHARED
        assert not bool((present_BC[:, index] & ~present_BC[:, parent]).any())
        assert float(present_BC[:, index].sum() / present_BC[:, parent].sum()) < spec.attached_rate + 0.08


def test_rows_without_noise_are_sums_of_their_concepts(spec: WorldSpec) -> None:
    silent = replace(spec, common_noise=0.0, own_noise=0.0, concepts={Truth.SHARED: 3, Truth.CHAT_ONLY: 2})
    world = World(silent, 3)
    rows = world.documents("train", 0, 200)
    x_BMD = rows.x_BMD - world.offset_MD
    assert float(x_BMD[~rows.present_BC.any(1)].abs().max()) < 1e-6
    only_chat = rows.present_BC[:, of(world, Truth.CHAT_ONLY)].any(1) & ~rows.present_BC[
        :, of(world, Truth.SHARED)
    ].any(1)
    assert float(x_BMD[only_chat, BASE].abs().max()) < 1e-6 and float(x_BMD[only_chat, CHAT].norm(dim=1).min()) > 0.1
    shared = rows.present_BC[:, of(world, Truth.SHARED)].any(1) & ~rows.present_BC[:, of(world, Truth.CHAT_ONLY)].any(1)
    torch.testing.assert_close(x_BMD[shared, BASE], x_BMD[shared, CHAT], rtol=1e-5, atol=1e-5)


def test_loose_concepts_agree_as_often_as_asked(spec: WorldSpec) -> None:
    loose = replace(spec, common_noise=0.0, own_noise=0.0, topic_rate=0.5, frequency_max=0.5, frequency_min=0.5)
    world = World(replace(loose, concepts={Truth.LOOSE: 1}, attached_share=0.0), 0)
    rows = world.documents("train", 0, 500)
    is_on_BM = (rows.x_BMD - world.offset_MD).norm(dim=2) > 1e-4
    assert bool((is_on_BM.any(1) == rows.present_BC[:, 0]).all())
    assert float(is_on_BM.all(1).sum() / is_on_BM.any(1).sum()) == pytest.approx(spec.loose_agreement, abs=0.03)


def test_a_shard_is_a_function_of_its_name_and_the_seed(spec: WorldSpec) -> None:
    first, second = World(spec, 5), World(spec, 5)
    second.documents("train", 0, 3)
    for one, other in zip(first.documents("train", 4, 20), second.documents("train", 4, 20), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.documents("train", 4, 20).x_BMD, first.documents("validation", 4, 20).x_BMD)
    assert not torch.equal(World(spec, 6).concepts.direction_CMD, first.concepts.direction_CMD)


def test_a_scale_ratio_multiplies_the_chat_models_rows_and_nothing_else(spec: WorldSpec) -> None:
    plain, scaled = (World(replace(spec, scale_ratio=ratio), 0).documents("train", 0, 3) for ratio in (1, 3))
    torch.testing.assert_close(scaled.x_BMD[:, 0], plain.x_BMD[:, 0])
    torch.testing.assert_close(scaled.x_BMD[:, 1], 3 * plain.x_BMD[:, 1])
    assert torch.equal(scaled.present_BC, plain.present_BC)
