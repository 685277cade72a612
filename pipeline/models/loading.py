"""Two language models from folders or the hub: checked to form a pair before any weight is read, then loaded.

Errors of the libraries become one line each. What both models have in common is loaded or kept once: the same model
twice, a model and its adapter, byte-equal leading layers (shared_layers.py). Weights are read into the host's memory
first; placement.py moves them to their devices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pipeline.errors import InputError
from pipeline.models.adapters import attach_adapter, check_adapter, merge_adapter, require_all_keys
from pipeline.models.decoder import SplitDecoder, check_layer
from pipeline.models.failures import is_out_of_memory
from pipeline.models.files import GGUF_SUFFIX, existing_path, gguf_file, read_config
from pipeline.models.known import KNOWN, known_config
from pipeline.models.noise import add_weight_noise
from pipeline.models.placement import Placement, put
from pipeline.models.shared_layers import count_unadapted_layers, share_equal_prefix
from pipeline.models.weights import check_folder, check_numbers, check_quantisation
from pipeline.schema import BASE, CHAT, MODEL_NAMES

DTYPES = ("float32", "bfloat16", "float16", "float64")
_FEWEST_WORDS = 2
"""Of a tokenizer's vocabulary, beside special tokens."""


class ModelSpec(NamedTuple):
    """Where one model comes from."""

    source: str
    """Folder with config.json and weights, a GGUF file or its folder, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None takes the default branch."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter (needs peft)."""
    trust_remote_code: bool = False
    """Whether code shipped with the model may run."""
    token_replacements: tuple[tuple[int, int], ...] = ()
    """(id, id read instead) for template tokens that this model never saw in training."""
    chat_template: str = ""
    """Jinja text in place of the tokenizer's own chat template; empty keeps that."""
    adapter_revision: str | None = None
    """Commit, tag or branch of an adapter on the hub."""
    weight_noise: float = 0.0
    """Noise on the weights at loading, relative to their size (noise.py); a control."""
    weight_noise_seed: int = 0


class LoadOptions(NamedTuple):
    """How a pair is loaded."""

    layer: int
    """L, where both models are cut; from 1."""
    dtype: str
    """One of DTYPES."""
    devices: tuple[str, ...] = ("cpu",)
    """one_device takes the first, two_devices the first for base and the second for chat, spread all."""
    placement: Placement = "one_device"
    attn_implementation: str | None = None
    """Attention code of transformers; None leaves the choice to the model."""
    is_lower_only: bool = False
    """Whether the layers above L stay off the device: enough for extraction. One more layer is kept for the check
    against the plain forward, until ModelPair.drop_upper."""


class PairShape(NamedTuple):
    """What both models of a pair have in common."""

    num_layers: tuple[int, int]
    """Decoder layers of base and chat."""
    activation_dim: int
    vocab_size: int
    """Ids that both have."""


class LoadedPair(NamedTuple):
    """Both models on their devices."""

    base: SplitDecoder
    chat: SplitDecoder
    num_shared_layers: int
    """Leading layers that both models have in common; L where base and chat do not differ up to the cut."""
    commits: tuple[str | None, str | None]
    """Commits of both models on the hub; None for folders."""


