"""One shard file: exact bytes back, other tools read it, compression that loses what it says and no more."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from pipeline.errors import ArtifactError, InputError
from pipeline.numerics.moments import moments_of
from pipeline.schema import SHARD_TENSORS
from pipeline.storage.activation_store import StoredMoments
from pipeline.storage.filesystem import Storage
from pipeline.storage.shards import Rows, open_shard, pack_shard, publish_shard, require_finite, summarise, unpack_rows

KINDS = ("none", "lossless", "int8")


def make_rows(num_rows: int, *, num_models: int = 2, dim: int = 5, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x_BMD = torch.randn(num_rows, num_models, dim, generator=generator) * torch.linspace(0, 3, dim).exp()
    numbers = torch.arange(num_rows)
    return Rows(
        x_BMD.to(torch.bfloat16), numbers.int(), numbers + (1 << 60), numbers.int(), numbers.int(), numbers.int()
    )


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["none", "lossless"])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 2500])
def test_what_is_packed_comes_back_to_the_bit(kind: str, num_rows: int) -> None:
    rows = make_rows(num_rows)
    back = unpack_rows(as_tensor(pack_shard(rows, kind)), "here")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(rows, back, strict=True))


def test_every_bfloat16_survives_lossless_compression() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x_BMD = bits.view(torch.bfloat16).view(-1, 2, 16)
    rows = make_rows(len(x_BMD))._replace(x_BMD=x_BMD)
    back = unpack_rows(as_tensor(pack_shard(rows, "lossless")), "here")
    assert torch.equal(back.x_BMD.view(torch.int16), x_BMD.view(torch.int16))


def test_several_frames_join_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.shards._FRAME_VALUES", 70)
    rows = make_rows(50)
    back = unpack_rows(as_tensor(pack_shard(rows, "lossless")), "here")
    assert torch.equal(back.x_BMD, rows.x_BMD)


def test_int8_is_off_by_at_most_half_a_step_of_its_row_and_model() -> None:
    rows = make_rows(300)
    rows.x_BMD[7, 1] = 0
    back = unpack_rows(as_tensor(pack_shard(rows, "int8")), "here").x_BMD.double()
    x_BMD = rows.x_BMD.double()
    step_BM = x_BMD.abs().amax(2) / 127
    rounding_BMD = back.abs() * 2.0**-8  # what is read is bfloat16 again
    assert ((back - x_BMD).abs() <= step_BM[:, :, None] * 0.5001 + rounding_BMD).all()
    assert (back[7, 1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_give_the_same_bytes(kind: str) -> None:
    assert pack_shard(make_rows(3000), kind) == pack_shard(make_rows(3000), kind)
    assert pack_shard(make_rows(3000), kind) != pack_shard(make_rows(3000, seed=1), kind)


def test_compression_makes_shards_smaller() -> None:
    sizes = [len(pack_shard(make_rows(2000, dim=64), kind)) for kind in KINDS]
    assert sizes[2] < 0.6 * sizes[0]
    assert sizes[1] < 0.85 * sizes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_other_tools_read_the_file(kind: str) -> None:
    rows = make_rows(40)
    tensors = load(pack_shard(rows, kind))
    for column, expected in zip(SHARD_TENSORS[1:], rows[1:], strict=True):
        assert torch.equal(tensors[column.name], expected)
    if kind == "none":
        assert torch.equal(tensors["x"], rows.x_BMD)
    if kind == "int8":
        assert tensors["x"].dtype == torch.int8
        assert tensors["x_scale"].shape == (40, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_taken_are_those_of_the_whole(kind: str) -> None:
    data = as_tensor(pack_shard(make_rows(90), kind))
    index = torch.tensor([3, 89, 0, 3])
    whole_BMD = unpack_rows(data, "here").x_BMD
    for dtype in (torch.bfloat16, torch.float32):
        taken = torch.empty(4, 2, 5, dtype=dtype)
        open_shard(data, "here").take(index, taken)
        assert torch.equal(taken, whole_BMD[index].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_is_what_its_description_says(tmp_path: Path, kind: str) -> None:
    storage = Storage(str(tmp_path))
    file = publish_shard(storage, "a/b", make_rows(2000), kind)
    assert storage.digest("a/b") == (file.num_bytes, file.sha256)
    assert storage.read_bytes("a/b") == pack_shard(make_rows(2000), kind)


def test_what_is_no_shard_is_named() -> None:
    data = pack_shard(make_rows(10))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["x"]["data_offsets"][1] = 1 << 40
    text = json.dumps(header).encode()
    broken = len(text).to_bytes(8, "little") + text + bytes(800)
    for content in (b"", b"PK", b"\xff" * 64, data[:60], broken, data[:8] + b"[" + data[9:]):
        with pytest.raises(ArtifactError, match="here: "):
            unpack_rows(as_tensor(content) if content else torch.empty(0, dtype=torch.uint8), "here")


def test_frames_that_are_damaged_are_named() -> None:
    data = bytearray(pack_shard(make_rows(2000), "lossless"))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["x_exponent"]["data_offsets"][0]
    data[start : start + 8] = bytes(8)
    with pytest.raises(ArtifactError, match="zstd"):
        open_shard(as_tensor(bytes(data)), "here")


def test_moments_of_shards_merge_to_those_of_all_rows() -> None:
    x_BMD = make_rows(5000).x_BMD
    x_BMD[:, 0, 0] += 1000
    parts = [StoredMoments.of(summarise(part).moments).moments() for part in x_BMD.split([0, 10, 1500, 3490])]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    exact = x_BMD.double()
    assert int(merged.num_rows) == 5000
    assert torch.allclose(merged.mean_MD, exact.mean(0), rtol=1e-6)
    assert torch.allclose(merged.variance_M(), exact.var(0, correction=0).sum(1), rtol=1e-5)
    assert torch.allclose(merged.variance_M(), moments_of(exact).variance_M(), rtol=1e-5)
    assert torch.allclose(summarise(x_BMD).mean_norm_M, exact.norm(dim=2).mean(0), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_found(value: float) -> None:
    rows = make_rows(3000)
    require_finite(rows, "here")
    rows.x_BMD[2100, 1, 3] = value
    with pytest.raises(InputError, match="here: expected finite activations, got NaN or Inf in row 2100"):
        require_finite(rows, "here")
