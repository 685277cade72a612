"""Whether both halves of a model are the model: compared with the library's own forward of each document alone.

The analyses' own code runs on a few documents in padded batches: the lower half gives the rows after layer L, the upper
half continues from them to logits, generation answers prompts of different lengths. What an architecture does beside
its residual stream (another look at the embeddings, inputs of each layer, several streams) shows here as a difference,
and no architecture is named. A run does this before anything is computed (stages/models.py), the extraction again on
the run's own documents.

Shapes: B documents, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.errors import InputError, first_line
from pipeline.models.decoder import SplitDecoder
from pipeline.models.failures import is_out_of_memory
from pipeline.models.generation import Steering, generate
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.models.rounding import ROUNDING, relative_errors
from pipeline.models.stand_ins import hidden_of
from pipeline.schema import CHAT, MODEL_NAMES

Part = Literal["rows", "logits", "answers"]
"""What an analysis needs of a model: rows after layer L, logits continued from them, answers."""

_Result = TypeVar("_Result")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LENGTHS = (11, 3, 17, 1, 8)
_NEW_TOKENS = 3
_SAME_BATCH = 0.25
"""Share of the rounding that remains where both sides compute the same batch."""
_REGRET_PER_ROUNDING = 10.0
"""Standard deviations of the logits by which the token taken may miss the best one, for each unit of rounding."""

_WHAT: dict[Part, str] = {
    "rows": "layer {layer}",
    "logits": "the logits continued from layer {layer}",
    "answers": "the answers to prompts of several lengths",
}
_WHY: dict[Part, str] = {
    "rows": "padding or the attention code changes them",
    "logits": "its layers read more than the stream of the layer before, such as the embeddings",
    "answers": "its cache or padding changes them",
}
_OTHERWISE: dict[Part, str] = {
    "rows": "try another models.attn_implementation or models.dtype, or another model",
    "logits": "set analyses.causality, analyses.steering and analyses.evidence to null, which need them, or choose "
    "another model",
    "answers": "set analyses.steering to null, which needs them, or choose another model",
}


class Verification(NamedTuple):
    """How far our batches are from the library's plain forward of each document alone, of base and chat."""

    relative_difference: tuple[float, float]
    """Largest |ours - plain| / |plain| over the rows after layer L, norms over D; 0 is exact."""
    logits_difference: tuple[float, float]
    """Of the logits continued from layer L against the library's of the same batch, norms over V, root mean square over
    positions: where rounding sends one token to another expert, it is no fault of the halves. NaN where not asked."""
    answers_regret: tuple[float, float]
    """By how many standard deviations of the plain logits the token taken misses the best, the largest over all
    answers. NaN where not asked, and of the base model, which answers nothing."""


def probe_documents(pair: ModelPair) -> list[list[int]]:
    """Random documents of several lengths whose tokens both models have; the same every time."""
    generator = torch.Generator().manual_seed(0)
    longest = min((own.context for own in pair.decoders if own.context is not None), default=max(_LENGTHS))
    lengths = [min(length, max(1, longest - _NEW_TOKENS)) for length in _LENGTHS]
    vocab_size = min(own.vocab_size for own in pair.decoders)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def verify(
    pair: ModelPair, documents: Sequence[Sequence[int]], parts: Sequence[Part] = ("rows", "logits")
) -> Verification:
    """The largest differences over some documents; `rows` are always compared, the others where they are asked for.

    The plain side is one forward of each document alone, with the stream taken by a hook on layer L. InputError where
    the architecture does not run in halves at all.
    """
    plain = [[_plain_stream(decoder, document) for document in documents] for decoder in pair.decoders]
    for model, streams in enumerate(plain):
        if not any(bool(stream_TD.isfinite().all(-1).any()) for stream_TD in streams):
            raise InputError(
                f"expected numbers from layer {pair.layer} of {_name(pair.decoders[model])}, got NaN or infinity for "
                f"every token tried ({pair.decoders[model].base.dtype}); try another models.dtype, or check its weights"
            )
    ids_BT, mask_BT = pad_tokens(documents)
    h_BTMD = _attempt(pair, CHAT, "rows", partial(pair.activations, ids_BT, mask_BT))
    rows, logits, answers = ([float("nan")] * len(MODEL_NAMES) for _ in range(3))
    for model, decoder in enumerate(pair.decoders):
        rows[model] = max(
            float(relative_errors(h_BTMD[row, : len(stream_TD), model].double(), stream_TD).max())
            for row, stream_TD in enumerate(plain[model])
        )
        if "logits" in parts and decoder.has_upper:
            h_BTD = h_BTMD[:, :, model]
            found_BTV = _attempt(pair, model, "logits", partial(pair.upper_logits, model, h_BTD, mask_BT))
            plain_BTV = _plain_logits(decoder, ids_BT)[..., : found_BTV.shape[-1]]
            error_P = relative_errors(*(own[mask_BT.to(own.device) == 1].double() for own in (found_BTV, plain_BTV)))
            logits[model] = float(error_P.square().mean().sqrt())
        if "answers" in parts and model == CHAT and decoder.has_upper:
            answers[model] = _attempt(pair, model, "answers", partial(_answers_regret, decoder, documents))
    return Verification((rows[0], rows[1]), (logits[0], logits[1]), (answers[0], answers[1]))


