from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import Positions, Sampling, Steering, answer_likelihood, generate
from pipeline.models.loading import LoadOptions, ModelSpec
from pipeline.models.pair import ModelPair

ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt_neox", "mistral", "gpt2")
NUM_NEW = 8


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in (4, 11, 1, 7)]


def _alone(model: Any, prompt: list[int], stop_ids: list[int]) -> list[int]:
    config = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=stop_ids or None, pad_token_id=0)
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()
    ended = [i for i, token in enumerate(answer) if token in stop_ids]
    return answer[: ended[0]] if ended else answer


def _recomputed(decoder: SplitDecoder, prompt: list[int], vector: torch.Tensor, positions: str) -> list[int]:
    """Greedy answer by full forwards of growing documents, the vector added by hand between the halves."""
    document = list(prompt)
    for _ in range(NUM_NEW):
        ids = torch.tensor([document])
        ones = torch.ones_like(ids)
        is_generated = torch.arange(len(document)) >= len(prompt)
        where = {"all": torch.ones(len(document)), "prompt": ~is_generated, "generated": is_generated}[positions]
        h_BTD = decoder.lower(ids, ones) + where[None, :, None].float() * vector
        document.append(int(decoder.head(decoder.upper(h_BTD, ones)[0])[-1].argmax()))
    return document[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_batch_gives_the_library_answer_of_each_prompt_alone(
    random_model: Callable[..., Any], architecture: str, use_cache: bool
) -> None:
    model = random_model(architecture, seed=3)
    free = [_alone(model, prompt, []) for prompt in _prompts()]
    stop_ids = [free[1][3], free[0][5]]
    for stops in ([], stop_ids):
        expected = [_alone(model, prompt, stops) for prompt in _prompts()]
        ours = generate(SplitDecoder(model, 1), _prompts(), max_new_tokens=NUM_NEW, stop_ids=stops, use_cache=use_cache)
        assert ours == expected
    assert any(len(answer) < NUM_NEW for answer in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_steered_answers_equal_full_forwards_with_the_vector_added_by_hand(
    random_model: Callable[..., Any], architecture: str, positions: Positions
) -> None:
    decoder = SplitDecoder(random_model(architecture, seed=3), 1)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 3
    expected = [_recomputed(decoder, p, v, positions) for p, v in zip(_prompts(), vectors, strict=True)]
    for use_cache in (True, False):
        steering = Steering(vectors, positions)
        ours = generate(
            decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[], steering=steering, use_cache=use_cache
        )
        assert ours == expected
    plain = generate(decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[])
    assert plain != expected
    zero = Steering(torch.zeros(32), positions)
    assert generate(decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[], steering=zero) == plain


def test_answer_likelihood_equals_the_plain_log_softmax(random_model: Callable[..., Any]) -> None:
    model = random_model("gemma2", seed=3)
    prompts, answers = _prompts(), [[1, 2, 3], [4], [], [5, 6]]
    nll, num_tokens = answer_likelihood(SplitDecoder(model, 1), prompts, answers)
    assert num_tokens.tolist() == [3, 1, 0, 2]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        expected = -sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        assert float(nll[row]) == pytest.approx(expected, rel=1e-5)
    empty = answer_likelihood(SplitDecoder(model, 1), prompts, [[], [], [], []])
    assert empty.nll_B.tolist() == [0, 0, 0, 0]


def test_pair_generates_with_the_chat_model_and_its_stop_tokens(saved_pairs: Callable[[str], tuple[str, str]]) -> None:
    base, chat = saved_pairs("llama")
    pair = ModelPair.load(ModelSpec(base), ModelSpec(chat), LoadOptions(layer=1, dtype="float32"))
    assert pair.stop_token_ids() >= {pair.tokenizer.eos_token_id}
    answers = pair.generate(_prompts(), NUM_NEW)
    stops = sorted(pair.stop_token_ids())
    assert answers == [_alone(pair.decoders[1].model, prompt, stops) for prompt in _prompts()]
    assert pair.answer_likelihood(_prompts(), answers).num_tokens_B.tolist() == [len(answer) for answer in answers]


def test_wrong_vectors_and_empty_prompts_are_input_errors(random_model: Callable[..., Any]) -> None:
    decoder = SplitDecoder(random_model("llama", seed=3), 1)
    assert generate(decoder, [], max_new_tokens=3, stop_ids=[]) == []
    with pytest.raises(InputError, match=r"32.*\(1\).*\(16,\)"):
        generate(decoder, [[1]], max_new_tokens=3, stop_ids=[], steering=Steering(torch.zeros(16)))
    with pytest.raises(InputError, match="at least one token"):
        generate(decoder, [[1], []], max_new_tokens=3, stop_ids=[])


def test_likelihood_does_not_depend_on_the_chunks_of_logits(
    random_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SplitDecoder(random_model("gemma2", seed=3), 1)
    answers = [[1, 2, 3], [4], [], [5, 6]]
    whole = answer_likelihood(decoder, _prompts(), answers)
    monkeypatch.setattr("pipeline.models.decoder.LOGITS_PER_CHUNK", 2 * 97)
    assert list(decoder.head_chunks(5)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    torch.testing.assert_close(answer_likelihood(decoder, _prompts(), answers).nll_B, whole.nll_B)


def test_sampled_tokens_follow_the_models_probabilities(random_model: Callable[..., Any]) -> None:
    """An even grid of numbers draws each token as often as its probability says, to one grid step."""
    decoder = SplitDecoder(random_model("llama", seed=3), 1)
    prompt, num_draws, temperature = _prompts()[0], 1000, 0.5
    grid_BN = (torch.arange(num_draws, dtype=torch.float64)[:, None] + 0.5) / num_draws
    answers = generate(
        decoder, [prompt] * num_draws, max_new_tokens=1, stop_ids=[], sampling=Sampling(temperature, grid_BN)
    )
    ids = torch.tensor([prompt])
    hidden = decoder.upper(decoder.lower(ids, torch.ones_like(ids)), torch.ones_like(ids))
    probability_V = (decoder.head(hidden[0, -1:])[0].double() / temperature).softmax(-1)
    counts_V = torch.bincount(torch.tensor(answers).flatten(), minlength=len(probability_V))
    torch.testing.assert_close(counts_V.double() / num_draws, probability_V, rtol=0, atol=1.5 / num_draws)
    assert int((counts_V > 0).sum()) > 10


def test_sampled_answers_do_not_depend_on_the_batch(random_model: Callable[..., Any]) -> None:
    decoder = SplitDecoder(random_model("gemma2", seed=3), 1)
    uniform_BN = torch.rand(4, NUM_NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = generate(decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[], sampling=Sampling(1.0, uniform_BN))
    for prompt, own_N, answer in zip(_prompts(), uniform_BN, together, strict=True):
        sampling = Sampling(1.0, own_N[None])
        assert generate(decoder, [prompt], max_new_tokens=NUM_NEW, stop_ids=[], sampling=sampling) == [answer]


def test_prompts_beyond_the_context_and_wrong_sampling_are_refused(random_model: Callable[..., Any]) -> None:
    decoder = SplitDecoder(random_model("llama", seed=3), 1)
    context = decoder.base.config.max_position_embeddings
    with pytest.raises(InputError, match=f"prompts of at most {context - 4} tokens .* got one of {context - 3}"):
        generate(decoder, [[1] * (context - 3)], max_new_tokens=4, stop_ids=[])
    ids = torch.ones(1, context + 1, dtype=torch.int64)
    with pytest.raises(InputError, match=f"documents of at most {context} tokens .* got one of {context + 1}; lower"):
        decoder.lower(ids, torch.ones_like(ids))
    with pytest.raises(InputError, match=r"\(1, 4\), got shape \(2, 4\)"):
        generate(decoder, [[1]], max_new_tokens=4, stop_ids=[], sampling=Sampling(1.0, torch.rand(2, 4)))
    with pytest.raises(InputError, match="a temperature above 0, got 0"):
        generate(decoder, [[1]], max_new_tokens=4, stop_ids=[], sampling=Sampling(0, torch.rand(1, 4)))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_answers_are_told_token_by_token_and_end_where_asked(
    random_model: Callable[..., Any], architecture: str
) -> None:
    decoder = SplitDecoder(random_model(architecture, seed=3), 1)
    whole = generate(decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[])
    told: list[list[list[int]]] = []

    def note(answers: list[list[int]]) -> bool:
        told.append(answers)
        return len(told) < 3

    ended = generate(decoder, _prompts(), max_new_tokens=NUM_NEW, stop_ids=[], on_token=note)
    assert told == [[answer[:length] for answer in whole] for length in (1, 2, 3)]
    assert ended == told[-1]
