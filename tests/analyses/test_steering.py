import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pipeline.analyses.latent_sets import most_specific_latents
from pipeline.analyses.steering import SteeringOptions, SteeringRequest, shows_behavior, steer, steering_effect
from pipeline.analyses.steering_columns import STEERING_COLUMNS, STEERING_SAMPLE_COLUMNS
from pipeline.analyses.steering_inputs import (
    Direction,
    directions_of,
    random_controls,
)
from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.models.generation import Positions, Sampling, Steering
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT, MODEL_NAMES, Verdict
from pipeline.text.prompts import UNNAMED, BehaviorPrompts, parse_prompts
from pipeline.text.tokenizers import prompt_ids

WIDTH = 32
WORDS = [f"w{i}" for i in range(40)]
CONTROL = ["<pad>", "<bos>", "<eos>", "<turn>", "<end>", "user", "model"]
TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else 'user') \
+ ' ' + m['content'] + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model ' }}{% endif %}"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    vocabulary = {word: i for i, word in enumerate([*CONTROL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(CONTROL[:5])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        tie_word_embeddings=False,
    )
    decoders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        decoders.append(SplitDecoder(model, 1))
    return ModelPair(*decoders, tokenizer)


def _direction_towards(pair: ModelPair, word: str, max_contribution: float) -> Direction:
    """What the head reads as one word: far along it, every answer is that word."""
    index = pair.tokenizer.convert_tokens_to_ids(word)
    row = pair.decoders[CHAT].model.lm_head.weight[index].detach()
    return Direction(7, row / row.norm(), max_contribution)


def _requests(pair: ModelPair) -> list[SteeringRequest]:
    prompts = BehaviorPrompts("says_w5", ("w1 w2", "w3", "w4 w9 w8 w7"), ("w5",))
    other = BehaviorPrompts("says_w6", ("w3", "w11 w12"), ("w6 w6",))
    controls_RD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))
    controls_RD /= controls_RD.norm(dim=1, keepdim=True)
    return [
        SteeringRequest(prompts, (_direction_towards(pair, "w5", 20.0),), controls_RD),
        SteeringRequest(other, (), controls_RD),
    ]


OPTIONS = SteeringOptions(scales=(0.5, 50.0), max_new_tokens=6, num_samples=2)


def test_a_direction_towards_a_word_raises_its_rate_above_every_control(pair: ModelPair) -> None:
    table, samples = steer(pair, _requests(pair), OPTIONS)
    assert list(table.columns) == [column.name for column in STEERING_COLUMNS]
    assert list(samples.columns) == [column.name for column in STEERING_SAMPLE_COLUMNS]
    assert len(table) == 1 + 2 * (1 + 3) + 1
    far = table[(table["scale"] == 50.0) & (table["behavior"] == "says_w5")].set_index("control")
    assert far.loc["latent", "rate"] == 1.0
    assert (far.loc["random", "rate"] < 1.0).all()
    assert len(far.loc["random"]) == 3
    plain = table[table["control"] == "none"]
    assert plain["latent"].tolist() == [-1, -1]
    assert plain["scale"].tolist() == [0.0, 0.0]
    assert plain["num_prompts"].tolist() == [3, 2]
    assert plain["positions"].tolist() == ["none", "none"]
    assert (plain["kl"] == 0).all()
    assert far.loc["latent", "kl"] > table[(table["scale"] == 0.5) & (table["control"] == "latent")]["kl"].iloc[0] > 0
    assert far.loc["latent", "nll"] > plain["nll"].iloc[0]
    assert len(samples) == 2 * (1 + 2 * 2) + 2
    steered = samples[(samples["control"] == "latent") & (samples["scale"] == 50.0)]
    assert steered["prompt"].tolist() == ["w1 w2", "w3"]
    assert steered["shows_behavior"].all()


