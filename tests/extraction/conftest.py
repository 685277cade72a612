"""The fabricated tokenizers and models, as fixtures of this folder."""

from fabricated_models import _one_thread, build_tokenizer, random_model, saved_pairs, tokenizers

__all__ = ["_one_thread", "build_tokenizer", "random_model", "saved_pairs", "tokenizers"]
