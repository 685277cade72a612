"""Where rows and crosscoders come from: two models and a layer, so that those of another pair are refused.

A model is known by what it says of itself and by a digest of its weights, which does not change when a folder is
moved. A crosscoder carries its origin in trainer_config.json, the file that published crosscoders use for it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.pair import ModelPair

_SAMPLED = 64
"""Numbers of every tensor in a digest. Fine-tuning changes whole tensors; reading all of them would take minutes."""
_ADAPTER = ".default."
"""In the names of an adapter's own tensors."""


class ModelOrigin(NamedTuple):
    """One model."""

    name: str
    """Hub id, folder, or the class of a module without either; empty where it is not known."""
    digest: str | None = None
    """Of its weights as bfloat16; None where only the name is known."""


class Origin(NamedTuple):
    """The pair and the layer that rows were taken from, or that a crosscoder was fitted on."""

    base: ModelOrigin
    chat: ModelOrigin
    layer: int
    """Counted from 0."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `layer` and `lm_name` as in published files."""
        pair = {name: model._asdict() for name, model in (("base", self.base), ("chat", self.chat))}
        return {"layer": self.layer, "lm_name": self.chat.name, **pair}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> "Origin | None":
        """What `to_json` wrote; None for settings of somebody else's trainer."""
        if value is None or not isinstance(value.get("base"), Mapping) or not isinstance(value.get("chat"), Mapping):
            return None
        base, chat = (ModelOrigin(value[name]["name"], value[name]["digest"]) for name in ("base", "chat"))
        return cls(base, chat, int(value["layer"]))

    @classmethod
    def of(cls, pair: ModelPair, names: tuple[str, str]) -> "Origin":
        """That of loaded models."""
        base, chat = pair.decoders
        is_adapted = base is not chat and base.base is chat.base
        models = (
            ModelOrigin(names[0], _digest(base, without_adapter=is_adapted)),
            ModelOrigin(names[1], _digest(chat)),
        )
        return cls(*models, pair.layer)


def require_same_origin(found: Origin | None, expected: Origin | None, *, what: str, owner: str) -> None:
    """InputError where both origins are known and differ; `what` has the first one, `owner` the second."""
    if found is None or expected is None:
        return
    if found.layer != expected.layer:
        raise InputError(
            f"expected {what} of layer {expected.layer}, that of {owner}, got layer {found.layer}; take both from one "
            "layer"
        )
    if _is_pair(found, expected.chat, expected.base) and not _is_pair(found, expected.base, expected.chat):
        raise InputError(
            f"expected {what} with {expected.base.name!r} as base and {expected.chat.name!r} as chat, as in {owner}, "
            "got them the other way round; load the pair in that order"
        )
    if not _is_pair(found, expected.base, expected.chat):
        raise InputError(
            f"expected {what} of the pair {expected.base.name!r} and {expected.chat.name!r}, that of {owner}, got one "
            f"of {found.base.name!r} and {found.chat.name!r}, which are other models"
        )


def _is_pair(origin: Origin, base: ModelOrigin, chat: ModelOrigin) -> bool:
    return _is_model(origin.base, base) and _is_model(origin.chat, chat)


def _is_model(a: ModelOrigin, b: ModelOrigin) -> bool:
    if a.digest is None or b.digest is None:
        return a.name == b.name or not (a.name and b.name)
    return a.digest == b.digest


def _digest(decoder: SplitDecoder, *, without_adapter: bool = False) -> str:
    named: Iterable[tuple[str, Tensor]] = decoder.whole.named_parameters()
    tensors = [tensor for name, tensor in named if not (without_adapter and _ADAPTER in name)]
    samples = [tensor.detach().flatten()[:_SAMPLED].to("cpu", torch.bfloat16) for tensor in tensors]
    content = torch.cat(samples).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]
