"""Texts and dialogues of a notebook as documents and prompts of the pipeline.

A text is a string; a dialogue is a list of messages, {"role": "user", "content": "..."}.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import InputError
from pipeline.schema import Split
from pipeline.text.documents import Document, document_id
from pipeline.text.tokenise import KEPT, Tokenise
from pipeline.text.tokenizers import prompt_ids

Text = str | Sequence[Mapping[str, Any]]
TEXTS, DIALOGUES = "texts", "dialogues"
"""Names of the corpora."""


def tokenised(tokenise: Tokenise, texts: Sequence[Text], *, what: str = "texts") -> dict[str, list[Any]]:
    """Token rows (schema.TOKEN_COLUMNS) in the order of the texts; InputError for one that gives no token."""
    documents = [_document(text, f"{what}[{place}]") for place, text in enumerate(_listed(texts, what))]
    rows: dict[str, list[Any]] = {}
    for place, document in enumerate(documents):
        corpus = TEXTS if document.messages is None else DIALOGUES
        columns: dict[str, list[Any]] = {
            "doc_id": [document_id(document)],
            "corpus": [corpus],
            "split": [Split.TRAIN],
            "text": [document.text],
            "messages": [document.messages],
        }
        made = tokenise(columns)
        for reason, detail in zip(made["dropped"], made["detail"], strict=True):
            if reason != KEPT:
                raise InputError(
                    f"{what}[{place}]: expected a document with tokens, got one that is {detail or reason}"
                )
        for name, column in made.items():
            rows.setdefault(name, []).extend(column)
    return rows


def prompts_of(tokenizer: Any, prompts: Sequence[Text]) -> list[list[int]]:
    """Token ids that a model is to continue.

    A text is what a user says where the tokenizer has a chat template, else the beginning of a plain document.
    """
    found = []
    for place, prompt in enumerate(_listed(prompts, "prompts")):
        document = _document(prompt, f"prompts[{place}]")
        if document.messages is not None:
            ids = prompt_ids(tokenizer, json.loads(document.messages))
        elif getattr(tokenizer, "chat_template", None):
            ids = prompt_ids(tokenizer, [{"role": "user", "content": document.text}])
        else:
            ids = list(tokenizer(document.text)["input_ids"])
        found.append(ids)
    return found


def _listed(texts: Sequence[Text], what: str) -> Sequence[Text]:
    """The texts as a list; a single string or dialogue is the commonest slip."""
    if isinstance(texts, str | Mapping) or (len(texts) and isinstance(texts[0], Mapping)):
        raise InputError(f"{what}: expected a list of texts or dialogues, got a single one; put it into a list")
    if len(texts) == 0:
        raise InputError(f"{what}: expected at least one text or dialogue, got an empty list")
    return texts


def _document(text: Text, where: str) -> Document:
    if isinstance(text, str):
        return Document(text=text)
    messages: list[Any] = list(text) if isinstance(text, Sequence) else [text]
    if not messages or not all(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
    ):
        raise InputError(
            f"{where}: expected a text or a list of messages with role and content, got {str(text)[:60]!r}"
        )
    return Document(messages=json.dumps([dict(message) for message in messages]))
