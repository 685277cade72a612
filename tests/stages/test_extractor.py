"""What a worker of the extraction does, without a cluster: it checks its models first, then makes rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pipeline.config.data import ActivationsSection, HubModel
from pipeline.errors import InputError
from pipeline.models.decoder import SplitDecoder
from pipeline.schema import BASE, CHAT
from pipeline.stages.extractor import Extractor
from pipeline.stages.locations import Loading, ModelPairLocation, locate
from pipeline.stages.models import worker_devices
from pipeline.stages.tokens import INDEX_NAME, INDEX_SCHEMA
from pipeline.storage.filesystem import Storage
from pipeline.storage.tables import TOKEN_SCHEMA, write_table

LENGTHS = (9, 4, 17, 1)
VOCAB = 31


@pytest.fixture
def extractor(tmp_path: Path) -> Extractor:
    """Two random models that differ, and four documents of which the second cannot be read."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=VOCAB
    )
    for seed, name in enumerate(("base", "chat")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        words = {f"w{i}": i for i in range(VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / name)
    storage = Storage(str(tmp_path / "runs"))
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    ids[1][2] = VOCAB + 5
    common: dict[str, Any] = {"doc_id": [10, 11, 12, 13], "corpus": ["web"] * 4, "split": ["train"] * 4}
    flags = [[0] * length for length in LENGTHS]
    write_table(
        storage, "t/part.parquet", {**common, "input_ids": ids, "flags": flags, "num_cut": [0] * 4}, TOKEN_SCHEMA
    )
    index = {
        **common,
        "num_tokens": list(LENGTHS),
        "num_history": [0] * 4,
        "part": ["part.parquet"] * 4,
        "row": list(range(4)),
    }
    write_table(storage, f"t/{INDEX_NAME}", index, INDEX_SCHEMA)
    base, chat = (locate(HubModel(source=str(tmp_path / name))) for name in ("base", "chat"))
    return Extractor(
        storage,
        "t",
        section=ActivationsSection(layer=1),
        loading=Loading(ModelPairLocation(base, chat), 1, "float32", None, "one_device", 0),
        corpora=("web",),
        max_rejected=1,
    )


def test_models_are_checked_before_rows_are_made(extractor: Extractor) -> None:
    extracted = extractor(np.arange(4))
    assert [document["doc_id"] for document in extracted.rejected] == [11]
    assert len(extracted.rows.x_BMD) == 9 + 17 + 1
    verification = extractor.verification
    assert all(0 <= difference < 1e-5 for difference in verification.relative_difference)
    assert extractor.commits == (None, None)
    assert extracted.num_out_of_memory == 0


def test_models_that_batch_wrongly_are_refused_in_one_line(
    extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SplitDecoder.lower

    def wrong(self: SplitDecoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return right(self, ids_BT, mask_BT).roll(1, dims=1)

    monkeypatch.setattr(SplitDecoder, "lower", wrong)
    with pytest.raises(InputError, match=r"layer 1 of the base model within 0\.001 .* try another models\.attn"):
        extractor(np.arange(4))


def test_devices_are_named_as_a_worker_sees_them() -> None:
    assert worker_devices(0, "one_device") == ("cpu",)
    assert worker_devices(0, "two_devices") == ("cpu", "cpu")
    assert worker_devices(0.5, "one_device") == ("cuda:0",)
    assert worker_devices(4, "spread")[BASE] == "cuda:0"
    assert worker_devices(2, "two_devices")[CHAT] == "cuda:1"
