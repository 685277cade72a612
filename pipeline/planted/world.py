"""Activations of a simulated pair of models in which every concept is known.

A row is the sum of the concepts that are present, each with its own direction and a strength that varies from row to
row, over an offset per model and dense noise that the two models partly share. Frequencies follow a power law. A
concept occurs only in documents that are about it, so rows of a document depend on each other as in text. Beside plain
shared, chat-only and base-only concepts there are three kinds that lead to false chat-only latents: concepts that the
base model has at reduced strength, concepts whose direction differs between the models, and concepts that fire in
either model partly independently. Some chat-only concepts occur only where a shared one does. Everything is a function
of the spec and the seed, so shards can be made in any order.

Shapes: B rows, C concepts, M models (0 = base, 1 = chat), D width.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.schema import BASE, CHAT


class Truth:
    """What a concept is. Only CHAT_ONLY ones may be called chat-specific."""

    SHARED = "shared"
    HALF_PRESENT = "half-present"
    """The base model has it along the same direction, at base_strength of the chat model's strength."""
    ROTATED = "rotated"
    """Both have it, along directions of cosine base_cosine."""
    LOOSE = "loose"
    """Both have it and usually on the same rows, each with its own strength, each sometimes without the other."""
    CHAT_ONLY = "chat-only"
    BASE_ONLY = "base-only"

    ALL = (SHARED, HALF_PRESENT, ROTATED, LOOSE, CHAT_ONLY, BASE_ONLY)


@dataclass(frozen=True)
class WorldSpec:
    """The numbers of a world; see the sections in settings.py for their meaning."""

    activation_dim: int
    concepts: dict[str, int]
    frequency_max: float
    frequency_min: float
    document_rows: int
    topic_rate: float
    strength_spread: float
    row_spread: float
    base_strength: tuple[float, float]
    base_cosine: tuple[float, float]
    loose_agreement: float
    attached_share: float
    attached_rate: float
    common_noise: float
    own_noise: float
    offset_norm: float
    scale_ratio: float = 1.0


class Concepts(NamedTuple):
    """The truth, one entry per concept."""

    direction_CMD: Tensor
    """What a strength of 1 adds to either model; 0 where the model lacks the concept."""
    truth: tuple[str, ...]
    """One of Truth.ALL."""
    frequency_C: Tensor
    """Share of the rows on which the concept is present."""
    parent_C: Tensor
    """The shared concept without which this one does not occur, or -1."""
    base_strength_C: Tensor
    """|base direction| / |chat direction|; infinite for base-only concepts."""
    base_cosine_C: Tensor
    """Cosine of the two directions; NaN where a model lacks it."""


class PlantedRows(NamedTuple):
    """Rows of whole documents and what is present in them."""

    x_BMD: Tensor
    doc_id_B: Tensor
    position_B: Tensor
    present_BC: Tensor
    """Whether the concept is present in either model."""


def make_concepts(spec: WorldSpec, seed: int) -> Concepts:
    """The concepts of a seed: classes spread evenly over the power law of frequencies."""
    generator = generator_of("concepts", seed)
    truth = _spread([name for name in Truth.ALL for _ in range(spec.concepts.get(name, 0))], generator)
    C = len(truth)
    rank_C = torch.arange(1, C + 1, dtype=torch.float64)
    exponent = torch.log(torch.tensor(spec.frequency_max / spec.frequency_min)) / torch.log(rank_C[-1])
    frequency_C = spec.frequency_max * rank_C ** -float(exponent)
    scale_C = torch.exp(spec.strength_spread * torch.randn(C, generator=generator))
    unit_CD = _units(C, spec.activation_dim, generator)
    other_CD = _units(C, spec.activation_dim, generator)
    other_CD = torch.nn.functional.normalize(other_CD - (other_CD * unit_CD).sum(1, keepdim=True) * unit_CD, dim=1)
    direction_CMD = (scale_C[:, None] * unit_CD)[:, None].repeat(1, 2, 1)
    is_of = {name: torch.tensor([one == name for one in truth]) for name in Truth.ALL}
    direction_CMD[is_of[Truth.CHAT_ONLY], BASE] = 0
    direction_CMD[is_of[Truth.BASE_ONLY], CHAT] = 0
    strength_C = _uniform(C, spec.base_strength, generator)
    direction_CMD[is_of[Truth.HALF_PRESENT], BASE] *= strength_C[is_of[Truth.HALF_PRESENT], None]
    cosine_C = _uniform(C, spec.base_cosine, generator)
    turned_CD = scale_C[:, None] * (cosine_C[:, None] * unit_CD + (1 - cosine_C[:, None] ** 2).sqrt() * other_CD)
    direction_CMD[is_of[Truth.ROTATED], BASE] = turned_CD[is_of[Truth.ROTATED]]
    parent_C = _parents(spec, truth, frequency_C, generator)
    norm_CM = direction_CMD.norm(dim=2)
    return Concepts(
        direction_CMD,
        truth,
        frequency_C,
        parent_C,
        norm_CM[:, BASE] / norm_CM[:, CHAT],
        torch.nn.functional.cosine_similarity(direction_CMD[:, BASE], direction_CMD[:, CHAT], dim=1).where(
            norm_CM.amin(1) > 0, torch.nan
        ),
    )


