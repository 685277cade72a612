import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from pipeline.analyses.causal_batch import MEASURES
from pipeline.analyses.causal_tables import POSITION_SETS, Bootstrap
from pipeline.analyses.causality import Causality, causality_batches, predicting_positions
from pipeline.analyses.interventions import Baselines, Intervention, shared_interventions
from pipeline.errors import InputError
from pipeline.extraction.activations import RowOptions
from pipeline.models.decoder import SplitDecoder
from pipeline.models.pair import ModelPair
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CAUSALITY_COLUMNS, CHAT, Flag
from pipeline.text.conversations import turn_id

LAYER, WIDTH, VOCAB, NUM_LATENTS = 1, 16, 53, 24
MEAN_D = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
PRINCIPAL_KD = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(5)).double())[0].T
BASELINES = Baselines(MEAN_D, PRINCIPAL_KD, num_first=3)
INTERVENTIONS = (
    *shared_interventions(BASELINES),
    Intervention("all", "all"),
    Intervention("error", "error"),
    Intervention("half_replace", "replace", tuple(range(0, NUM_LATENTS, 2))),
    Intervention("half_add", "add", tuple(range(1, NUM_LATENTS, 2))),
    Intervention("empty_replace", "replace"),
    Intervention("same_half_replace", "replace", tuple(range(0, NUM_LATENTS, 2))),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Gemma2Config(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=VOCAB,
        sliding_window=6,
        query_pre_attn_scalar=8,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    base = _model(0)
    chat = copy.deepcopy(base)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in chat.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return base.double(), chat.double()


@pytest.fixture(scope="module")
def pair(models: tuple[Any, Any]) -> ModelPair:
    return ModelPair(SplitDecoder(models[0], LAYER), SplitDecoder(models[1], LAYER), None)


@pytest.fixture(scope="module")
def crosscoder() -> Crosscoder:
    generator = torch.Generator().manual_seed(3)
    made = Crosscoder(NUM_LATENTS, 2, WIDTH, activation="batch_topk", k=4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    made.threshold.fill_(2.0)
    return made


def _flags(text: str) -> np.ndarray:
    """B = BOS, t = template, e = control token of the template, u = user, a = assistant, r = its reasoning, c = closing
    tag of reasoning, k = tool call."""
    bits = {
        "B": Flag.BOS | Flag.SPECIAL,
        "t": Flag.TEMPLATE,
        "e": Flag.TEMPLATE | Flag.SPECIAL,
        "u": Flag.USER,
        "a": Flag.ASSISTANT,
        "r": Flag.ASSISTANT | Flag.REASONING,
        "c": Flag.TEMPLATE | Flag.REASONING,
        "k": Flag.ASSISTANT | Flag.TOOL,
    }
    return np.array([int(bits[letter]) for letter in text], np.int32)


TEXTS = ("Bttuuttaaatt", "Btuuu", "Bttutt" + "a" * 14 + "tuta" + "t", "ttuta", "Bttuttaatuutaaat")
TURNS = ("Beuetrrrcaaaaaaaaaaetuet", "BetuetaaetueteukketaaeB")
TURN_IDS = [turn_id(9000, 0), turn_id(9000, 1)]
NUM_HISTORY = (0, 9)
"""Two documents of one dialogue; the second begins with 9 tokens of the first turn."""


def _documents(*, with_turns: bool = False) -> dict[str, list[Any]]:
    texts = [*TEXTS, *TURNS] if with_turns else TEXTS
    generator = np.random.default_rng(0)
    documents = {
        "doc_id": [70, 71, 62, 73, 54, *TURN_IDS][: len(texts)],
        "input_ids": [generator.integers(0, VOCAB, len(text)).astype(np.int32) for text in texts],
        "flags": [_flags(text) for text in texts],
    }
    for flags, num_history in zip(documents["flags"][len(TEXTS) :], NUM_HISTORY, strict=False):
        flags[:num_history] |= int(Flag.HISTORY)
    return documents


def _sums(pair: ModelPair, analysis: Causality, documents: dict[str, list[Any]], options: RowOptions) -> Any:
    sums = analysis.start()
    for batch in causality_batches(pair, documents, options, BASELINES):
        analysis.update(sums, batch)
    return sums


def _plain(model: Any, ids: np.ndarray, edited: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Stream after layer L and log-probabilities of one full forward, the stream replaced by a hook if one is given."""
    seen = []

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return output if edited is None else edited[None]

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
    handle.remove()
    return seen[0][0], logits.log_softmax(-1)


def _brute_force(
    models: tuple[Any, Any], crosscoder: Crosscoder, *, drop_bos: bool, drop_first_tokens: int
) -> dict[str, np.ndarray]:
    """Summed measures and counts [document, position set] per intervention, full logits, one document at a time.

    Equal to about 1e-6: the architecture takes its softmax and norms in float32 whatever the weights are.
    """
    documents = _documents(with_turns=True)
    texts = (*TEXTS, *TURNS)
    result = {item.name: np.zeros((len(texts), 3, 4)) for item in INTERVENTIONS}
    base_D, chat_D = crosscoder.W_dec_FMD.detach()[:, BASE], crosscoder.W_dec_FMD.detach()[:, CHAT]
    for row, (ids, flags) in enumerate(zip(documents["input_ids"], documents["flags"], strict=True)):
        x_base, base_log = _plain(models[0], ids)
        x_chat, chat_log = _plain(models[1], ids)
        code = crosscoder.encode(torch.stack([x_base, x_chat], dim=1)).to_dense()
        is_kept = torch.ones(len(ids), 1, dtype=torch.float64)
        if drop_bos:
            is_kept[torch.from_numpy((flags & Flag.BOS) != 0)] = 0
        is_kept[:drop_first_tokens] = 0
        num_history = (*[0] * len(TEXTS), *NUM_HISTORY)[row]
        is_kept[:num_history] = 0
        num_leading = max(drop_first_tokens, int(drop_bos and texts[row].startswith("B")))
        code = code * is_kept
        is_template = torch.from_numpy((flags & Flag.TEMPLATE) != 0)
        turns = _places_in_turns(texts[row], num_history)
        is_first = torch.tensor([turns.get(t + 1, 9) < 3 for t in range(len(ids))])
        for item in INTERVENTIONS:
            chosen = code[:, list(item.latents)]
            edited = {
                "none": x_base,
                "template": torch.where(is_template[:, None], x_chat, x_base),
                "chat": x_chat,
                "first": torch.where(is_first[:, None], x_chat, x_base),
                "template_and_first": torch.where((is_first | is_template)[:, None], x_chat, x_base),
                "principal_1": x_base + is_kept * torch.outer((x_chat - x_base) @ PRINCIPAL_KD[0], PRINCIPAL_KD[0]),
                "principal_all": x_base + is_kept * ((x_chat - x_base) @ PRINCIPAL_KD.T @ PRINCIPAL_KD),
                "mean_difference": x_base + is_kept * MEAN_D,
                "mean_difference_projection": x_base
                + is_kept * torch.outer((x_chat - x_base) @ MEAN_D / MEAN_D.square().sum(), MEAN_D),
                "all": x_base + code @ (chat_D - base_D),
                "error": x_chat - code @ (chat_D - base_D),
                "replace": x_base + chosen @ (chat_D - base_D)[list(item.latents)],
                "add": x_base + chosen @ chat_D[list(item.latents)],
            }
            if item.kind != "base":
                edited[item.kind][:num_leading] = x_chat[:num_leading]
            log = base_log if item.kind == "base" else _plain(models[1], ids, edited[item.kind].clone())[1]
            kl = (chat_log.exp() * (chat_log - log)).sum(-1).numpy()
            kl_base = (base_log.exp() * (base_log - log)).sum(-1).numpy()
            for t, place in turns.items():
                is_first_9 = place < 10 and texts[row][t - 1] not in "te"
                member = [True, is_first_9, not is_first_9]
                values = [kl[t - 1], kl_base[t - 1], -float(log[t - 1, ids[t]]), 1.0]
                result[item.name][row] += np.array(member)[:, None] * np.array(values)
    return result


def _places_in_turns(text: str, num_history: int) -> dict[int, int]:
    """Predicted tokens, each with its place in its turn."""
    places, place = {}, 0
    for t in range(1, len(text)):
        letter, before = text[t], text[t - 1]
        is_predicted = t >= num_history and (letter in "arck" or (letter == "e" and before in "arck"))
        place = place + 1 if is_predicted and before in "arck" and t > num_history else 0
        if is_predicted:
            places[t] = place
    return places


@pytest.mark.parametrize(("drop_bos", "drop_first_tokens"), [(False, 0), (True, 0), (True, 3)])
def test_kl_equals_brute_force_over_full_logits(
    models: tuple[Any, Any], pair: ModelPair, crosscoder: Crosscoder, drop_bos: bool, drop_first_tokens: int
) -> None:
    analysis = Causality(crosscoder, INTERVENTIONS)
    options = RowOptions(40, drop_bos=drop_bos, drop_first_tokens=drop_first_tokens)
    sums = _sums(pair, analysis, _documents(with_turns=True), options)
    table = analysis.tables(sums).kl.set_index(["intervention", "positions"])
    expected = _brute_force(models, crosscoder, drop_bos=drop_bos, drop_first_tokens=drop_first_tokens)
    for item in INTERVENTIONS:
        for s, positions in enumerate(POSITION_SETS):
            *measured, tokens = expected[item.name][:, s].sum(0)
            row = table.loc[(item.name, positions)]
            assert row["num_tokens"] == tokens
            for name, value in zip(MEASURES, measured, strict=True):
                assert row[name] == pytest.approx(value / tokens, rel=1e-5, abs=1e-9), (item.name, positions, name)
    assert (table.loc["chat", "kl"] == 0).all() and (table.loc["base", "kl_base"] == 0).all()
    assert table.loc["empty_replace", "kl"].tolist() == pytest.approx(table.loc["none", "kl"].tolist(), rel=1e-12)
    assert (table.loc["empty_replace", "num_latents"] == 0).all()
    assert (table.loc["half_add", "num_latents"] == 12).all()
    assert (table.loc["all", "num_latents"] == NUM_LATENTS).all()
    assert table.loc[("none", "all"), "kl"] > 0.01
    assert table.loc[("all", "all"), "num_conversations"] == 5  # the last two documents are one conversation
    names = [item.name for item in INTERVENTIONS if item.name != "chat"]
    distinct = {round(float(table.loc[(name, "all"), "kl"]), 10) for name in names}
    assert len(distinct) == len(names) - 2  # empty_replace equals none, same_half_replace equals half_replace


def test_intervals_enclose_the_mean_and_columns_are_the_schema(pair: ModelPair, crosscoder: Crosscoder) -> None:
    analysis = Causality(crosscoder, INTERVENTIONS)
    table = analysis.tables(_sums(pair, analysis, _documents(), RowOptions(40)), Bootstrap(200)).kl
    assert list(table.columns) == [column.name for column in CAUSALITY_COLUMNS]
    everywhere = table[table["positions"] == "all"]
    assert (everywhere["kl_low"] <= everywhere["kl"]).all()
    assert (everywhere["kl_high"] >= everywhere["kl"]).all()


def test_parts_merge_to_the_whole_in_any_order(pair: ModelPair, crosscoder: Crosscoder) -> None:
    analysis = Causality(crosscoder, INTERVENTIONS)
    documents = _documents()
    whole = _sums(pair, analysis, documents, RowOptions(40))
    parts = [
        _sums(pair, analysis, {name: column[rows] for name, column in documents.items()}, RowOptions(40))
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = analysis.start()
        for index in order:
            merged = analysis.merge(merged, parts[index])
        assert merged["doc_id_G"].tolist() == [54, 62, 70, 73]
        for name, value in whole.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-8)


def test_bfloat16_pair_gives_exactly_zero_for_the_unedited_chat_model(
    models: tuple[Any, Any], crosscoder: Crosscoder
) -> None:
    base, chat = (copy.deepcopy(model).to(torch.bfloat16) for model in models)
    pair = ModelPair(SplitDecoder(base, LAYER), SplitDecoder(chat, LAYER), None)
    analysis = Causality(copy.deepcopy(crosscoder).float(), INTERVENTIONS)
    table = analysis.tables(_sums(pair, analysis, _documents(), RowOptions(1000))).kl
    assert (table[table["intervention"] == "chat"]["kl"] == 0).all()
    assert (table[table["intervention"] == "none"]["kl"] > 0).all()


def test_a_difference_sae_enters_as_an_ordinary_crosscoder(pair: ModelPair) -> None:
    """Latents +e_i and -e_i of x^chat - x^base, base decoder 0: `all` restores the chat stream, `error` the base's."""
    sae = Crosscoder(2 * WIDTH, 2, WIDTH).double()
    unit_FD = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double()
    with torch.no_grad():
        sae.W_enc_FMD.copy_(torch.stack([-unit_FD, unit_FD], dim=1))
        sae.W_dec_FMD.copy_(torch.stack([torch.zeros_like(unit_FD), unit_FD], dim=1))
        sae.b_enc_F.zero_()
    half = tuple(range(0, 2 * WIDTH, 2))
    sets = (Intervention("half_replace", "replace", half), Intervention("half_add", "add", half))
    analysis = Causality(
        sae, (*shared_interventions(), Intervention("all", "all"), Intervention("error", "error"), *sets)
    )
    table = analysis.tables(_sums(pair, analysis, _documents(), RowOptions(40))).kl
    kl = table[table["positions"] == "all"].set_index("intervention")["kl"]
    assert kl["all"] == pytest.approx(0, abs=1e-6)
    assert kl["error"] == pytest.approx(kl["none"], rel=1e-4)
    assert kl["half_replace"] == kl["half_add"]  # a base decoder of 0: the two edits are one
    assert 0 < kl["half_replace"] != kl["none"]


def test_predicting_positions_of_two_turns() -> None:
    position, in_set, _ = predicting_positions(_flags("Btuta" + "a" * 11 + "tuataa"))
    assert position.tolist() == [*range(3, 15), 17, 19, 20]
    first_9 = [False] + [True] * 9 + [False] * 2 + [True] + [False, True]
    assert in_set[:, POSITION_SETS.index("first_9")].tolist() == first_9
    assert in_set[:, POSITION_SETS.index("rest")].tolist() == [not is_first for is_first in first_9]
    assert len(predicting_positions(_flags("Btuut")).position_P) == 0
    assert predicting_positions(_flags("aa")).position_P.tolist() == [0]


def test_the_token_that_ends_a_turn_is_predicted_and_the_tag_that_closes_reasoning_belongs_to_the_turn() -> None:
    position, in_set, _ = predicting_positions(_flags("Betuet" + "rrcaa" + "et" + "ut" + "kk" + "e"))
    assert position.tolist() == [5, 6, 7, 8, 9, 10, 14, 15, 16]
    first_9 = [False, True, True, True, True, True, False, True, True]
    assert in_set[:, POSITION_SETS.index("first_9")].tolist() == first_9


def test_earlier_turns_of_a_document_are_not_predicted() -> None:
    flags = _flags("Betuetaaetuetaae")
    flags[:9] |= int(Flag.HISTORY)
    assert predicting_positions(flags).position_P.tolist() == [12, 13, 14]


def test_wrong_sets_and_missing_dialogues_are_input_errors(pair: ModelPair, crosscoder: Crosscoder) -> None:
    with pytest.raises(InputError, match=r"between 0 and 23, got \[24\]"):
        Causality(crosscoder, [Intervention("x", "add", (3, 24))])
    analysis = Causality(crosscoder, INTERVENTIONS)
    documents = {name: column[1:2] for name, column in _documents().items()}
    with pytest.raises(InputError, match="assistant turns for the causality analysis, got 0"):
        analysis.tables(_sums(pair, analysis, documents, RowOptions(40)))
