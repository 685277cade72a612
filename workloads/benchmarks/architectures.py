"""Which decoder-only architectures of transformers can be cut at a layer, and continued from there: a table.

    python -m workloads.benchmarks.architectures                 # all of them, about three minutes on one core
    python -m workloads.benchmarks.architectures llama zamba2    # some
    python -m workloads.benchmarks.architectures > docs/architectures.md

For every configuration that the library offers for causal language models it builds a tiny model with random weights
(four layers, width 32, float32) and runs the check that every run makes first (pipeline/models/verification.py): rows
after layer 2 of padded batches against the library's forward of each document alone, logits continued from those rows,
and greedy answers to prompts of several lengths. Encoders and decoders of an encoder are left out.
"""

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.pair import ModelPair
from pipeline.models.verification import Part, probe_documents, require_plain_forward

LAYER = 2
_MOST_PARAMETERS = 30_000_000
_DECODERS = frozenset({"gpt_neox", "gpt_neox_japanese"})
"""Decoders although their configuration has `is_decoder: False`, which marks an encoder elsewhere."""
_SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97},
    **{
        "intermediate_size": 48,
        "ffn_dim": 48,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    **{"n_routed_experts": 4, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"n_shared_experts": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"state_size": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    **{"mamba_d_ssm": 64, "chunk_size": 8, "num_heads": 4, "lru_width": 32, "sliding_window": 6, "rotary_dim": 4},
    **{"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "attention_window_size": 8},
}
"""By the name of the setting; a configuration takes those that it has."""
_NO_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
_TWO_KINDS = ["mamba", "attention", "mamba", "attention"]
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _TWO_KINDS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs besides, by its type."""


class Reading(NamedTuple):
    """One line of the table."""

    architecture: str
    model_class: str
    rows: str
    logits: str
    answers: str
    remark: str


def main(names: Sequence[str]) -> None:
    """Print the table of some architectures; of all without names."""
    logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    readings = [read(name) for name in names or architectures()]
    print(_head(readings))
    for line in (("architecture", "class", "rows", "logits", "answers", "remark"), ("---",) * 6, *readings):
        print(f"| {' | '.join(line)} |")


def architectures() -> Iterator[str]:
    """Types of all configurations for decoder-only language models."""
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # a configuration without defaults; `read` says so
            yield name
            continue
        is_encoder = getattr(config, "is_decoder", None) is not None and name not in _DECODERS
        if not config.is_encoder_decoder and not is_encoder:
            yield name


def read(name: str) -> Reading:
    """What the check finds for one architecture."""
    try:
        model = build(name)
    except Exception as error:
        return Reading(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], "", "", "", f"not built small: {_said(error)}")
    found, remark = {}, ""
    parts: tuple[Part, ...] = ("rows", "logits", "answers")
    for part in parts:
        try:
            decoder = SplitDecoder(model, LAYER)
            pair = ModelPair(decoder, decoder, None)
            asked: tuple[Part, ...] = ("rows",) if part == "rows" else ("rows", part)
            result = require_plain_forward(pair, probe_documents(pair), asked)
            fields = {
                "rows": result.relative_difference,
                "logits": result.logits_difference,
                "answers": result.answers_regret,
            }
            found[part] = f"{fields[part][1]:.1e}"
        except InputError as error:
            found[part] = "no"
            remark = remark or _said(error)
        except RuntimeError as error:  # the library's own forward fails on so small a model
            return Reading(name, type(model).__name__, "", "", "", f"not run small: {_said(error)}")
    return Reading(name, type(model).__name__, found["rows"], found["logits"], found["answers"], remark)


def build(name: str) -> Any:
    """A tiny model of an architecture, with weights large enough that positions and layers differ clearly."""
    config = small_config(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def small_config(name: str) -> Any:
    """The smallest configuration of a type that its own settings allow."""
    default = CONFIG_MAPPING[name]().get_text_config()
    kind = type(default)
    settings = {field.name for field in dataclasses.fields(kind)}
    own_names = getattr(kind, "attribute_map", None) or {}
    chosen = {own_names.get(key, key): value for key, value in _SIZES.items()}
    chosen |= dict.fromkeys(_NO_TOKENS)
    if "qk_rope_head_dim" in settings:  # such models make their head's width of two parts
        chosen.pop("head_dim")
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    for key in _LAYER_KINDS:
        kinds = getattr(default, key, None) if key in settings else None
        if isinstance(kinds, list):
            chosen[key] = (list(dict.fromkeys(kinds)) * 4)[:4]
    chosen |= _OWN.get(default.model_type, {})
    chosen = {key: value for key, value in chosen.items() if key in settings or key in _OWN.get(default.model_type, {})}
    try:
        return kind(**chosen)
    except Exception as error:
        if "token_id" not in str(error):
            raise
        return kind(**{key: value for key, value in chosen.items() if key not in _NO_TOKENS})


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/").replace(" ''", "")
    return (
        f"{type(error).__name__}: {text[:100]}"
        if not isinstance(error, InputError)
        else text.split(";")[0].split(" (relative")[0][:150]
    )


def _head(readings: Sequence[Reading]) -> str:
    whole = sum("no" not in reading[2:5] and bool(reading.rows) for reading in readings)
    rows = sum(reading.rows not in ("", "no") for reading in readings)
    unread = sum(not reading.rows for reading in readings)
    return f"""# Architectures

Which architectures of transformers {version("transformers")} crossray reads, as measured by
`python -m workloads.benchmarks.architectures` on tiny random models in float32: {whole} of {len(readings)} are right in
everything, {rows} in their rows, {unread} cannot be tried so small. Real models of every architecture, also of one that
is not in this table, are checked in the same way before a run computes anything, and refused with one line.

- **rows**: the activations after layer L of padded batches against the library's forward of each document alone
  (largest relative difference). With "no" here, the run is refused.
- **logits**: continued from those rows (relative). Evidence, causality, steering and `crossray layers` need them: with
  "no" here, a run works with these analyses set to null.
- **answers**: by how many standard deviations a greedy answer misses the best token. Steering needs them.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
