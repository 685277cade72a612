"""Halves against the library's own forward, on architectures that nobody named in the code."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import Sampling, Steering, generate
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.models.verification import Part, probe_documents, require_finite, require_plain_forward
from workloads.benchmarks.architectures import build

ALL: tuple[Part, ...] = ("rows", "logits", "answers")


def _pair(name: str, layer: int = 2) -> ModelPair:
    decoder = SplitDecoder(build(name), layer)
    return ModelPair(decoder, decoder, None)


@pytest.mark.parametrize(
    "name", ["opt", "falcon_h1", "bamba", "rwkv", "mamba", "mamba2", "recurrent_gemma", "llama4_text", "openai-gpt"]
)
def test_unusual_bodies_heads_and_states_are_right_in_everything(name: str) -> None:
    pair = _pair(name)
    found = require_plain_forward(pair, probe_documents(pair), ALL)
    assert max(found.relative_difference) < 1e-5
    assert max(found.logits_difference) < 1e-5
    assert found.answers_regret[1] < 1e-4


@pytest.mark.parametrize(("name", "value"), [("llama", float("nan")), ("opt", float("-inf"))])
def test_weights_that_are_no_numbers_are_named(name: str, value: float) -> None:
    pair = ModelPair(SplitDecoder(build(name), 2), SplitDecoder(build(name), 2), None)
    require_finite(pair)
    key, parameter = list(pair.decoders[1].model.named_parameters())[-3]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    with pytest.raises(InputError, match=f"models\\.chat: expected finite weights, got NaN or Inf in {key}"):
        require_finite(pair)


@pytest.mark.parametrize("name", ["zamba2", "gemma4_text", "zaya", "ctrl"])
def test_an_upper_half_that_is_not_the_model_is_refused_only_where_it_is_needed(name: str) -> None:
    pair = _pair(name)
    documents = probe_documents(pair)
    assert max(require_plain_forward(pair, documents, ("rows",)).relative_difference) < 1e-5
    with pytest.raises(InputError, match=type(pair.decoders[0].model).__name__) as refused:
        require_plain_forward(pair, documents, ("rows", "logits"))
    assert "the logits continued from layer 2 of the base model" in str(refused.value)


def test_the_error_of_an_upper_half_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = _pair("llama")
    whole = pair.decoders[0].upper
    monkeypatch.setattr(pair.decoders[0], "upper", lambda h_BTD, mask_BT: whole(h_BTD, mask_BT) * -1)
    with pytest.raises(InputError, match=r"within 0\.00025 .*, got 2 from LlamaForCausalLM"):
        require_plain_forward(pair, probe_documents(pair), ("rows", "logits"))


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v4", "cpmant"])
def test_models_without_a_single_stream_are_refused_for_their_rows(name: str) -> None:
    pair = _pair(name)
    with pytest.raises(InputError, match="one vector per token from layer 2"):
        require_plain_forward(pair, probe_documents(pair), ("rows",))


def test_an_answer_that_the_cache_makes_wrong_is_refused_for_steering_alone() -> None:
    pair = _pair("moshi")
    require_plain_forward(pair, probe_documents(pair), ("rows", "logits"))
    with pytest.raises(InputError, match=r"the answers .* MoshiForCausalLM"):
        require_plain_forward(pair, probe_documents(pair), ALL)


def test_weights_of_nan_are_no_agreement() -> None:
    pair = _pair("llama")
    with torch.no_grad():
        pair.decoders[0].layers[0].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="got NaN or infinity"):
        require_plain_forward(pair, probe_documents(pair), ("rows",))


@pytest.mark.parametrize("name", ["bamba", "rwkv", "llama", "opt"])
def test_the_lower_half_continues_from_a_prefix_whatever_its_layers_return(name: str) -> None:
    decoder = SplitDecoder(build(name), 2)
    ids_BT, mask_BT = pad_tokens([[5, 6, 7, 8], [9, 10]])
    run = decoder.lower_and_prefix(ids_BT, mask_BT, 1)
    again_BTD = decoder.lower_from(run.prefix_BTD, 1, ids_BT, mask_BT)
    torch.testing.assert_close(again_BTD[mask_BT == 1], run.h_BTD[mask_BT == 1])


@pytest.mark.parametrize(("name", "ignores"), [("llama", True), ("mamba", True), ("recurrent_gemma", False)])
def test_prompts_of_several_lengths_answer_as_each_alone(name: str, ignores: bool) -> None:
    decoder = SplitDecoder(build(name), 1)
    assert decoder.ignores_left_padding is ignores
    prompts = [[4, 5, 6, 7, 8], [9], [10, 11, 12], [13]]
    vector_BD = torch.randn(4, decoder.activation_dim, generator=torch.Generator().manual_seed(0))
    uniform_BN = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def answers(rows: list[int]) -> list[list[int]]:
        about: Mapping[str, Any] = {"max_new_tokens": 3, "stop_ids": ()}
        return generate(
            decoder,
            [prompts[row] for row in rows],
            steering=Steering(vector_BD[rows]),
            sampling=Sampling(1.0, uniform_BN[rows]),
            **about,
        )

    assert answers([0, 1, 2, 3]) == [answers([row])[0] for row in range(4)]


def test_both_models_of_a_loaded_pair_are_compared(
    saved_pairs: Callable[[str], tuple[str, str]],
) -> None:
    from pipeline.models.loading import LoadOptions, ModelSpec

    base, chat = saved_pairs("llama")
    pair = ModelPair.load(ModelSpec(base), ModelSpec(chat), LoadOptions(layer=1, dtype="bfloat16"))
    found = require_plain_forward(pair, probe_documents(pair), ALL)
    # Both may be 0: whether padding changes the rounding of bfloat16 products depends on the CPU.
    assert len(found.relative_difference) == len(found.logits_difference) == 2
    assert all(0 <= difference < 0.02 for difference in (*found.relative_difference, *found.logits_difference))
