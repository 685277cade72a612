"""Texts for the tiny pairs of this folder, and the vocabulary that their tokenizers need."""

from fabricated_models import SENTENCES

TEXTS = [f"{first} {second} {number}" for number in range(4) for first in SENTENCES for second in SENTENCES[:3]]
DIALOGUES = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Osta."}] for text in SENTENCES]
VOCABULARY = 600