def test_answers_and_nll_equal_each_prompt_alone(pair: ModelPair) -> None:
    (request, _) = _requests(pair)
    (direction,) = request.directions
    table, samples = steer(pair, [request], OPTIONS._replace(prompts_per_batch=2, num_samples=3))
    for control, scale in (("none", 0.0), ("latent", 0.5)):
        steering = Steering(scale * direction.max_contribution * direction.unit_D)
        nll, num_tokens, texts = 0.0, 0, []
        for message in request.prompts.prompts:
            ids = prompt_ids(pair.tokenizer, [{"role": "user", "content": message}])
            (answer,) = pair.generate([ids], OPTIONS.max_new_tokens, steering if control == "latent" else None)
            likelihood = pair.answer_likelihood([ids], [answer])
            nll += float(likelihood.nll_B)
            num_tokens += len(answer)
            texts.append(pair.tokenizer.decode(answer, skip_special_tokens=True).strip())
        here = (samples["control"] == control) & (samples["scale"] == scale)
        assert samples[here]["answer"].tolist() == texts
        row = table[(table["control"] == control) & (table["scale"] == scale)].iloc[0]
        assert row["nll"] == pytest.approx(nll / num_tokens, rel=1e-4)
        assert row["rate"] == sum("w5" in text for text in texts) / 3


def test_batches_and_repetition_change_nothing_and_progress_counts_answers(pair: ModelPair) -> None:
    first = steer(pair, _requests(pair), OPTIONS)
    seen: list[tuple[int, int]] = []
    second = steer(
        pair, _requests(pair), OPTIONS._replace(prompts_per_batch=5), lambda done, total: seen.append((done, total))
    )
    pd.testing.assert_frame_equal(first.samples, second.samples)
    pd.testing.assert_frame_equal(first.table, second.table, rtol=1e-4)
    assert seen[-1] == (29, 29)
    assert [done for done, _ in seen[:-1]] == [5, 10, 15, 20, 25]


def test_answers_that_are_all_empty_have_no_nll(pair: ModelPair) -> None:
    (request, _) = _requests(pair)
    stop = _direction_towards(pair, "<eos>", 1000.0)
    request = request._replace(directions=(stop,), controls_RD=torch.zeros(0, WIDTH))
    table = steer(pair, [request], OPTIONS._replace(scales=(1.0,))).table
    assert math.isnan(table[table["control"] == "latent"]["nll"].iloc[0])
    assert table[table["control"] == "latent"]["rate"].iloc[0] == 0


def test_directions_are_unit_chat_decoders_with_the_largest_contribution() -> None:
    crosscoder = Crosscoder(4, 2, WIDTH)
    with torch.no_grad():
        crosscoder.W_dec_FMD.copy_(torch.randn(crosscoder.W_dec_FMD.shape, generator=torch.Generator().manual_seed(0)))
        crosscoder.W_dec_FMD[3, CHAT] = 0
    latents = pd.DataFrame({"latent": [0, 1, 2, 3], "max_activation": [1.5, 0.0, float("nan"), 2.0]})
    (direction,) = directions_of(crosscoder, latents, [0])
    expected = crosscoder.W_dec_FMD[0, CHAT].detach()
    torch.testing.assert_close(direction.unit_D * expected.norm(), expected)
    assert direction.max_contribution == pytest.approx(1.5 * float(expected.norm()))
    with torch.no_grad():
        crosscoder.W_dec_FMD[0] /= 20  # codes 20 times as large: what is added stays the same
    (rescaled,) = directions_of(crosscoder, latents.assign(max_activation=20 * latents["max_activation"]), [0])
    assert rescaled.max_contribution == pytest.approx(direction.max_contribution)
    torch.testing.assert_close(rescaled.unit_D, direction.unit_D)
    for latent in (1, 2, 3):
        with pytest.raises(InputError, match=f"latent {latent} has maximal activation"):
            directions_of(crosscoder, latents, [latent])
    with pytest.raises(InputError, match=r"between 0 and 3, got \[4\]"):
        directions_of(crosscoder, latents, [4])


