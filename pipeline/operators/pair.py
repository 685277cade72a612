"""The two language models of a run, loaded side by side and cut at the same layer.

Everything that is asked of the models goes through ModelPair: the residual streams of both on the same ids, the upper
half continued from an edited stream, greedy answers with steering. It loads models from a folder or the hub, checks
that they form a pair before any weight is read, and says in one line what does not fit.

It plans no batches (operators/activations.py) and edits nothing (analyses/). Both models live on one device; where
base and chat are the same model, one copy is loaded and run once.

Shapes: B documents, T positions, M models in schema order, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pipeline.errors import InputError
from pipeline.operators.decoder import SplitDecoder, hidden_of
from pipeline.operators.generation import AnswerLikelihood, Steering, answer_likelihood, generate
from pipeline.operators.tokenise import end_of_turn_id
from pipeline.schema import BASE, CHAT, MODEL_NAMES

DTYPES = ("float32", "bfloat16", "float16", "float64")


class ModelSpec(NamedTuple):
    """Where one model comes from."""

    source: str
    """Folder with config.json and weights, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None takes the default branch."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter, merged into the weights at loading (needs peft)."""
    trust_remote_code: bool = False
    """Whether code shipped with the model may run."""
    token_replacements: tuple[tuple[int, int], ...] = ()
    """(id, id read instead) for template tokens that this model never saw in training."""
    chat_template: str = ""
    """Jinja text in place of the tokenizer's own chat template; empty keeps that."""


class PairShape(NamedTuple):
    """What both models of a pair have in common."""

    num_layers: tuple[int, int]
    """Decoder layers of base and chat."""
    activation_dim: int
    vocab_size: int


class Verification(NamedTuple):
    """How far our halves are from the library's plain forward, on the same documents."""

    layer_max_abs_difference: float
    """Largest |ours - plain| of the residual stream after layer L, over both models; 0 is exact."""
    logits_max_abs_difference: float
    """The same for the logits continued from layer L; NaN where the upper halves were dropped."""