def require_finite(pair: ModelPair) -> None:
    """InputError where a weight of either model is NaN or Inf: every answer of the model would rest on it."""
    for name, decoder in zip(MODEL_NAMES, pair.decoders, strict=True):
        kept = decoder.base if decoder.model is None else decoder.model  # without its upper half there is no head
        for key, tensor in kept.named_parameters():
            if tensor.dtype in _FLOATS and not torch.isfinite(tensor).all():
                raise InputError(
                    f"models.{name}: expected finite weights, got NaN or Inf in {key}; save the model anew, or choose "
                    "another checkpoint"
                )


def require_plain_forward(
    pair: ModelPair, documents: Sequence[Sequence[int]], parts: Sequence[Part] = ("rows", "logits")
) -> Verification:
    """As `verify`; InputError where a difference is larger than rounding in the models' dtype explains."""
    found = verify(pair, documents, parts)
    for model, decoder in enumerate(pair.decoders):
        rounding = ROUNDING[decoder.base.dtype]
        differences: tuple[tuple[Part, float, float], ...] = (
            ("rows", found.relative_difference[model], rounding),
            ("logits", found.logits_difference[model], _SAME_BATCH * rounding),
            ("answers", found.answers_regret[model], _REGRET_PER_ROUNDING * rounding),
        )
        for part, difference, tolerance in differences:
            if part in parts and difference > tolerance:
                raise InputError(
                    f"expected {_WHAT[part].format(layer=decoder.layer)} of the {MODEL_NAMES[model]} model within "
                    f"{tolerance:g} of the library's own forward (relative, {decoder.base.dtype}), got "
                    f"{difference:.3g} from {_name(decoder)}: {_WHY[part]}; {_OTHERWISE[part]}"
                )
    return found


def _attempt(pair: ModelPair, model: int, part: Part, run: Callable[[], _Result]) -> _Result:
    """What `run` returns; an InputError where the architecture's own code cannot run so."""
    try:
        return run()
    except InputError:
        raise
    except Exception as error:  # whatever an architecture's code raises on a stream that it did not make itself
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"expected {_WHAT[part].format(layer=pair.layer)} of the {MODEL_NAMES[model]} model, got a failure of "
            f"{_name(pair.decoders[model])} ({type(error).__name__}: {first_line(error)}); {_OTHERWISE[part]}"
        ) from error


def _name(decoder: SplitDecoder) -> str:
    return f"{type(decoder.whole).__name__} {decoder.base.config.name_or_path!r}"


def _plain_stream(decoder: SplitDecoder, document: Sequence[int]) -> Tensor:
    """stream_TD after layer L of one uninterrupted forward of the document alone; float64.

    The library's hidden state, in models whose list begins with the embeddings and in those (Mamba) whose list does
    not; the layer's output, taken by a hook, for the last layer, whose hidden state is already normalised.
    """
    seen: list[Tensor] = []
    ids_1T = decoder.read(torch.tensor([list(document)]))
    with decoder.layers[decoder.layer].register_forward_hook(lambda *args: seen.append(hidden_of(args[-1]))):
        decoder.select()
        output = decoder.whole(input_ids=ids_1T, use_cache=False, output_hidden_states=True)
    states: Any = getattr(output, "hidden_states", None)
    is_last = len(decoder.layers) == decoder.num_lower
    is_given = states is not None and len(states) == len(decoder.layers) + 1 and not is_last
    if not is_given or torch.equal(states[decoder.layer], seen[0]):
        return seen[0][0].double()
    stream_TD: Tensor = states[decoder.num_lower][0].double()
    return stream_TD


def _plain_logits(decoder: SplitDecoder, ids_BT: Tensor) -> Tensor:
    """logits_BTV of one uninterrupted forward."""
    decoder.select()
    logits_BTV: Tensor = decoder.model(input_ids=decoder.read(ids_BT), use_cache=False).logits
    return logits_BTV


def _answers_regret(decoder: SplitDecoder, prompts: Sequence[Sequence[int]]) -> float:
    """The largest regret of greedy answers, with a steering vector of zeros so that the steered code runs."""
    nothing = Steering(torch.zeros(decoder.activation_dim))
    answers = generate(decoder, prompts, max_new_tokens=_NEW_TOKENS, stop_ids=(), steering=nothing)
    regrets = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_NV = _plain_logits(decoder, torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].double()
        taken_N = logits_NV.gather(1, torch.tensor(answer, device=logits_NV.device)[:, None])[:, 0]
        regrets.append(float(((logits_NV.amax(-1) - taken_N) / logits_NV.std(-1)).max()))
    return max(regrets)