def test_prompts_file_is_checked_by_behaviour_and_key() -> None:
    good: dict[str, Any] = {"refusal": {"neutral": ["a", "b", "c"], "markers": ["no"], "triggers": ["x"]}}
    (parsed,) = parse_prompts(good, num_prompts=2, source="p.json")
    assert parsed == BehaviorPrompts("refusal", ("a", "b"), ("no",))
    with pytest.raises(InputError, match=r"p\.json: expected a list of texts under refusal\.markers, got '\[\]'"):
        parse_prompts({"refusal": {"neutral": ["a"], "markers": []}}, num_prompts=2, source="p.json")
    with pytest.raises(InputError, match=r"refusal\.neutral, got 'None'"):
        parse_prompts({"refusal": ["a"]}, num_prompts=2, source="p.json")
    with pytest.raises(InputError, match=r"p\.json: expected"):
        parse_prompts([], num_prompts=2, source="p.json")
    with pytest.raises(InputError, match=r"expected a list of texts under the list, got '\[1\]'"):
        parse_prompts([1], num_prompts=2, source="p.json")


def test_prompts_without_markers_have_kl_and_fluency_but_no_rate(pair: ModelPair) -> None:
    (plain,) = parse_prompts(["w1 w2", "w3"], num_prompts=9, source="p.json")
    (named,) = parse_prompts({"my_task": {"neutral": ["w1 w2"]}}, num_prompts=9, source="p.json")
    assert (plain.behavior, plain.markers) == (UNNAMED, ())
    assert named == BehaviorPrompts("my_task", ("w1 w2",), ())
    request = SteeringRequest(plain, (_direction_towards(pair, "w5", 20.0),), torch.zeros(0, WIDTH))
    table, samples = steer(pair, [request], OPTIONS)
    assert table["rate"].isna().all()
    assert table["kl"].notna().all()
    assert table["nll"].notna().all()
    assert samples["shows_behavior"].isna().all()


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("model", [BASE, CHAT])
def test_kl_and_nll_equal_full_forwards_token_by_token(pair: ModelPair, model: int, positions: Positions) -> None:
    prompts, answers = [[1, 9, 12], [1, 7], [1, 4, 5, 6, 7]], [[8, 9, 10, 11], [], [20]]
    vector_BD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    effect = steering_effect(pair, model, prompts, answers, Steering(vector_BD, positions))
    if model == CHAT:
        torch.testing.assert_close(effect.nll_B, pair.answer_likelihood(prompts, answers).nll_B, rtol=1e-5, atol=1e-5)
    for prompt, answer, vector_D, found, nll in zip(prompts, answers, vector_BD, *effect, strict=True):
        expected, expected_nll = 0.0, 0.0
        for length in range(len(prompt), len(prompt) + len(answer) + 1):
            ids = torch.tensor([[*prompt, *answer][:length]])
            is_answer = torch.arange(length) >= len(prompt)
            where = {"all": torch.ones(length), "prompt": ~is_answer, "generated": is_answer}[positions].float()
            h_BTD = pair.lower(model, ids, torch.ones_like(ids))
            logs = [
                pair.upper_logits(model, h, torch.ones_like(ids))[0, -1].double().log_softmax(-1)
                for h in (h_BTD, h_BTD + where[None, :, None] * vector_D)
            ]
            expected += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            if length < len(prompt) + len(answer):
                expected_nll -= float(logs[0][answer[length - len(prompt)]])
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert float(nll) == pytest.approx(expected_nll, rel=1e-4, abs=1e-6)


def test_both_models_and_every_position_are_swept_and_equal_their_own_sweep(pair: ModelPair) -> None:
    (request, _) = _requests(pair)
    options = OPTIONS._replace(models=(CHAT, BASE), positions=("all", "generated"), temperature=0.7, seed=3)
    table, samples = steer(pair, [request], options)
    sweep = table[table["control"] != "none"]
    assert len(sweep) == 2 * 2 * 2 * (1 + 3)
    assert table[table["control"] == "none"]["model"].tolist() == ["chat", "base"]
    for model in (CHAT, BASE):
        for positions in ("all", "generated"):
            alone = steer(pair, [request], options._replace(models=(model,), positions=(positions,)))
            own = (samples["model"] == MODEL_NAMES[model]) & samples["positions"].isin(["none", positions])
            pd.testing.assert_frame_equal(samples[own].reset_index(drop=True), alone.samples)