def load_decoders(base: ModelSpec, chat: ModelSpec, options: LoadOptions) -> LoadedPair:
    """Both models, checked and placed; tensors and layers in common are kept and run once, where one device allows it.

    InputError where they do not form a pair or cannot be loaded.
    """
    check_pair(base, chat, layer=options.layer)
    if base == chat:
        model = _load_model(base, options)
        decoder = _placed(_decoder(_with_merged_adapter(model, base), base, options), options, CHAT)
        return LoadedPair(decoder, decoder, decoder.num_lower, (_commit(model), _commit(model)))
    if chat.adapter is not None and base == _without_adapter(chat, base):
        return _load_adapted(base, chat, options)
    decoders, commits = [], []
    for index, spec in enumerate((base, chat)):
        model = _load_model(spec, options)
        commits.append(_commit(model))
        decoder = _decoder(_with_merged_adapter(model, spec), spec, options)
        # Placed at once where nothing can be shared, so that the host holds one model at a time.
        decoders.append(decoder if options.placement == "one_device" else _placed(decoder, options, index))
    num_shared = 0
    if options.placement == "one_device":
        if base.token_replacements == chat.token_replacements:
            num_shared = share_equal_prefix(decoders[BASE], decoders[CHAT])
        for index, decoder in enumerate(decoders):
            _placed(decoder, options, index)
    return LoadedPair(
        decoders[BASE], decoders[CHAT], min(num_shared, decoders[CHAT].num_lower), (commits[BASE], commits[CHAT])
    )


def _load_adapted(base: ModelSpec, chat: ModelSpec, options: LoadOptions) -> LoadedPair:
    """One copy of the weights, with the adapter off for base; two where turning it off would not be exact."""
    assert chat.adapter is not None
    model = _load_model(base, options)
    commits = (_commit(model), _commit(model))
    adapted = attach_adapter(model, chat.adapter, chat.adapter_revision)
    if adapted.switch is None:
        chat_decoder = _placed(_decoder(adapted.model, chat, options), options, CHAT)
        base_decoder = _placed(_decoder(_load_model(base, options), base, options), options, BASE)
        return LoadedPair(base_decoder, chat_decoder, 0, commits)
    replacements = [dict(spec.token_replacements) for spec in (base, chat)]
    switch = adapted.switch
    base_decoder = SplitDecoder(adapted.model, options.layer, replacements[BASE], select=switch.turn_off)
    chat_decoder = SplitDecoder(adapted.model, options.layer, replacements[CHAT], select=switch.turn_on)
    num_shared = count_unadapted_layers(chat_decoder) if replacements[BASE] == replacements[CHAT] else 0
    if options.is_lower_only:
        base_decoder.drop_upper(num_kept=1)
        chat_decoder.drop_upper(num_kept=1)
    _placed(chat_decoder, options, BASE)
    base_decoder.was_moved()
    return LoadedPair(base_decoder, chat_decoder, min(num_shared, chat_decoder.num_lower), commits)


def _without_adapter(chat: ModelSpec, base: ModelSpec) -> ModelSpec:
    """chat's spec as its base model's would be; each reads tokens as it does."""
    return chat._replace(adapter=None, adapter_revision=None, token_replacements=base.token_replacements)


def _placed(decoder: SplitDecoder, options: LoadOptions, index: int) -> SplitDecoder:
    if options.placement == "two_devices":
        put(decoder, (options.devices[min(index, len(options.devices) - 1)],))
    else:
        put(decoder, options.devices if options.placement == "spread" else options.devices[:1])
    return decoder


def check_pair(base: ModelSpec, chat: ModelSpec, *, layer: int) -> PairShape:
    """The pair's shape from its two configs, no weights read.

    InputError where a model is missing, the layer is out of range (names the number of layers), or widths disagree.
    Vocabularies may: `check_used_ids` asks about the ids in use.
    """
    configs = [load_config(spec) for spec in (base, chat)]
    for name, spec, config in zip(MODEL_NAMES, (base, chat), configs, strict=True):
        check_layer(layer, config.num_hidden_layers, f"the {name} model {spec.source!r}")
    base_width, chat_width = (config.hidden_size for config in configs)
    if base_width != chat_width:
        raise InputError(
            f"expected two models of the same width, got {base_width} for the base model {base.source!r} and "
            f"{chat_width} for the chat model {chat.source!r}; choose a base model and its fine-tuned version"
        )
    return PairShape(
        (configs[BASE].num_hidden_layers, configs[CHAT].num_hidden_layers),
        configs[CHAT].hidden_size,
        min(config.vocab_size for config in configs),
    )


