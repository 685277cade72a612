"""Columns of the tables of controls, in the manner of schema.py: what is measured where the answer is known.

Kept apart from schema.py for its size alone; nothing in this file reads or writes.
"""

from pipeline.schema import Column


class Control:
    """Kinds of controls: CONTROL_COLUMNS, column `control`."""

    STATED = "stated error"
    """What the verdict says of itself: the false discovery rate of the chat-specific set."""
    RANDOM = "random directions"
    NULL_PAIR = "null pair"
    """One model as base and as chat."""
    NOISE_PAIR = "noise pair"
    """A model against itself with noise on its weights."""
    SEED = "seed"
    """Followed by the name of the crosscoder that differs in its seed alone."""


CONTROL_COLUMNS = (
    Column("control", "string", "one of schema_controls.Control; seed is followed by the name of the other crosscoder"),
    Column("quantity", "string", "what value is, as a phrase"),
    Column("value", "float64", "the measured share or index, in [0, 1]; NaN where there is no latent to measure it on"),
    Column(
        "value_low", "float64", "lower end of its 95% interval (Wilson's; two standard deviations for stated error)"
    ),
    Column("value_high", "float64", "upper end of its 95% interval"),
    Column("expected", "float64", "what value is to be held against: 0, or what the verdict states; NaN for nothing"),
    Column("num_latents", "int64", "latents that the share is of"),
    Column("note", "string", "the numbers behind it, as a sentence"),
)

SEED_COLUMNS = (
    Column("other", "string", "name of the crosscoder that differs in its seed alone"),
    Column("latent", "int32", "a chat-specific latent of this crosscoder"),
    Column("other_latent", "int32", "its mutual best match by the cosine of [d^base, d^chat]; -1 = none"),
    Column("other_verdict", "string", "the verdict on the match; null without one"),
    Column("cosine", "float64", "cosine with the most parallel latent of the other crosscoder, match or not"),
)
