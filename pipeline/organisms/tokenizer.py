"""The word tokenizer that both models of the demo pair share, with a chat template in the style of Gemma.

One token per word or punctuation mark, so a label's character span is a whole number of tokens and a latent's context
reads like text. The vocabulary is collected from the texts it is given and sorted, so the same texts give the same
ids; a word outside it becomes <unk>. The base model never sees the turn tokens during training, as with real pairs.
"""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
CONTROL_TOKENS = (PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN)
"""Control tokens in id order; the padding id is 0."""
TEMPLATE_WORDS = ("\n", "user", "model")

WORD_PATTERN = r"\n|[a-z]+|[^\sa-z]"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's turns; the assistant's role is called model."""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose vocabulary is every word of the texts; it adds BOS once and never EOS."""
    words: set[str] = set()
    for text in texts:
        words.update(re.findall(WORD_PATTERN, text.lower()))
    order = CONTROL_TOKENS + TEMPLATE_WORDS + tuple(sorted(words - set(TEMPLATE_WORDS)))
    vocabulary = {word: index for index, word in enumerate(order)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    # WordPiece with a prefix that no word has: joins words by spaces and closes the gap before punctuation.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
