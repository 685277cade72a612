"""Steering and splicing in the real modules, against hooks written by hand."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from little_texts import VOCABULARY
from torch import Tensor

from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.models.padding import pad_tokens
from pipeline.schema import BASE, CHAT

ARCHITECTURES = ("gemma2", "llama", "gpt2")
LENGTHS = (9, 4, 12)


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def random_crosscoder(pair: Pair, *, seed: int = 0) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)
    crosscoder = Crosscoder(64, 2, pair.models.activation_dim)
    for parameter in (crosscoder.W_enc_FMD, crosscoder.W_dec_FMD, crosscoder.b_dec_MD):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    crosscoder.b_enc_F.copy_(torch.randn(64, generator=generator) - 0.5)
    crosscoder.set_normalisation(None)
    crosscoder.scale_M.copy_(torch.tensor([0.5, 0.25]))
    crosscoder.is_normalised = True
    return crosscoder


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def outputs_of(model: Any, layer: int, ids: Tensor) -> Tensor:
    """The layer's output by a hook of the test's own, without padding."""
    seen: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers_of(model)[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def logits_with(model: Any, layer: int, ids: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits where the layer's output is edited by a hook of the test's own, one document without padding."""

    def change(_module: Any, _args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = layers_of(model)[layer].register_forward_hook(change)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    handle.remove()
    return logits[0]


def expected_splice(pair: Pair, crosscoder: Crosscoder, ids: Tensor) -> Tensor:
    """decode(encode(base, chat)) of the chat model, at every position but BOS and sinks, in plain dense arithmetic."""
    base, chat = (outputs_of(model, pair.layer, ids)[0] for model in (pair.base, pair.chat))
    x_TMD = torch.stack([base, chat], dim=1)
    code = torch.relu(
        torch.einsum("tmd,fmd->tf", (x_TMD - crosscoder.mean_MD) * crosscoder.scale_M[:, None], crosscoder.W_enc_FMD)
        + crosscoder.b_enc_F
    )
    xh_TMD = torch.einsum("tf,fmd->tmd", code, crosscoder.W_dec_FMD) + crosscoder.b_dec_MD
    xh_TD = (xh_TMD / crosscoder.scale_M[:, None] + crosscoder.mean_MD)[:, CHAT]
    norm_TM = x_TMD.norm(dim=2)
    is_row = (ids[0] != pair.tokenizer.bos_token_id) & (norm_TM <= 10 * norm_TM.median(dim=0).values).all(1)
    return torch.where(is_row[:, None], xh_TD, chat)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("what", ["steer", "splice"])
def test_a_padded_batch_reads_the_edit_of_each_document_alone(
    make_pair: Callable[..., Pair], architecture: str, side: str, what: str
) -> None:
    pair = make_pair(architecture)
    crosscoder = random_crosscoder(pair)
    ids_BT, mask_BT = pad_tokens(documents(), on_left=side == "left")
    position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    edited = pair.steer(crosscoder, 7, 3.0) if what == "steer" else pair.splice(crosscoder)
    with torch.no_grad(), edited:
        logits_BTV = pair.chat(ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits
    vector_D = 3.0 * crosscoder.W_dec_FMD[7, CHAT] / crosscoder.scale_M[CHAT]
    for row, document in enumerate(documents()):
        ids = torch.tensor([document])
        new = expected_splice(pair, crosscoder, ids)
        edit = (lambda h: h + vector_D) if what == "steer" else (lambda _, new=new: new[None])
        expected_TV = logits_with(pair.chat, pair.layer, ids, edit)
        torch.testing.assert_close(logits_BTV[row][mask_BT[row] == 1], expected_TV, rtol=1e-3, atol=1e-3)
        plain_TV = logits_with(pair.chat, pair.layer, ids, lambda h: h)
        assert (expected_TV - plain_TV).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("what", ["steer", "splice"])
@pytest.mark.parametrize("by", ["library", "transformers"])
def test_answers_with_a_cache_are_those_without(
    make_pair: Callable[..., Pair], architecture: str, what: str, by: str
) -> None:
    pair = make_pair(architecture)
    crosscoder = random_crosscoder(pair)

    def edited() -> Any:
        return pair.steer(crosscoder, 7, 3.0) if what == "steer" else pair.splice(crosscoder)

    prompts = documents(1)
    ids_BT, mask_BT = pad_tokens(prompts, on_left=True)
    with edited():
        if by == "transformers":
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            whole = pair.chat.generate(ids_BT, attention_mask=mask_BT, **options)[:, ids_BT.shape[1] :].tolist()
            stops = pair.models.stop_token_ids()
            made = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in whole]
        else:
            made = pair.models.generate(prompts, 6)
        plain = pair.models.generate(prompts, 6, use_cache=False)
    assert made == plain
    with edited():
        alone = [pair.models.generate([prompt], 6, use_cache=False)[0] for prompt in prompts]
    assert alone == plain
    assert pair.models.generate(prompts, 6) != plain


def test_the_error_kept_changes_nothing_but_the_latents_left_out(pair: Pair) -> None:
    crosscoder = random_crosscoder(pair)
    ids = torch.tensor([documents()[0]])
    with torch.no_grad():
        plain = pair.chat(ids).logits
        with pair.splice(crosscoder, error=True):
            kept = pair.chat(ids).logits
        with pair.splice(crosscoder, error=True, without=range(0, 64, 2)):
            ablated = pair.chat(ids).logits
    assert torch.equal(kept, plain)
    x_TMD = torch.stack([outputs_of(model, pair.layer, ids)[0] for model in (pair.base, pair.chat)], dim=1)
    code_TF = crosscoder.encode(x_TMD).to_dense()
    code_TF[:, 1::2] = 0
    gone_TD = code_TF @ (crosscoder.W_dec_FMD[:, CHAT] / crosscoder.scale_M[CHAT])
    expected = logits_with(pair.chat, pair.layer, ids, lambda h: h - gone_TD)
    torch.testing.assert_close(ablated[0], expected, rtol=1e-3, atol=1e-3)


def test_the_base_model_is_edited_where_it_is_named(pair: Pair) -> None:
    crosscoder = random_crosscoder(pair)
    ids = torch.tensor([documents()[0]])
    with torch.no_grad():
        plain = [model(ids).logits for model in (pair.base, pair.chat)]
        with pair.splice(crosscoder, model="base"):
            edited = [model(ids).logits for model in (pair.base, pair.chat)]
    assert not torch.allclose(edited[BASE], plain[BASE]) and torch.equal(edited[CHAT], plain[CHAT])


def test_blocks_nest_and_leave_the_models_as_they_were(pair: Pair) -> None:
    crosscoder = random_crosscoder(pair)
    ids = torch.tensor([documents()[0]])
    with torch.no_grad():
        plain = pair.chat(ids).logits
        with pair.steer(crosscoder, 3, 2.0), pair.steer(crosscoder, 3, -2.0):
            cancelled = pair.chat(ids).logits
        with pytest.raises(ZeroDivisionError), pair.splice(crosscoder), pair.steer(crosscoder, 1, 1.0):
            1 / 0  # noqa: B018
        after = pair.chat(ids).logits
    torch.testing.assert_close(cancelled, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, plain)


def test_one_model_as_both_is_spliced_by_its_own_stream(make_pair: Callable[..., Pair], tokenizers: Any) -> None:
    from pipeline.library.loading import load_pair

    model = make_pair("llama").chat
    pair = load_pair(model, model, layer=1, tokenizer=tokenizers["gemma"])
    crosscoder = random_crosscoder(pair)
    ids = torch.tensor([documents()[0]])
    new = expected_splice(pair, crosscoder, ids)
    with torch.no_grad(), pair.splice(crosscoder):
        logits = pair.chat(ids).logits[0]
    torch.testing.assert_close(logits, logits_with(model, 1, ids, lambda _: new[None]), rtol=1e-3, atol=1e-3)
