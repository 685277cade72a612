"""What is asked of a tokenizer itself: its BOS, its control tokens, prompts, texts of tokens, its identity.

A tokenizer may add BOS and EOS by itself. Dialogues and prompts get BOS exactly once (or never), whether the tokenizer
or the template writes it, and never an EOS that the template did not write: after it a model would not answer.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.text.messages import DialogueError
from pipeline.text.templates import read_template_shape, render_dialogue, render_prompt


class BosUse(NamedTuple):
    """How a tokenizer and its template use the token that is named as BOS."""

    token_id: int | None
    """None without a BOS."""
    is_added: bool
    """The tokenizer puts it in front of every text."""
    opens_dialogues: bool
    """The template alone puts it in front of dialogues, once; plain documents then get it too."""
    opens_turns: bool
    """The template opens every turn with it, so it marks no beginning."""


class Encoding(NamedTuple):
    """Token ids of a rendered text."""

    text: str
    """The text without the BOS that the tokenizer adds itself."""
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters of `text` under each token; (0, 0) for the BOS that was added."""


_PROBE = [
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Second?"},
    {"role": "assistant", "content": "Two."},
]


def read_bos_use(tokenizer: Any) -> BosUse:
    """Where the BOS stands: asked of the tokenizer with a short text, and of its template with a probe dialogue."""
    token_id = tokenizer.bos_token_id
    is_added = adds_bos(tokenizer)
    if token_id is None or is_added or not getattr(tokenizer, "chat_template", None):
        return BosUse(token_id, is_added, opens_dialogues=False, opens_turns=False)
    try:
        text = render_dialogue(tokenizer, [dict(message) for message in _PROBE]).text
    except DialogueError:
        return BosUse(token_id, is_added, opens_dialogues=False, opens_turns=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    opens = ids[:1] == [token_id]
    return BosUse(token_id, is_added, opens and ids.count(token_id) == 1, ids.count(token_id) > 1)


def encode(tokenizer: Any, text: str, bos: BosUse) -> Encoding:
    """Token ids of a text that a template has rendered; BOS stands in front once where the tokenizer adds one."""
    text = text.removeprefix(tokenizer.bos_token) if bos.is_added else text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if bos.is_added:
        assert bos.token_id is not None
        ids, offsets = [bos.token_id, *ids], [(0, 0), *offsets]
    return Encoding(text, ids, offsets)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS in front of every text."""
    if tokenizer.bos_token_id is None:
        return False
    return bool(tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id])


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a dialogue that ends where the model starts to answer, with BOS exactly once (or never)."""
    return encode(tokenizer, render_prompt(tokenizer, messages), read_bos_use(tokenizer)).ids


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The control token with which the chat template ends an assistant turn, None where it has no such token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    trailer = read_template_shape(tokenizer).trailers["assistant"]
    ids: list[int] = tokenizer(trailer, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in control_token_ids(tokenizer) else None


def token_text(tokenizer: Any, index: int) -> str:
    """A token's text with the space before it, which a token decoded alone would lose."""
    return token_texts(tokenizer, [index, index])[1]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text: joined, the texts give the document.

    A token decoded alone would lose the space before it. The first token of a character that spans several carries the
    whole character, the others add nothing.
    """
    texts = [""] * len(ids)
    settled, owner = "", -1
    for place in range(len(ids)):
        text = str(tokenizer.decode(ids[: place + 1], clean_up_tokenization_spaces=False))
        whole = text if place == len(ids) - 1 else text.rstrip("\ufffd")
        added = whole[len(settled) :] if whole.startswith(settled) else ""
        if owner >= 0 and added:
            texts[owner] += added[0]
            added, owner = added[1:], -1
            settled = whole
        elif added:
            settled = whole
        texts[place] += added
        if len(whole) < len(text) and owner < 0:
            owner = place
    return texts


def control_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's control tokens. The unknown token counts only where it is also another control token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep", "cls", "mask")}
    others = {index for index in named.values() if index is not None}
    return (special - {tokenizer.unk_token_id}) | others


def check_vocabularies(
    base_tokenizer: Any, chat_tokenizer: Any, used_ids: Iterable[int], replaced: Iterable[int] = ()
) -> None:
    """InputError naming the first used id for which the two tokenizers have different tokens.

    Ids in `replaced` may differ: one of the models reads other ids in their place.
    """
    ids = sorted({int(index) for index in used_ids} - set(replaced))
    base_tokens = base_tokenizer.convert_ids_to_tokens(ids)
    chat_tokens = chat_tokenizer.convert_ids_to_tokens(ids)
    for index, base_token, chat_token in zip(ids, base_tokens, chat_tokens, strict=True):
        if base_token != chat_token:
            raise InputError(
                f"expected the two models to share their vocabulary, but id {index} is {base_token!r} for the base "
                f"model ({base_tokenizer.name_or_path!r}) and {chat_token!r} for the chat model "
                f"({chat_tokenizer.name_or_path!r}); choose a pair with one tokenizer, or name in token_replacements "
                "what one of them reads instead"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that decides the ids: the tokenizer's rules and vocabulary, and the chat template.

    Padding and truncation settings are left out: calls change them, and ids without padding do not depend on them.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    identity = {"rules": rules, "chat_template": tokenizer.chat_template, "bos": tokenizer.bos_token}
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