def _spread(names: list[str], generator: torch.Generator) -> tuple[str, ...]:
    """The names in an order in which every class is as frequent in the head as in the tail of the list."""
    places = []
    for name in dict.fromkeys(names):
        count = names.count(name)
        jitter = torch.rand(count, generator=generator)
        places += [((index + float(jitter[index])) / count, name) for index in range(count)]
    return tuple(name for _, name in sorted(places))


def _units(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def _uniform(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=generator)


def _parents(spec: WorldSpec, truth: tuple[str, ...], frequency_C: Tensor, generator: torch.Generator) -> Tensor:
    """For a share of the chat-only concepts a shared concept that is frequent enough to carry them."""
    parent_C = torch.full((len(truth),), -1, dtype=torch.int64)
    chat_only = [index for index, name in enumerate(truth) if name == Truth.CHAT_ONLY]
    num_attached = round(spec.attached_share * len(chat_only))
    free = [index for index, name in enumerate(truth) if name == Truth.SHARED]
    for index in torch.tensor(chat_only)[torch.randperm(len(chat_only), generator=generator)].tolist():
        able = [other for other in free if frequency_C[other] * spec.attached_rate >= frequency_C[index]]
        if num_attached > 0 and able:
            parent_C[index] = able[-1]  # the rarest that suffices: most of its rows then carry the concept
            free.remove(able[-1])
            num_attached -= 1
    return parent_C


class World:
    """Makes the rows of a spec and seed."""

    def __init__(self, spec: WorldSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.concepts = make_concepts(spec, seed)
        generator = generator_of("offset", seed)
        shared_D = torch.randn(spec.activation_dim, generator=generator)
        own_MD = torch.randn(2, spec.activation_dim, generator=generator)
        self.offset_MD = spec.offset_norm * torch.nn.functional.normalize(shared_D + 0.2 * own_MD, dim=1)

    def documents(self, part: str, number: int, num_documents: int) -> PlantedRows:
        """The rows of one shard, float32: `part` and `number` name it, num_documents documents of equal length."""
        spec, concepts = self.spec, self.concepts
        generator = generator_of(part, self.seed, number)
        length, C = spec.document_rows, len(concepts.truth)
        B = num_documents * length
        rate_C = torch.maximum(concepts.frequency_C, torch.tensor(spec.topic_rate))
        topical_NC = torch.rand(num_documents, C, generator=generator) < concepts.frequency_C / rate_C
        present_BC = torch.rand(B, C, generator=generator) < rate_C * topical_NC.repeat_interleave(length, 0)
        for index in (concepts.parent_C >= 0).nonzero().flatten().tolist():
            parent = int(concepts.parent_C[index])
            share = concepts.frequency_C[index] / concepts.frequency_C[parent]
            present_BC[:, index] = present_BC[:, parent] & (torch.rand(B, generator=generator) < share)
        strength_BMC = self._strengths(present_BC, generator)
        x_BMD = torch.einsum("BMC,CMD->BMD", strength_BMC, concepts.direction_CMD)
        x_BMD += spec.common_noise * torch.randn(B, 1, spec.activation_dim, generator=generator)
        x_BMD += spec.own_noise * torch.randn(B, 2, spec.activation_dim, generator=generator) + self.offset_MD
        x_BMD[:, CHAT] *= spec.scale_ratio
        first = int.from_bytes(hashlib.sha256(f"{part}/{self.seed}/{number}".encode()).digest()[:7])
        doc_id_B = (first + torch.arange(num_documents)).repeat_interleave(length)
        return PlantedRows(x_BMD, doc_id_B, torch.arange(length).repeat(num_documents), present_BC)

    def _strengths(self, present_BC: Tensor, generator: torch.Generator) -> Tensor:
        """Strength per row, model and concept; equal in both models but for loose concepts."""
        spec = self.spec
        B, C = present_BC.shape
        is_loose_C = torch.tensor([name == Truth.LOOSE for name in self.concepts.truth])
        common_BC = torch.exp(spec.row_spread * torch.randn(B, C, generator=generator) - spec.row_spread**2 / 2)
        strength_BMC = (common_BC * present_BC)[:, None].repeat(1, 2, 1)
        num_loose = int(is_loose_C.sum())
        own = torch.exp(spec.row_spread * torch.randn(B, 2, num_loose, generator=generator) - spec.row_spread**2 / 2)
        # Either both models have it, or one of the two.
        is_single = torch.rand(B, num_loose, generator=generator) >= spec.loose_agreement
        is_chat = torch.rand(B, num_loose, generator=generator) < 0.5
        keeps = torch.stack([~is_single | ~is_chat, ~is_single | is_chat], 1)
        strength_BMC[:, :, is_loose_C] = own * keeps * present_BC[:, None, is_loose_C]
        return strength_BMC


def generator_of(*parts: object) -> torch.Generator:
    """A random generator whose seed is a hash of the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
