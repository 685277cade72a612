"""Columns of the steering tables; they extend schema.py, which holds all others.

Nothing here reads or writes; it needs the standard library alone.
"""

from pipeline.schema import Column

STEERING_COLUMNS = (
    Column("behavior", "string", "behaviour whose rate is measured, or the name of the prompts"),
    Column("model", "string", "base or chat: the model that answers"),
    Column("latent", "int32", "steered latent; -1 for the unsteered run"),
    Column("control", "string", "latent, random (another latent drawn at random, at equal norm) or none"),
    Column("positions", "string", "where the direction is added: all, prompt, generated; none for the unsteered run"),
    Column("scale", "float64", "norm that was added, in units of the latent's largest contribution f_j |d_j^chat|"),
    Column("rate", "float64", "share of prompts whose answer shows the behaviour, in [0, 1]; NaN without markers"),
    Column("kl", "float64", "mean KL(p || p_steered) of the next token over the answer, nats; p: this model unsteered"),
    Column("nll", "float64", "chat model's nats per generated token of the steered text; lower = more fluent"),
    Column("num_prompts", "int64", "prompts answered"),
    Column("num_tokens", "int64", "tokens generated, all prompts together"),
)

STEERING_SAMPLE_COLUMNS = (
    *(column._replace(doc="as in the steering table") for column in STEERING_COLUMNS[:6]),
    Column("prompt", "string", "the user's message"),
    Column("answer", "string", "the model's generated answer"),
    Column("shows_behavior", "bool", "whether the answer counts towards the rate; null without markers"),
)
