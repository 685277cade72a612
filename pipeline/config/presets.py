"""Presets: the rows to drop and token replacements that a family of models needs.

A preset gives the default of a few keys. A key that the run file names wins. Fingerprints cover the resulting values,
never the name of the preset. Sources: arXiv 2504.02922 and its code for Gemma 2, Llama 3 and Qwen 2.5; the chat
templates for Gemma 3 and Qwen 3.
"""

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["gemma-2", "gemma-3", "llama-3.1", "llama-3.2", "qwen-2.5", "qwen-3"]

_GEMMA: Mapping[str, Any] = {"activations": {"drop_first_tokens": 0, "drop_bos": True}}
_LLAMA_3: Mapping[str, Any] = {
    # BOS and the default system turn with its dates and its closing token, which all dialogues share. The paper's
    # code drops 25 and keeps that closing token as a constant row.
    "activations": {"drop_first_tokens": 26, "drop_bos": True},
    # The base model never saw start_header_id, end_header_id and eot_id, so it reads plain tokens instead.
    "models": {"base": {"token_replacements": {128006: 1432, 128007: 827, 128009: 827}}},
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gemma-2": _GEMMA,
    "gemma-3": _GEMMA,
    "llama-3.1": _LLAMA_3,
    "llama-3.2": _LLAMA_3,
    # 21: the default system prompt.
    "qwen-2.5": {"activations": {"drop_first_tokens": 21, "drop_bos": True}},
    # No default system prompt and no BOS: the first token is the attention sink.
    "qwen-3": {"activations": {"drop_first_tokens": 1, "drop_bos": True}},
}


def with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a run file, completed by its preset. Without a known preset the tree is returned as it is."""
    name = tree.get("preset")
    return _over(PRESETS.get(name, {}) if isinstance(name, str) else {}, tree)


def _over(under: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in under.items():
        if key not in tree:
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(tree[key], Mapping):
            merged[key] = _over(value, tree[key])
    return merged