def check_used_ids(specs: Sequence[ModelSpec], tokenizers: Sequence[Any], used_ids: Sequence[int]) -> None:
    """InputError where texts use ids that one of the models has no row or no token for, and does not read as others.

    Tokens that only one model was given do no harm as long as no text uses them.
    """
    for name, spec, tokenizer in zip(MODEL_NAMES, specs, tokenizers, strict=True):
        replaced = {old for old, _ in spec.token_replacements}
        num_rows = load_config(spec).vocab_size
        asked = sorted({int(index) for index in used_ids} - replaced)
        tokens = tokenizer.convert_ids_to_tokens(asked)
        lacking = [index for index, token in zip(asked, tokens, strict=True) if index >= num_rows or token is None]
        if lacking:
            raise InputError(
                f"expected texts of ids that both models have, got {len(lacking)} of {len(asked)} ids in use that the "
                f"{name} model {spec.source!r} lacks ({', '.join(map(str, lacking[:5]))}; it has {num_rows} rows and "
                f"{len(tokenizer)} tokens); name in token_replacements what it reads instead, or choose another pair"
            )


def check_model(spec: ModelSpec, *, attn_implementation: str | None = None, is_used_here: bool = True) -> None:
    """InputError where a model that lies in a local folder will not load, found without reading its weights.

    The library builds it without memory and compares it with the headers of its files, so that an unknown layer or half
    a model is found in a second, however large it is. Models on the hub are checked when they are loaded.

    is_used_here: whether the packages of this machine are those of the workers.
    """
    load_tokenizer(spec)
    if not is_local(spec):
        return
    folder = Path(spec.source).expanduser()
    what = f"model {spec.source!r}"
    config = _load(AutoConfig, spec, "a model")
    if gguf_file(spec.source) is not None:  # one file, which the library turns into plain weights when it loads it
        return
    quantisation = getattr(config, "quantization_config", None)
    is_quantised = check_quantisation(quantisation, what, is_used_here=is_used_here)
    if is_quantised or find_spec("accelerate") is None:  # without it, the library builds nothing on the meta device
        check_numbers(folder, what, parameters=(), is_quantised=is_quantised)
        return
    attention = {"attn_implementation": attn_implementation if is_used_here else "eager"}
    model = _load_whole(spec, device_map="meta", **{key: value for key, value in attention.items() if value})
    check_numbers(folder, what, parameters=[name for name, _ in model.named_parameters()], is_quantised=False)
    if spec.adapter is not None:
        check_adapter(model, spec.adapter, spec.adapter_revision)


def is_local(spec: ModelSpec) -> bool:
    """Whether a model lies in a folder of this machine, or is a GGUF file there."""
    path = existing_path(spec.source)
    return path is not None and (path.is_dir() or gguf_file(spec.source) is not None)


def is_here(spec: ModelSpec) -> bool:
    """Whether a model is on this machine, in a folder or in the hub's cache."""
    return is_local(spec) or bool(read_config(spec.source, spec.revision))


def is_from_table(spec: ModelSpec) -> bool:
    """Whether a model's configuration is taken from models/known.py: of the hub, not here, and of no named revision."""
    return spec.source in KNOWN and not spec.revision and not is_here(spec)


