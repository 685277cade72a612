"""Calls that make no sense: one line each, of a public exception type, before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little_texts import TEXTS, VOCABULARY

import crossray
from pipeline.library.crosscoder import Crosscoder
from pipeline.library.pair import Pair
from pipeline.library.rows import Rows


def refused(match: str) -> Any:
    return pytest.raises(crossray.InputError, match=match)


def one_line(error: pytest.ExceptionInfo[crossray.InputError]) -> bool:
    return "\n" not in str(error.value) and 20 < len(str(error.value)) < 400


@pytest.fixture(scope="module")
def narrow() -> Crosscoder:
    return Crosscoder(8, 2, 5)


def test_a_crosscoder_of_another_width(narrow: Crosscoder, pair: Pair, rows: Rows) -> None:
    for call in (
        lambda: pair.steer(narrow, 0, 1.0).__enter__(),
        lambda: pair.splice(narrow).__enter__(),
        lambda: pair.attribute(narrow, TEXTS[:1]),
        lambda: crossray.latents(narrow, rows),
    ):
        with refused("width 32.* 5") as error:
            call()
        assert one_line(error)


def test_the_models_in_the_wrong_order(pair: Pair, fitted: Crosscoder, rows: Rows) -> None:
    turned = crossray.load_pair(pair.chat, pair.base, layer=pair.layer, tokenizer=pair.tokenizer)
    turned_rows = turned.activations(TEXTS[:5])
    for call in (
        lambda: turned.steer(fitted, 0, 1.0).__enter__(),
        lambda: crossray.latents(fitted, turned_rows),
    ):
        with refused("the other way round") as error:
            call()
        assert one_line(error)


def test_another_pair_or_layer(make_pair: Callable[..., Pair], fitted: Crosscoder) -> None:
    other = make_pair("llama")
    with refused("other models"):
        other.splice(fitted).__enter__()
    with refused("other models") as error:
        crossray.latents(fitted, other.activations(TEXTS[:5]))
    assert one_line(error)
    with refused("layer 2.* 1"):
        make_pair("gemma2", layer=2).steer(fitted, 0, 1.0).__enter__()


def test_latents_that_are_not_there(pair: Pair, fitted: Crosscoder) -> None:
    for latent in (-1, fitted.num_latents):
        with refused(f"{fitted.num_latents - 1}.*{latent}"):
            pair.steer(fitted, latent, 1.0).__enter__()
        with refused(str(latent)) as error:
            pair.splice(fitted, without=[latent]).__enter__()
        assert one_line(error)


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        ([], "empty list"),
        ("one text", "list of texts"),
        ({"role": "user", "content": "x"}, "list"),
        ([{"role": "user", "content": "not a list of dialogues"}], "list of texts"),
        ([""], r"texts\[0\]"),
        (["fine", 3], r"texts\[1\]"),
        (["fine", [{"role": "user"}]], r"texts\[1\]"),
        (["fine", [{"role": "user", "content": None}]], r"texts\[1\]"),
        (["fine", []], r"texts\[1\]"),
    ],
)
def test_texts_that_are_none(pair: Pair, texts: Any, what: str) -> None:
    with refused(what) as error:
        pair.activations(texts)
    assert one_line(error)


def test_prompts_that_are_none(pair: Pair) -> None:
    with refused("empty list"):
        pair.generate([])
    with refused(r"prompts\[0\]"):
        pair.generate([3])  # type: ignore[list-item]


def test_models_that_are_no_pair(make_pair: Callable[..., Pair], random_model: Callable[..., Any], pair: Pair) -> None:
    tokenizer = pair.tokenizer
    with refused("vocabulary"):
        crossray.load_pair(pair.base, random_model("gemma2", seed=1), layer=1, tokenizer=tokenizer)
    for layer in (4, -1):
        with refused("layer"):
            crossray.load_pair(pair.base, pair.chat, layer=layer, tokenizer=tokenizer)
    with refused("tokenizer"):
        crossray.load_pair(pair.base, pair.chat, layer=1)
    with refused("tokenizer"):
        crossray.load_pair(pair.base, "somewhere", layer=1, tokenizer=tokenizer)
    with refused("drop_first_token"):
        crossray.load_pair(pair.base, pair.chat, layer=1, tokenizer=tokenizer, drop_first_token=3)
    with refused("no such folder"):
        crossray.load_pair("./nowhere", "./nowhere", layer=1)
    with refused("preset"):
        crossray.load_pair(pair.base, pair.chat, layer=1, tokenizer=tokenizer, preset="gemma")  # type: ignore[arg-type]
    with refused("dtype"):
        crossray.load_pair("./nowhere", "./nowhere", layer=1, dtype="int8")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"sparsity": "batch_top"}, "sparsity"),
        ({"k": 0}, "k"),
        ({"k": 1000}, "1000"),
        ({"expansion": 4, "num_latents": 64}, "expansion"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"num_steps": 0}, "num_rows"),
        ({"seed": -1}, "seed"),
        ({"seeds": 0}, "seeds"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_settings_of_a_fit(rows: Rows, settings: dict[str, Any], what: str) -> None:
    with refused(what) as error:
        crossray.fit(rows, **{"k": 2, "num_steps": 1, "device": "cpu", **settings})
    assert one_line(error)


def test_targets_of_attribution(pair: Pair, fitted: Crosscoder) -> None:
    for target in ("logit", VOCABULARY, 1.5):
        with refused("target"):
            pair.attribute(fitted, TEXTS[:1], target)  # type: ignore[arg-type]
    with refused("one number"):
        pair.attribute(fitted, TEXTS[:1], lambda *of: of[0][0, 0])
    with refused("model"):
        pair.attribute(fitted, TEXTS[:1], model="assistant")  # type: ignore[arg-type]


def test_a_cache_from_outside_the_block(pair: Pair, fitted: Crosscoder) -> None:
    ids = torch.tensor([[5, 6, 7]])
    cache = pair.chat(ids, use_cache=True).past_key_values
    with refused("begun within the block"), pair.splice(fitted):
        pair.chat(ids[:, :1], past_key_values=cache)


def test_runs_that_are_not_there(tmp_path: Path) -> None:
    with refused("demo"):
        crossray.open(tmp_path, "demo")
    with refused("name"):
        crossray.run({"models": {}})
    with refused("nowhere"):
        crossray.run(tmp_path / "nowhere.yaml")
