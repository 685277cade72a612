"""The GPU programs behind triton.py: what one block of threads does. Imported by it alone.

Every program reads lines of a table of width N in pieces of BLOCK_N neighbouring columns, so that loads are coalesced,
and several lines at once, so that enough loads are under way to hide memory's latency. Programs that work on the same
columns have neighbouring numbers and run at about the same time: the part of the table that they share stays in the
second-level cache. Sums run in a fixed order inside one program and nothing is added atomically: equal inputs give
equal bits. Arithmetic happens in the dtype ACC (float32, or float64 for float64 tables), whatever is stored.

Shapes: B rows, N = M * D flattened activation width, F latents, P active (row, latent) pairs.
"""

# mypy: disable-error-code="untyped-decorator"
# (triton has no types; the annotations that it reads itself are the constexpr ones)

from typing import Any

import triton
import triton.language as tl


@triton.jit
def sum_lines(
    out_SN: "Any",
    table_LN: "Any",
    scale_P: "Any",
    line_P: "Any",
    offsets_S: "Any",
    N: "Any",
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """out[s] = sum over pairs p in offsets[s] : offsets[s + 1] of scale[p] * table[line[p]]; 0 for empty segments.

    Grid (S, cdiv(N, BLOCK_N)). Decoding: segments are rows, lines are latents. Weight gradients: the reverse.
    """
    segment = tl.program_id(0).to(tl.int64)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < N
    start = tl.load(offsets_S + segment).to(tl.int32)
    stop = tl.load(offsets_S + segment + 1).to(tl.int32)
    sums_PN = tl.zeros([BLOCK_P, BLOCK_N], dtype=ACC)
    for first in range(start, stop, BLOCK_P):
        pairs_P = first + tl.arange(0, BLOCK_P)
        active_P = pairs_P < stop
        lines_P = tl.load(line_P + pairs_P, mask=active_P, other=0).to(tl.int64)
        scales_P = tl.load(scale_P + pairs_P, mask=active_P, other=0).to(ACC)
        tile_PN = tl.load(
            table_LN + lines_P[:, None] * N + columns_N[None, :], mask=active_P[:, None] & inside_N[None, :], other=0
        )
        sums_PN += tile_PN.to(ACC) * scales_P[:, None]
    total_N = tl.sum(sums_PN, axis=0)
    tl.store(out_SN + segment * N + columns_N, total_N.to(out_SN.dtype.element_ty), mask=inside_N)


@triton.jit
def dot_lines(
    out_CP: "Any",
    left_BN: "Any",
    right_FN: "Any",
    row_P: "Any",
    latent_P: "Any",
    num_pairs: "Any",
    N: "Any",
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """out[c, p] = <left[row[p]], right[latent[p]]> over the columns c * SPAN : (c + 1) * SPAN.

    Grid (cdiv(P, BLOCK_P), C = cdiv(N, SPAN)); the caller adds the C parts. Pairs of a row are neighbours, so its line
    comes from memory once.
    """
    pairs_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    part = tl.program_id(1)
    active_P = pairs_P < num_pairs
    left_P = tl.load(row_P + pairs_P, mask=active_P, other=0).to(tl.int64) * N
    right_P = tl.load(latent_P + pairs_P, mask=active_P, other=0).to(tl.int64) * N
    sums_PN = tl.zeros([BLOCK_P, BLOCK_N], dtype=ACC)
    for first in range(0, SPAN, BLOCK_N):
        columns_N = part * SPAN + first + tl.arange(0, BLOCK_N)
        inside_PN = active_P[:, None] & (columns_N < N)[None, :]
        left_PN = tl.load(left_BN + left_P[:, None] + columns_N[None, :], mask=inside_PN, other=0)
        right_PN = tl.load(right_FN + right_P[:, None] + columns_N[None, :], mask=inside_PN, other=0)
        sums_PN += left_PN.to(ACC) * right_PN.to(ACC)
    total_P = tl.sum(sums_PN, axis=1)
    tl.store(out_CP + part.to(tl.int64) * num_pairs + pairs_P, total_P, mask=active_P)


@triton.jit
def sum_segments(
    out_S: "Any",
    scale_P: "Any",
    offsets_S: "Any",
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """out[s] = sum of scale[offsets[s] : offsets[s + 1]]. Grid (S,)."""
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_S + segment).to(tl.int32)
    stop = tl.load(offsets_S + segment + 1).to(tl.int32)
    sums_P = tl.zeros([BLOCK_P], dtype=ACC)
    for first in range(start, stop, BLOCK_P):
        pairs_P = first + tl.arange(0, BLOCK_P)
        sums_P += tl.load(scale_P + pairs_P, mask=pairs_P < stop, other=0).to(ACC)
    tl.store(out_S + segment, tl.sum(sums_P, axis=0).to(out_S.dtype.element_ty))


@triton.jit
def _reaches(
    preact_F: "Any",
    weight_F: "Any",
    floor: "Any",
) -> "Any":
    """Fused ReLU, code weight and comparison, in the weights' dtype; NaN never reaches."""
    code_F = preact_F.to(weight_F.dtype)
    return (code_F > 0) & (weight_F > 0) & (code_F * weight_F >= floor)


@triton.jit
def count_reaching(
    count_BC: "Any",
    preact_BF: "Any",
    weight_F: "Any",
    floor_1: "Any",
    F: "Any",
    C: "Any",
    BLOCK_F: tl.constexpr,
) -> None:
    """count[i, c] = scores of row i in piece c of the latents that reach the floor. Grid (B * C,)."""
    cell = tl.program_id(0).to(tl.int64)
    latents_F = (cell % C) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = latents_F < F
    preact_F = tl.load(preact_BF + (cell // C) * F + latents_F, mask=inside_F, other=0)
    weights_F = tl.load(weight_F + latents_F, mask=inside_F, other=0)
    reached_F = _reaches(preact_F, weights_F, tl.load(floor_1))
    tl.store(count_BC + cell, tl.sum(reached_F.to(tl.int32), axis=0))


@triton.jit
def write_reaching(
    value_P: "Any",
    latent_P: "Any",
    end_BC: "Any",
    preact_BF: "Any",
    weight_F: "Any",
    floor_1: "Any",
    F: "Any",
    C: "Any",
    BLOCK_F: tl.constexpr,
) -> None:
    """Writes the pairs that count_reaching counted, in order, up to end[i, c]. Grid (B * C,)."""
    cell = tl.program_id(0).to(tl.int64)
    latents_F = (cell % C) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = latents_F < F
    preact_F = tl.load(preact_BF + (cell // C) * F + latents_F, mask=inside_F, other=0)
    weights_F = tl.load(weight_F + latents_F, mask=inside_F, other=0)
    reached_F = _reaches(preact_F, weights_F, tl.load(floor_1))
    rank_F = tl.cumsum(reached_F.to(tl.int32), axis=0)
    start = tl.load(end_BC + cell) - tl.sum(reached_F.to(tl.int32), axis=0)
    places_F = start + rank_F - 1
    tl.store(value_P + places_F, preact_F.to(value_P.dtype.element_ty), mask=reached_F)
    tl.store(latent_P + places_F, latents_F, mask=reached_F)
