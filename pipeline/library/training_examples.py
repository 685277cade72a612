"""`training_examples`: the documents of a fine-tuning set on which a latent fires most, ranked, with contexts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from pipeline.analyses.documents import RankedBy, document_activity, ranked_documents
from pipeline.analyses.examples import contexts
from pipeline.analyses.rows import encoded_batches
from pipeline.library.checks import require_fit, require_own_latents
from pipeline.library.dashboard import tokenizer_of
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.text.tokenizers import token_texts

if TYPE_CHECKING:
    from pipeline.library.rows import Rows

COLUMNS = (
    *("latent", "rank", "document", "doc_id", "score", "share", "sum", "mean", "max", "num_active", "num_rows"),
    *("position", "tokens", "activations"),
)


def training_examples(
    crosscoder: Crosscoder,
    rows: "Rows",
    latent: int | Sequence[int],
    *,
    by: RankedBy = "sum",
    num_documents: int = 10,
    window_tokens: int = 16,
    tokenizer: Any = None,
) -> pd.DataFrame:
    """The documents of a fine-tuning set on which a latent, or each of several, fires most: what may have taught it.

    Where to look first. That a document made the latent is not shown: for that, train without it.

    Args:
        crosscoder: of the rows' pair and layer.
        rows: of the fine-tuning set, `pair.activations(texts)`: whole documents, in the order of the texts.
        latent: index or indices, below num_latents; usually those that the latent table calls chat-specific.
        by: the documents' score: sum of the latent's codes, their mean over all rows of the document, or the largest.
        num_documents: at most so many per latent; a document on which it never fires is not listed.
        window_tokens: tokens before and after the strongest one in the context.
        tokenizer: for rows that were loaded; rows of a pair in memory know theirs.

    Returns:
        One row per latent and document, best first: document (its place among the rows' documents, which is that of the
        text unless texts are equal or a template divides a dialogue), score, share (of the latent's whole activation in
        the set, up to this rank), sum, mean, max, num_active of num_rows, and the context of the strongest token:
        position, tokens, activations.

    Raises InputError for rows of another pair, width or layer, and for latents that the crosscoder does not have.
    """
    latents = [latent] if isinstance(latent, int) else list(latent)
    about = {"num_models": rows.num_models, "activation_dim": rows.activation_dim}
    require_fit(crosscoder, **about, origin=rows.origin, owner="the rows")
    require_own_latents(latents, crosscoder)
    tokenizer = tokenizer_of(rows, tokenizer)
    columns = {name: column.to(crosscoder.W_dec_FMD.device) for name, column in rows.columns().items()}
    activity = document_activity(encoded_batches(crosscoder, columns), latents)
    found = ranked_documents(activity, by=by, num_documents=num_documents)
    if found.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    place = {doc_id: number for number, doc_id in enumerate(dict.fromkeys(rows.data.doc_id_B.tolist()))}
    found["document"] = found["doc_id"].map(place)
    found["score"] = found[by]
    is_found_B = torch.isin(columns["doc_id"], torch.from_numpy(found["doc_id"].unique()).to(columns["doc_id"].device))
    cut = contexts(
        found.assign(activation=found["max"], corpus=""),
        encoded_batches(crosscoder, {name: column[is_found_B] for name, column in columns.items()}),
        window_tokens=window_tokens,
        token_texts=lambda ids: token_texts(tokenizer, ids),
    )
    found[["tokens", "activations"]] = cut[["tokens", "activations"]]
    order = {one: number for number, one in enumerate(latents)}
    found = found.sort_values(["latent", "rank"], key=lambda one: one.map(order) if one.name == "latent" else one)
    return found[list(COLUMNS)].reset_index(drop=True)