def test_sampled_answers_use_each_prompts_own_numbers_and_zero_temperature_is_greedy(pair: ModelPair) -> None:
    (request, _) = _requests(pair)
    options = OPTIONS._replace(temperature=1.0, seed=5, num_samples=3)
    first, again = (steer(pair, [request], options._replace(prompts_per_batch=size)).samples for size in (256, 2))
    pd.testing.assert_frame_equal(first, again)
    other = steer(pair, [request], options._replace(seed=6)).samples
    assert first["answer"].tolist() != other["answer"].tolist()
    greedy = steer(pair, [request], options._replace(temperature=0.0)).samples
    cold = steer(pair, [request], options._replace(temperature=1e-4)).samples
    assert greedy["answer"].tolist() == cold["answer"].tolist()
    message = request.prompts.prompts[1]
    ids = prompt_ids(pair.tokenizer, [{"role": "user", "content": message}])
    uniform_BN = torch.from_numpy(np.random.default_rng((5, 1)).random(OPTIONS.max_new_tokens))[None]
    (answer,) = pair.generate([ids], OPTIONS.max_new_tokens, sampling=Sampling(1.0, uniform_BN))
    unsteered = first[(first["control"] == "none") & (first["prompt"] == message)]
    assert unsteered["answer"].tolist() == [pair.tokenizer.decode(answer, skip_special_tokens=True).strip()]


def test_the_most_specific_latents_are_chosen_by_evidence_and_may_be_none() -> None:
    latents = pd.DataFrame(
        {
            "latent": [0, 1, 2, 3],
            "verdict": [Verdict.CHAT_SPECIFIC, Verdict.SHARED, Verdict.CHAT_SPECIFIC, Verdict.CHAT_SPECIFIC],
            "nu_eps": [0.1, 0.0, 0.02, 0.05],
            "nu_r": [0.1, 0.0, 0.01, 0.2],
            "decoder_norm_base": 0.1,
        }
    )
    assert most_specific_latents(latents, 2) == (2, 0)
    assert most_specific_latents(latents, 9) == (2, 0, 3)
    assert most_specific_latents(latents[latents["verdict"] == Verdict.SHARED], 2) == ()


def test_markers_are_substrings_and_empty_requests_are_refused(pair: ModelPair) -> None:
    assert shows_behavior("I cannot help.", ("cannot", "will not"))
    assert not shows_behavior("I Cannot help.", ("cannot",))
    assert shows_behavior("I Cannot help.", ()) is None
    with pytest.raises(InputError, match=r"got none for \['x'\]"):
        steer(pair, [SteeringRequest(BehaviorPrompts("x", (), ("m",)), (), torch.zeros(0, WIDTH))], OPTIONS)
    with pytest.raises(InputError, match="max_new_tokens of at least 1, got 0"):
        steer(pair, _requests(pair), OPTIONS._replace(max_new_tokens=0))
    with pytest.raises(InputError, match="at least one of models to steer, got none"):
        steer(pair, _requests(pair), OPTIONS._replace(models=()))
    with pytest.raises(InputError, match=r"temperature of at least 0 .* got -1"):
        steer(pair, _requests(pair), OPTIONS._replace(temperature=-1.0))


def test_random_controls_are_other_latents_that_fire() -> None:
    crosscoder = Crosscoder(6, 2, WIDTH)
    with torch.no_grad():
        crosscoder.W_dec_FMD.normal_(generator=torch.Generator().manual_seed(0))
    latents = pd.DataFrame({"latent": range(6), "max_activation": [1.0, 2.0, 0.0, 4.0, 5.0, 6.0]})
    first, again, other = (random_controls(crosscoder, latents, excluded=(0,), num=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    allowed_FD = crosscoder.raw_decoder_FMD()[[1, 3, 4, 5], CHAT]
    cosine_RF = first @ (allowed_FD / allowed_FD.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(cosine_RF.max(dim=1).values, torch.ones(3))
    assert len(random_controls(crosscoder, latents, excluded=(0, 1, 3, 4, 5), num=3, seed=0)) == 0