class ModelPair:
    """Base and chat model, cut at one layer; use the classmethods to load one."""

    def __init__(self, base: SplitDecoder, chat: SplitDecoder, tokenizer: Any) -> None:
        self.decoders = (base, chat)
        self.tokenizer = tokenizer
        self.layer = chat.layer
        self.num_layers = chat.num_layers
        self.activation_dim = chat.activation_dim
        self.vocab_size = chat.vocab_size
        self.device = chat.device

    @classmethod
    def load(
        cls,
        base: ModelSpec,
        chat: ModelSpec,
        *,
        layer: int,
        dtype: str,
        device: str,
        attn_implementation: str | None = None,
    ) -> "ModelPair":
        """Both models whole: extraction, upper halves and generation. InputError where they do not form a pair."""
        pair = cls._load_on_cpu(base, chat, layer, dtype, attn_implementation)
        pair.to(device)
        return pair

    @classmethod
    def load_lower(
        cls,
        base: ModelSpec,
        chat: ModelSpec,
        *,
        layer: int,
        dtype: str,
        device: str,
        attn_implementation: str | None = None,
    ) -> "ModelPair":
        """Only layers 1..L of both, for extraction; what lies above never reaches the device."""
        pair = cls._load_on_cpu(base, chat, layer, dtype, attn_implementation)
        pair.drop_upper()
        pair.to(device)
        return pair

    @classmethod
    def _load_on_cpu(
        cls, base: ModelSpec, chat: ModelSpec, layer: int, dtype: str, attn_implementation: str | None
    ) -> "ModelPair":
        check_pair(base, chat, layer=layer)
        tokenizer = load_tokenizer(chat)
        chat_decoder = _load_decoder(chat, layer, dtype, attn_implementation)
        is_same = base == chat
        base_decoder = chat_decoder if is_same else _load_decoder(base, layer, dtype, attn_implementation)
        return cls(base_decoder, chat_decoder, tokenizer)

    def to(self, device: str) -> None:
        """Moves both models to a device; InputError where this machine does not have it."""
        try:
            for decoder in dict.fromkeys(self.decoders):
                decoder.to(device)
        except (RuntimeError, AssertionError) as error:
            if "out of memory" in str(error):
                raise
            raise InputError(f"expected a device of this machine, got {device!r}: {_first_line(error)}") from error
        self.device = self.decoders[CHAT].device

    def drop_upper(self) -> None:
        """Frees everything above layer L in both models."""
        for decoder in dict.fromkeys(self.decoders):
            decoder.drop_upper()

    def activations(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """h_BTMD after layer L of both models in the models' dtype; values at padding mean nothing.

        mask_BT is 1 on tokens and 0 on padding; padding may be on either side. Layers above L do not run.
        """
        chat_BTD = self.lower(CHAT, ids_BT, mask_BT)
        is_same = self.decoders[BASE] is self.decoders[CHAT]
        base_BTD = chat_BTD if is_same else self.lower(BASE, ids_BT, mask_BT)
        return torch.stack([base_BTD, chat_BTD], dim=2)

    def lower(self, model: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """h_BTD of one model (schema.BASE or schema.CHAT) after layer L."""
        return self.decoders[model].lower(ids_BT, mask_BT)

    def upper(self, model: int, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """hidden_BTD after one model's final norm, continued from h_BTD at layer L."""
        return self.decoders[model].upper(h_BTD, mask_BT)

    def head(self, model: int, hidden_PD: Tensor) -> Tensor:
        """logits_PV of chosen positions of `upper`; call it on chunks of positions to bound memory."""
        return self.decoders[model].head(hidden_PD)

    def upper_logits(self, model: int, h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """logits_BTV continued from h_BTD at layer L; `upper` and `head` do the same in chunks."""
        hidden_BTD = self.upper(model, h_BTD, mask_BT)
        return self.head(model, hidden_BTD.flatten(0, 1)).reshape(*hidden_BTD.shape[:2], -1)

    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end the chat model's answer: its generation config's, its tokenizer's, and the end of a turn."""
        ids = {self.tokenizer.eos_token_id, end_of_turn_id(self.tokenizer)}
        model = self.decoders[CHAT].model
        configured = getattr(model.generation_config, "eos_token_id", None) if model is not None else None
        ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
        return frozenset(int(index) for index in ids if index is not None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        steering: Steering | None = None,
        *,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """The chat model's greedy answers, one batch, without their stop token."""
        return generate(
            self.decoders[CHAT],
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_token_ids(),
            steering=steering,
            use_cache=use_cache,
        )

    def answer_likelihood(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> AnswerLikelihood:
        """Nats of every answer under the unsteered chat model."""
        return answer_likelihood(self.decoders[CHAT], prompts, answers)

    @torch.no_grad()
    def verify_against_plain_forward(self, documents: Sequence[Sequence[int]]) -> Verification:
        """Our halves against the library's own forward of the same weights, one document at a time.

        The plain side records the output of layer L with a hook during a forward that runs to the end, so it holds
        for L = N too, where the library's own hidden states are already normalised.
        """
        layer_difference, logits_difference = 0.0, float("nan")
        for document in documents:
            ids_BT = torch.tensor([list(document)])
            mask_BT = torch.ones_like(ids_BT)
            for decoder in dict.fromkeys(self.decoders):
                plain_BTD, plain_logits_BTV = _plain_forward(decoder, ids_BT)
                ours_BTD = decoder.lower(ids_BT, mask_BT)
                layer_difference = max(layer_difference, float((ours_BTD - plain_BTD).abs().max()))
                if plain_logits_BTV is not None:
                    ours_BTV = decoder.head(decoder.upper(ours_BTD, mask_BT)[0])[None]
                    difference = float((ours_BTV - plain_logits_BTV).abs().max())
                    logits_difference = max(
                        difference, 0.0 if logits_difference != logits_difference else logits_difference
                    )
        return Verification(layer_difference, logits_difference)


def check_pair(base: ModelSpec, chat: ModelSpec, *, layer: int) -> PairShape:
    """The pair's shape from its two configs, no weights read.

    InputError where a model is missing, the layer is out of range (names the number of layers), or widths or
    vocabularies disagree.
    """
    configs = [_load_config(spec) for spec in (base, chat)]
    for name, spec, config in zip(MODEL_NAMES, (base, chat), configs, strict=True):
        if not 1 <= layer <= config.num_hidden_layers:
            raise InputError(
                f"expected a layer between 1 and {config.num_hidden_layers} (the {name} model {spec.source!r} has "
                f"{config.num_hidden_layers} decoder layers), got layer {layer}; change the layer"
            )
    for attribute, word in (("hidden_size", "width"), ("vocab_size", "vocabulary size")):
        base_value, chat_value = (getattr(config, attribute) for config in configs)
        if base_value != chat_value:
            raise InputError(
                f"expected two models of the same {word}, got {base_value} for the base model {base.source!r} and "
                f"{chat_value} for the chat model {chat.source!r}; choose a base model and its fine-tuned version"
            )
    return PairShape(
        (configs[BASE].num_hidden_layers, configs[CHAT].num_hidden_layers),
        configs[CHAT].hidden_size,
        configs[CHAT].vocab_size,
    )


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's own tokenizer, with the spec's chat template; InputError where there is no tokenizer."""
    tokenizer = _load(AutoTokenizer, spec, "a tokenizer")
    if spec.chat_template:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def _load_config(spec: ModelSpec) -> Any:
    return _load(AutoConfig, spec, "a model").get_text_config()


def _load_decoder(spec: ModelSpec, layer: int, dtype: str, attn_implementation: str | None) -> SplitDecoder:
    if dtype not in DTYPES:
        raise InputError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model, info = _load(AutoModelForCausalLM, spec, "a causal language model", output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"expected all weights of the model {spec.source!r}, its files lack {len(missing)} of them, first "
            f"{missing[0]!r}; they would be random, so download or save the model again"
        )
    if spec.adapter is not None:
        model = _merge_adapter(model, spec.adapter)
    return SplitDecoder(model.requires_grad_(False), layer, dict(spec.token_replacements))


def _merge_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"expected the package peft for the adapter {adapter!r}, it is not installed") from error
    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError) as error:
        raise InputError(f"expected an adapter at {adapter!r}: {_first_line(error)}") from error


def _load(loader: Any, spec: ModelSpec, what: str, **options: Any) -> Any:
    """from_pretrained with its refusals turned into one line."""
    looks_like_path = spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1
    source = str(Path(spec.source).expanduser()) if looks_like_path else spec.source
    if looks_like_path and not Path(source).is_dir():
        raise InputError(f"expected {what} at {spec.source!r}, but there is no such folder; correct the path or hub id")
    try:
        with _without_progress_bars():
            return loader.from_pretrained(
                source, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"expected {what} at {spec.source!r}, it cannot be loaded: {_first_line(error)}") from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading draws no bars of its own: stages show progress."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _plain_forward(decoder: SplitDecoder, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """The residual stream after layer L, and the logits where the head is there, of one uninterrupted forward."""
    seen: list[Tensor] = []
    layer = decoder.layers[decoder.layer - 1]
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(hidden_of(output)))
    try:
        model = decoder.base if decoder.model is None else decoder.model
        output = model(input_ids=decoder.read(ids_BT), use_cache=False)
    finally:
        handle.remove()
    return seen[0], None if decoder.model is None else output.logits


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
