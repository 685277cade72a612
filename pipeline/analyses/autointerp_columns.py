"""Columns and states of automatic interpretation's tables; they extend schema.py, which holds all others.

Nothing here reads or writes; it needs the standard library alone.
"""

from pipeline.schema import Column, interval_columns


class InterpStatus:
    """What came of interpreting one latent automatically."""

    SCORED = "scored"
    """Explained, and the explanation tested on held-out contexts."""
    EXPLAINED = "explained"
    """Explained, but no usable answer about the held-out contexts."""
    UNEXPLAINED = "no explanation"
    """No usable answer to the request for an explanation."""
    TOO_FEW = "too few contexts"
    """No request was sent: the example table has fewer than two contexts of the latent, or no quiet one was found."""

    ALL = (SCORED, EXPLAINED, UNEXPLAINED, TOO_FEW)


STRENGTHS = ("weak", "middle", "strong")
"""Thirds of the range of activations, up to the latent's strongest context, by which held-out contexts are counted."""

AUTOINTERP_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column("status", "string", "one of InterpStatus.ALL"),
    Column("explanation", "string", "one sentence by the language model; null without one"),
    *interval_columns(
        "balanced_accuracy",
        "mean of true_positive_frac and true_negative_frac; 0.5 = chance, 1 = perfect; NaN where not scored",
        "from both Wilson intervals",
    ),
    Column("true_positive_frac", "float64", "share of held-out active contexts that the explanation is judged to fit"),
    *(
        Column(
            f"found_{strength}_frac", "float64", f"true_positive_frac of the {strength} third alone; NaN without any"
        )
        for strength in STRENGTHS
    ),
    Column("true_negative_frac", "float64", "share of quiet contexts that the explanation is judged not to fit"),
    Column("control_accuracy", "float64", "balanced accuracy of another latent's explanation here; NaN if not asked"),
    Column("num_active", "int32", "held-out active contexts judged"),
    Column("num_quiet", "int32", "quiet contexts of other documents judged"),
    Column("num_malformed", "int32", "answers about this latent that could not be used"),
    Column("tokens_in", "int64", "tokens of all requests about this latent, as the endpoint counts them"),
    Column("tokens_out", "int64", "tokens of all answers about this latent, as the endpoint counts them"),
)
"""One row per latent that was to be interpreted."""

ANSWER_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column("request", "string", "explain, detect or control, the latter two with the number of the request"),
    Column("messages", "string", "JSON list of the messages sent first"),
    Column("answer", "string", "the last answer as it came"),
    Column("is_usable", "bool", "whether it could be read"),
    Column("num_malformed", "int32", "unusable answers among all tries"),
    Column("tokens_in", "int64", "of all tries, as the endpoint counts them; 0 where it does not"),
    Column("tokens_out", "int64", "of all tries, as the endpoint counts them; 0 where it does not"),
)
"""One row per request about a latent: the evidence behind AUTOINTERP_COLUMNS."""
