"""Columns of the tables of promoted tokens; they extend schema.py, which holds all others.

Nothing here reads or writes; it needs the standard library alone.
"""

from pipeline.schema import Column

DIFFERENCE = "difference"
"""Beside the names of both models: the chat model's logits less the base model's."""

TOKEN_LIST_COLUMNS = (
    Column("promoted", "list<string>", "texts of the tokens whose logits rise most, the most promoted first"),
    Column("promoted_ids", "list<int32>", "their ids"),
    Column("promoted_logits", "list<float32>", "their logits, less the mean over the vocabulary"),
    Column("suppressed", "list<string>", "texts of the tokens whose logits fall most, the most suppressed first"),
    Column("suppressed_ids", "list<int32>", "their ids"),
    Column("suppressed_logits", "list<float32>", "their logits, less the mean over the vocabulary"),
)

LOGIT_LENS_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column(
        "member",
        "string",
        "base: d_j^base through the base model's final norm and unembedding; chat: d_j^chat through the chat model's; "
        "difference: logits of chat less those of base",
    ),
    *TOKEN_LIST_COLUMNS,
)
"""Three rows per latent; logits are per unit of f_j, before the division by a row's own size."""

FIRST_TOKEN_COLUMNS = (
    Column("corpus", "string", "name of the corpus"),
    Column("position", "int32", "position of the token in its document, from 0, counted before any row is dropped"),
    Column("num_documents", "int64", "validation documents averaged"),
    Column("norm", "float64", "|mean of x^chat - x^base| at this position"),
    Column("norm_base", "float64", "|mean of x^base| at this position"),
    *TOKEN_LIST_COLUMNS,
)
"""Mean difference of the first tokens' rows through the chat model's final norm and unembedding (arXiv 2510.13900)."""
