"""Which latents a number depends on: the first-order effect of every latent at every position, in one backward pass.

For a number y that a model computes (a loss, a token's logit), a latent j active at a row i, and model m whose upper
half computes y,

    attribution_ij = f_ij <dy / dh_i^m, d_j^m> = d y / d s_ij at s_ij = 1, where h_i^m + (s_ij - 1) f_ij d_j^m is read

so a positive number says that y would fall, to first order, if the latent's contribution were taken out. Codes come
from both models' streams and are held fixed; what the crosscoder does not reconstruct stays in the stream. Summed over
active latents this is f . (W_dec^m dy/dh^m): one gradient serves all latents.

Shapes: B documents, T positions, M models, D width, F latents, N rows, P active pairs, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.live_edits import stream_hooked
from pipeline.models.padding import TokenBatch
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder

Target = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_BTV, ids_BT, mask_BT) to one number."""
COLUMNS = ("document", "position", "token_id", "latent", "activation", "attribution")


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Summed nats of every next token of the documents."""
    at_least_single = torch.promote_types(logits_BTV.dtype, torch.float32)
    log_prob_BTV = logits_BTV[:, :-1].to(at_least_single).log_softmax(-1)
    nats_BT = -log_prob_BTV.gather(2, ids_BT[:, 1:, None])[..., 0]
    return (nats_BT * (mask_BT[:, 1:] != 0)).sum()


def logit_of(token_id: int) -> Target:
    """The logit of one token after the end of every document, summed over documents."""

    def target(logits_BTV: Tensor, _ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        last_B = mask_BT.cumsum(1).argmax(1)
        return logits_BTV[torch.arange(len(last_B), device=last_B.device), last_B, token_id].sum()

    return target


def attribute(
    pair: ModelPair,
    crosscoder: Crosscoder,
    batch: TokenBatch,
    positions: Sequence[np.ndarray],
    target: Target,
    *,
    model: int,
) -> pd.DataFrame:
    """COLUMNS, one row per active latent and position, largest |attribution| first.

    Args:
        pair: both models, with their upper halves.
        crosscoder: of this pair and layer, on the pair's device.
        batch: documents, padded on either side.
        positions: of every document, the positions in it that are rows.
        target: what is attributed.
        model: schema.BASE or schema.CHAT, whose upper half computes it.
    """
    ids_BT, mask_BT = (part.to(pair.device) for part in batch)
    h_BTMD = pair.activations(ids_BT, mask_BT)
    gradient_BTD = stream_gradient(pair, model, TokenBatch(ids_BT, mask_BT), target)
    starts = mask_BT.argmax(1).tolist()
    document_N = np.repeat(np.arange(len(positions)), [len(own) for own in positions])
    position_N = np.concatenate(positions)
    column_N = position_N + np.asarray(starts)[document_N]
    place_N = torch.from_numpy(document_N * ids_BT.shape[1] + column_N).to(pair.device)
    with torch.no_grad():
        codes = crosscoder.encode(h_BTMD.flatten(0, 1)[place_N])
        decoder_FD = crosscoder.raw_decoder_FMD()[:, model].contiguous()
        gradient_ND = gradient_BTD.flatten(0, 1)[place_N].to(decoder_FD.dtype).contiguous()
        attribution_P = codes.values_P * crosscoder.kernels.value_gradients(codes, gradient_ND, decoder_FD)
    rows_P = codes.rows_P().cpu().numpy()
    columns = (
        *(document_N[rows_P], position_N[rows_P], ids_BT.flatten()[place_N].cpu().numpy()[rows_P]),
        *(tensor.cpu().numpy() for tensor in (codes.latents_P, codes.values_P, attribution_P)),
    )
    table = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
    return table.sort_values("attribution", key=lambda own: -own.abs(), kind="stable", ignore_index=True)


def stream_gradient(pair: ModelPair, model: int, batch: TokenBatch, target: Target) -> Tensor:
    """dy / dh_BTD at layer L of one model, in the model's dtype; the layers up to L keep no graph."""
    decoder = pair.decoders[model]
    assert decoder.has_upper, "the upper half was dropped; load the pair with both halves"
    added: list[Tensor] = []

    def with_leaf(h_BTD: Tensor) -> Tensor:
        added.append(torch.zeros_like(h_BTD, requires_grad=True))
        return h_BTD.detach() + added[-1]

    with torch.enable_grad(), stream_hooked(decoder, with_leaf):
        output = decoder.model(
            input_ids=decoder.read(batch.ids_BT), **decoder.attention(batch.mask_BT), use_cache=False
        )
        number = target(output.logits, batch.ids_BT.to(output.logits.device), batch.mask_BT.to(output.logits.device))
        if number.numel() != 1 or not number.requires_grad:
            raise InputError(
                f"attribute: expected a target that makes one number of the logits, got one of shape "
                f"{tuple(number.shape)}{'' if number.requires_grad else ' that does not depend on them'}"
            )
        (gradient_BTD,) = torch.autograd.grad(number.sum(), added)
    return gradient_BTD.to(pair.device)
