"""The table of planted scores: its columns, and what a label can be asked of."""

from pipeline.schema import Column, interval_columns


class Scoring:
    """What a planted label is asked of: PLANTED_COLUMNS, column `scoring` (analyses/planted_scoring.py)."""

    TOKEN = "token"
    """Every token of a dialogue."""
    DECIDING = "deciding token"
    """The token before each answer, which predicts its first one."""
    TURN = "turn"
    """Each answer with its deciding token, by its maximum."""

    ALL = (TOKEN, DECIDING, TURN)


PLANTED_COLUMNS = (
    Column("behavior", "string", "planted label"),
    Column("scoring", "string", "what is scored: token, deciding token, or turn"),
    Column("candidate", "string", "chat-specific latent, any latent, mean difference, or linear probe"),
    Column("latent", "int32", "the winning latent; -1 for a direction that is no latent or where there is none"),
    *interval_columns("auroc", "area under the ROC curve on held-out dialogues; 0.5 = chance, 1 = perfect"),
    Column("num_positive_rows", "int64", "scored tokens or turns that carry the label"),
    Column("num_rows", "int64", "tokens or turns scored"),
)