def is_config_alone(spec: ModelSpec) -> bool:
    """Whether a folder holds a configuration and nothing else of a model: enough to plan with, not to run."""
    folder = existing_path(spec.source)
    suffixes = (".safetensors", ".bin", ".index.json", GGUF_SUFFIX)
    return (
        folder is not None
        and folder.is_dir()
        and not any(path.name.endswith(suffixes) or "token" in path.name for path in folder.iterdir())
    )


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's own tokenizer, with the spec's chat template; InputError where there is no tokenizer."""
    tokenizer = _load(AutoTokenizer, spec, "a tokenizer")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"expected a tokenizer with the file tokenizer.json at {spec.source!r}, got {type(tokenizer).__name__}, "
            "which tells no characters of its tokens; save it once with AutoTokenizer and save_pretrained"
        )
    # A folder without a tokenizer's files loads as one without words: every text would be one token, or none.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < _FEWEST_WORDS:
        raise InputError(
            f"expected a tokenizer at {spec.source!r}, got one without words: the folder lacks its files "
            "(tokenizer.json and tokenizer_config.json); copy them from the model that it was made from"
        )
    if spec.chat_template:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def load_config(spec: ModelSpec) -> Any:
    """The text model's configuration; of a known model that is not on this machine, without a network.

    InputError where there is none, or where it does not name the model's size.
    """
    config = known_config(spec.source) if is_from_table(spec) else _load(AutoConfig, spec, "a model").get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"model {spec.source!r}: expected a whole number above 0 for {name} in its config, got {value!r}; "
                "repair its config.json"
            )
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= config.vocab_size:
        raise InputError(
            f"model {spec.source!r}: expected a pad_token_id below {config.vocab_size} (its vocabulary), got {pad}; "
            "repair its config.json"
        )
    return config


def _load_model(spec: ModelSpec, options: LoadOptions) -> Any:
    """The causal language model on the host, without its adapter."""
    if options.dtype not in DTYPES:
        raise InputError(f"expected a dtype among {', '.join(DTYPES)}, got {options.dtype!r}")
    settings: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    if options.attn_implementation is not None:
        settings["attn_implementation"] = options.attn_implementation
    model = _load_whole(spec, **settings)
    if spec.weight_noise:
        add_weight_noise(model, scale=spec.weight_noise, seed=spec.weight_noise_seed)
    return model.requires_grad_(False)


def _load_whole(spec: ModelSpec, **settings: Any) -> Any:
    """A causal language model whose files hold exactly its tensors."""
    model, info = _load(
        AutoModelForCausalLM,
        spec,
        "a causal language model",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the shapes
        **settings,
    )
    require_all_keys(
        f"model {spec.source!r}",
        missing=info["missing_keys"],
        unused=info["unexpected_keys"],
        misshapen=[f"{name} {list(there)} for {list(own)}" for name, there, own in info["mismatched_keys"]],
    )
    return model


def _with_merged_adapter(model: Any, spec: ModelSpec) -> Any:
    return model if spec.adapter is None else merge_adapter(model, spec.adapter, spec.adapter_revision)


def _decoder(model: Any, spec: ModelSpec, options: LoadOptions) -> SplitDecoder:
    decoder = SplitDecoder(model.requires_grad_(False), options.layer, dict(spec.token_replacements))
    if options.is_lower_only:
        decoder.drop_upper(num_kept=1)
    return decoder


def _commit(model: Any) -> str | None:
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return commit


def _load(loader: Any, spec: ModelSpec, what: str, **options: Any) -> Any:
    """from_pretrained; its errors become one line."""
    packed = gguf_file(spec.source)
    looks_like_path = spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1
    source = str(Path(spec.source).expanduser()) if looks_like_path else spec.source
    if packed is not None:
        _require_gguf(spec.source)
        source, options = str(packed.parent), options | {"gguf_file": packed.name}
    elif (looks_like_path or source.endswith(GGUF_SUFFIX)) and existing_path(source) is None:
        raise InputError(f"expected {what} at {spec.source!r}, but there is no such folder; correct the path or hub id")
    elif looks_like_path:
        check_folder(Path(source), f"model {spec.source!r}")
    try:
        with _without_progress_bars():
            return loader.from_pretrained(
                source, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
            )
    except MemoryError:
        raise
    except Exception as error:  # what configs, files and code of others can raise has no bound
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise InputError(f"expected {what} at {spec.source!r}, it cannot be loaded: {said}") from error


def _require_gguf(source: str) -> None:
    if find_spec("gguf") is None:
        raise InputError(f"model {source!r}: expected the package gguf to read it; pip install 'crossray[gguf]'")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading shows no progress bars; stages show their own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
