"""The Triton kernels against plain dense formulas: on a CUDA device where there is one, else in Triton's interpreter.

The interpreter runs the same programs one block at a time with numpy, so it proves indices, masks and sums, not speed.
Sizes are chosen so that every mask is needed: odd widths, several column pieces, empty rows and latents, segments
longer than a step.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
# Before 3.7 the interpreter cannot loop with numpy 2.4; the compiler can.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7")

from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.kernels.base import Kernels, latent_order
from pipeline.numerics.kernels.choose import choose_kernels
from pipeline.numerics.kernels.triton import (
    LINES_PER_LATENT_STEP,
    LINES_PER_ROW_STEP,
    PAIRS_PER_SUM,
    TritonKernels,
)
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TOLERANCE = {F32: 1e-5, F64: 1e-12, BF16: 1.6e-2}
"""Relative to the largest entry; one bfloat16 rounding is 2**-8 = 0.4e-2."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    yield TritonKernels()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def sparse_codes(num_rows: int, num_latents: int, *, active: float, seed: int = 0) -> SparseCodes:
    """Codes with empty rows (0 and 2), empty latents (0 and the last) and one latent on almost all rows."""
    generator = torch.Generator().manual_seed(seed)
    code_BF = torch.rand(num_rows, num_latents, generator=generator) + 0.1
    code_BF *= torch.rand(num_rows, num_latents, generator=generator) < active
    code_BF[:, num_latents // 2] = torch.rand(num_rows, generator=generator) + 0.1
    code_BF[0] = 0
    code_BF[2] = 0
    code_BF[:, 0] = 0
    code_BF[:, -1] = 0
    return SparseCodes.from_dense(code_BF.to(DEVICE))


def assert_close(came: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert came.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(came.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-30))


@pytest.mark.parametrize(("width", "dtype"), [(1, F32), (7, F32), (333, F32), (333, BF16), (7, F64)])
def test_decode_is_the_dense_product(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    codes = sparse_codes(9, 41, active=0.6)
    assert int(codes.row_offsets.diff().max()) > LINES_PER_ROW_STEP
    W_dec_FN = random(41, width, seed=1, dtype=dtype)
    xh_BN = kernels.decode(codes, W_dec_FN)
    assert xh_BN.dtype == dtype
    assert_close(xh_BN, codes.to_dense().double() @ W_dec_FN.double(), dtype)
    assert not xh_BN[0].any()
    assert not xh_BN[2].any()


@pytest.mark.parametrize(("width", "dtype"), [(1, F32), (7, F32), (777, F32), (777, BF16), (7, F64)])
def test_value_gradients_are_dot_products(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    codes = sparse_codes(9, 41, active=0.3)
    W_dec_FN, grad_BN = random(41, width, seed=1, dtype=dtype), random(9, width, seed=2, dtype=dtype)
    gradients_P = kernels.value_gradients(codes, grad_BN, W_dec_FN)
    assert gradients_P.dtype == (F64 if dtype == F64 else F32)
    dense_BF = grad_BN.double() @ W_dec_FN.double().T
    assert_close(gradients_P, dense_BF[codes.rows_P(), codes.latents_P], dtype)


@pytest.mark.parametrize(("width", "dtype"), [(1, F32), (7, F32), (777, F32), (777, BF16), (7, F64)])
def test_weight_gradients_are_the_dense_product(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    codes = sparse_codes(37, 11, active=0.3)
    order = latent_order(codes)
    assert int(order.latent_offsets.diff().max()) > LINES_PER_LATENT_STEP
    rows_BN = random(37, width, seed=1, dtype=dtype)
    out_FN = torch.full((11, width), torch.nan, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    kernels.weight_gradients(order, codes.values_P[order.order_P].to(dtype), rows_BN, out_FN)
    expected_FN = codes.to_dense().to(dtype).double().T @ rows_BN.double()
    # Inputs are exact in their dtype and sums are float32, so that bfloat16 inputs lose nothing either.
    assert_close(out_FN, expected_FN, F64 if dtype == F64 else F32)
    assert not out_FN[0].any()
    assert not out_FN[-1].any()


def test_weight_gradients_read_stacked_tables(kernels: Kernels) -> None:
    codes = sparse_codes(5, 7, active=0.5)
    order = latent_order(codes, codes.rows_P() + 5)
    rows_BN = random(10, 6, seed=1)
    rows_BN[:5] = torch.nan
    out_FN = torch.empty(7, 6, device=DEVICE)
    kernels.weight_gradients(order, codes.values_P[order.order_P], rows_BN, out_FN)
    assert_close(out_FN, codes.to_dense().T.double() @ rows_BN[5:].double(), torch.float32)


def test_latent_sums(kernels: Kernels) -> None:
    codes = sparse_codes(300, 5, active=0.5)
    order = latent_order(codes)
    assert int(order.latent_offsets.diff().max()) > PAIRS_PER_SUM
    sums_F = kernels.latent_sums(order, codes.values_P[order.order_P])
    assert_close(sums_F, codes.to_dense().double().sum(0), torch.float32)


@pytest.mark.parametrize(
    ("preact_dtype", "floor", "num_latents"),
    [(F32, 0.0, 70), (F32, 0.7, 70), (F32, 1e9, 70), (BF16, 0.7, 4097), (F64, 0.0, 4097), (F32, 0.7, 1)],
)
def test_collect_finds_exactly_the_scores_at_the_floor(
    kernels: Kernels, preact_dtype: torch.dtype, floor: float, num_latents: int
) -> None:
    preact_BF = random(5, num_latents, seed=0, dtype=preact_dtype)
    preact_BF[1] = -1
    preact_BF[2, 0] = torch.nan
    weight_F = random(num_latents, seed=1).abs()
    weight_F[num_latents // 2] = 0
    code_BF = preact_BF.float().nan_to_num(-1).relu()
    if floor == 0.7:
        floor = float((code_BF * weight_F)[3].max())  # a score exactly at the floor belongs to it
    expected_BF = code_BF * ((code_BF * weight_F >= floor) & (weight_F > 0))
    codes = kernels.collect(preact_BF, weight_F, floor)
    expected = SparseCodes.from_dense(expected_BF)
    assert codes.num_latents == num_latents
    for came, right in zip(codes[:3], expected[:3], strict=True):
        assert came.dtype == right.dtype
        assert torch.equal(came, right)


def test_collect_compares_in_float64_when_asked(kernels: Kernels) -> None:
    """A float32 floor would lose the pair: it lies between 1 and the next float32."""
    preact_BF = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=DEVICE)
    codes = kernels.collect(preact_BF, torch.ones(2, dtype=torch.float64, device=DEVICE), 1.0 + 1e-12)
    assert codes.latents_P.tolist() == [1]
    assert codes.values_P.dtype == torch.float64


def test_nothing_active_and_no_rows(kernels: Kernels) -> None:
    W_dec_FN = random(4, 6, seed=0)
    for num_rows in (0, 3):
        codes = kernels.collect(torch.full((num_rows, 4), -1.0, device=DEVICE), torch.ones(4, device=DEVICE), 0.0)
        assert codes.num_pairs == 0
        assert codes.row_offsets.tolist() == [0] * (num_rows + 1)
        assert not kernels.decode(codes, W_dec_FN).any()
        assert kernels.value_gradients(codes, random(num_rows, 6, seed=1), W_dec_FN).shape == (0,)
        out_FN = torch.full((4, 6), torch.nan, device=DEVICE)
        kernels.weight_gradients(latent_order(codes), codes.values_P, random(num_rows, 6, seed=1), out_FN)
        assert not out_FN.any()
        assert not kernels.latent_sums(latent_order(codes), codes.values_P).any()


def test_equal_to_the_reference_backend(kernels: Kernels) -> None:
    reference = choose_kernels(DEVICE, "reference")
    codes = sparse_codes(16, 60, active=0.2)
    order = latent_order(codes)
    W_dec_FN, grad_BN = random(60, 50, seed=1), random(16, 50, seed=2)
    assert_close(kernels.decode(codes, W_dec_FN), reference.decode(codes, W_dec_FN), torch.float32)
    assert_close(
        kernels.value_gradients(codes, grad_BN, W_dec_FN),
        reference.value_gradients(codes, grad_BN, W_dec_FN),
        torch.float32,
    )
    came_FN, expected_FN = torch.empty(60, 50, device=DEVICE), torch.empty(60, 50, device=DEVICE)
    for backend, out_FN in ((kernels, came_FN), (reference, expected_FN)):
        backend.weight_gradients(order, codes.values_P[order.order_P], grad_BN, out_FN)
    assert_close(came_FN, expected_FN, torch.float32)


def test_equal_inputs_give_equal_bits(kernels: Kernels) -> None:
    codes = sparse_codes(64, 30, active=0.5)
    order = latent_order(codes)
    rows_BN = random(64, 40, seed=1)
    first_FN, second_FN = torch.empty(30, 40, device=DEVICE), torch.empty(30, 40, device=DEVICE)
    for out_FN in (first_FN, second_FN):
        kernels.weight_gradients(order, codes.values_P[order.order_P], rows_BN, out_FN)
    assert torch.equal(first_FN, second_FN)


def test_strided_tables_are_refused(kernels: Kernels) -> None:
    codes = sparse_codes(4, 6, active=0.5)
    with pytest.raises(ValueError, match=r"expected contiguous tensors .* got shape \[6, 3\]"):
        kernels.decode(codes, random(3, 6, seed=0).T)


def test_chosen_by_name_and_picklable() -> None:
    kernels = pickle.loads(pickle.dumps(choose_kernels(DEVICE, "triton")))
    assert kernels.name == "triton"
    codes = sparse_codes(4, 5, active=0.5)
    assert kernels.decode(codes, random(5, 3, seed=0)).shape == (4, 3)


COMPILE = """
import sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.numerics.kernels import triton_programs as programs

def build(name, arguments, constants):
    program = getattr(programs, name)
    signature = {arg: arguments.get(arg, "constexpr") for arg in program.arg_names}
    aligned = [i for i, arg in enumerate(program.arg_names) if signature[arg] not in ("constexpr", "i32")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attrs)
    assert compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]

for arch, stored, sums, ACC in ((90, "bf16", "fp32", tl.float32), (80, "fp32", "fp32", tl.float32)):
    table, scale, index = "*" + stored, "*" + sums, "*i64"
    shape = {"BLOCK_P": 16, "BLOCK_N": 64, "ACC": ACC}
    lines = {"out_SN": table, "table_LN": table, "scale_P": scale, "line_P": index, "offsets_S": index, "N": "i32"}
    build("sum_lines", lines, shape)
    dots = {"out_CP": scale, "left_BN": table, "right_FN": table, "row_P": index, "latent_P": index}
    build("dot_lines", {**dots, "num_pairs": "i32", "N": "i32"}, {"SPAN": 128, **shape})
    build("sum_segments", {"out_S": scale, "scale_P": scale, "offsets_S": index}, {"BLOCK_P": 128, "ACC": ACC})
    scores = {"preact_BF": table, "weight_F": scale, "floor_1": scale, "F": "i32", "C": "i32"}
    build("count_reaching", {"count_BC": "*i32", **scores}, {"BLOCK_F": 4096})
    one_cell = {arg: kind for arg, kind in scores.items() if arg != "C"}  # triton makes an argument of 1 a constant
    build("count_reaching", {"count_BC": "*i32", **one_cell}, {"BLOCK_F": 64, "C": 1})
    build("write_reaching", {"value_P": scale, "latent_P": index, "end_BC": index, **scores}, {"BLOCK_F": 4096})
"""


def test_programs_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses; compiling needs no device."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code_weight", ["crosscoder", "decoupled"])
def test_training_is_the_same_as_with_the_reference(code_weight: str) -> None:
    spec = CrosscoderSpec(
        num_models=2,
        activation_dim=9,
        num_latents=40,
        num_steps=2,
        sparsity=BatchTopK(k=4, dead_after_rows=12),
        code_weight=code_weight,
        lr_warmup_steps=0,
        kernels="triton",
        init_norm=1.0,
        clip_norm=1.0,
    )
    trainers = [
        CrosscoderTrainer(spec, device=DEVICE),
        CrosscoderTrainer(dataclasses.replace(spec, kernels="reference"), device=DEVICE),
    ]
    for trainer in trainers:
        for step in range(spec.num_steps):
            trainer.step(random(12, 2, 9, seed=step))
    ours, theirs = (trainer.state_dict() for trainer in trainers)
    assert trainers[0].metrics()["loss_auxiliary"] > 0
    for name in ("weights.W_enc_FN", "weights.W_dec_FN", "weights.b_enc_F", "weights.b_dec_N", "threshold"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(ours["rows_since_fired_F"], theirs["rows_since_fired_F"])
