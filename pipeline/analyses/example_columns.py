"""Tables beside the contexts of a latent: how strongly it fires on each corpus, and the nearest decoder rows."""

from pipeline.schema import Column

HISTOGRAM_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column("corpus", "string", "corpus of the rows"),
    Column("low", "float64", "lower end of the bin; the first bin has all smaller activations too"),
    Column("high", "float64", "upper end of the bin, which belongs to the next; the last bin has all larger ones too"),
    Column("num_rows", "int64", "rows of the corpus with f_j in the bin; empty bins have no row"),
)
"""Activations above 0, in bins, four to each doubling."""

NEIGHBOUR_COLUMNS = (
    Column("latent", "int32", "index of the latent"),
    Column("rank", "int32", "0 = nearest"),
    Column("neighbour", "int32", "another latent"),
    Column("cosine_base", "float64", "cosine of the two rows d^base; NaN where one of them is 0"),
    Column("cosine_chat", "float64", "cosine of the two rows d^chat"),
)
"""Latents whose decoder rows point the same way: by d^chat, or by d^base where d^chat is 0."""
