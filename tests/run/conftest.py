"""The fabricated tokenizers and models, as fixtures of this folder."""

from fabricated_models import build_tokenizer, random_model, tokenizers

__all__ = ["build_tokenizer", "random_model", "tokenizers"]
