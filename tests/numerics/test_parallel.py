"""One process against meshes of two and four real gloo processes: selection, training, resume, bad rows.

All checks of the four processes run in one spawn; each rank writes what it saw, the tests compare with one process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.numerics import moments
from pipeline.numerics.codes import SparseCodes
from pipeline.numerics.parallel import Mesh, make_mesh
from pipeline.numerics.selection import select_batch, select_batch_per_model, select_rows, top_of_rows
from pipeline.numerics.sparsities.batch_topk import BatchTopK
from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer
from tests.numerics.small import changed

M, D, F, B = 2, 12, 48, 32
NUM_STEPS = 50
SPEC = CrosscoderSpec(
    num_models=M,
    activation_dim=D,
    num_latents=F,
    num_steps=NUM_STEPS,
    sparsity=BatchTopK(
        k=4, k_start=8, k_anneal_steps=20, threshold_start_step=10, threshold_decay=0.9, dead_after_rows=10 * B
    ),
    lr=3e-3,
    lr_warmup_steps=10,
    init_norm=1.0,
    clip_norm=1.0,
)
SPECS = {
    "batch_topk": SPEC,
    "decoupled": changed(SPEC, code_weight="decoupled", dtype="float64"),
    "mixed mse": changed(SPEC, code_weight="mixed", reconstruction="mse", dtype="float64", block_rows=3),
    "topk": changed(SPEC, kind="topk", dtype="float64", dead_after_rows=2 * B),
    "l1": changed(SPEC, kind="l1", mu=0.05, code_weight="sae", dtype="float64"),
    "l1 target": changed(SPEC, kind="l1", mu=0.05, target_l0=6.0, dtype="float64"),
    "difference": changed(SPEC, inputs="difference", dtype="float64", dead_after_rows=2 * B),
    "dedicated": changed(SPEC, dedicated_frac=0.3, dtype="float64", dead_after_rows=2 * B),
    "jumprelu": changed(SPEC, kind="jumprelu", mu=0.02, target_l0=6.0, dtype="float64"),
    "matryoshka": changed(SPEC, kind="matryoshka", num_groups=3, dtype="float64", dead_after_rows=2 * B),
    "shared_l1": changed(SPEC, kind="shared_l1", mu=0.05, shared_frac=0.6, dtype="float64"),
    "delta": changed(SPEC, kind="delta", shared_frac=0.6, dtype="float64", dead_after_rows=2 * B),
}
LAYOUTS = {"data 4": (4, 1), "latent 4": (1, 4), "data 2 latent 2": (2, 2), "data 2": (2, 1), "latent 2": (1, 2)}


def rows(step: int) -> Tensor:
    """A global batch from a planted dictionary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    concepts = torch.randn(20, M * D, generator=torch.Generator().manual_seed(999))
    codes = torch.rand(B, 20, generator=generator) * (torch.rand(B, 20, generator=generator) < 0.2)
    return (codes @ concepts + 0.1 * torch.randn(B, M * D, generator=generator)).view(B, M, D)


def share(x: Tensor, mesh: Mesh) -> Tensor:
    return x.chunk(mesh.data_size)[mesh.data_rank]


def train(name: str, mesh: Mesh) -> dict[str, Any]:
    """Curves and the final state of a run."""
    spec = SPECS[name]
    trainer = CrosscoderTrainer(spec, mesh=mesh)
    trainer.initialise(share(rows(0), mesh))
    curves = []
    for step in range(NUM_STEPS if name == "batch_topk" else 15):
        trainer.step(share(rows(step), mesh))
        if step % 5 == 4:
            curves.append(trainer.metrics())
    codes = trainer.crosscoder().encode(rows(77).to(getattr(torch, spec.dtype)))
    return {"curves": curves, "state": trainer.state_dict(), "codes": codes._asdict()}


def tied_scores() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    score_BF = torch.randn(8, 16, generator=generator)
    return torch.where(torch.rand(8, 16, generator=generator) < 0.7, (score_BF * 2).round() / 2, score_BF)


def selections(mesh: Mesh) -> dict[str, Tensor]:
    """Masks [rows, latents] of what this rank keeps of its part of a score matrix full of ties."""
    score_BF = share(tied_scores(), mesh)[:, mesh.latent_slice(16)]
    codes = SparseCodes.from_dense(score_BF)
    kept = {}
    for num_keep in (1, 9, 20, 33, 1000):
        kept[f"batch {num_keep}"] = select_batch(codes, codes.values_P, num_keep=num_keep, mesh=mesh)
    for k in (1, 3, 5):
        kept[f"rows {k}"] = select_rows(codes, codes.values_P, k=k, mesh=mesh)
    masks = {name: selection.codes.to_dense() > 0 for name, selection in kept.items()}
    masks |= {f"smallest {name}": selection.smallest for name, selection in kept.items()}
    score_PM = torch.stack([codes.values_P, (codes.values_P * 4).round()], 1)
    per_model = select_batch_per_model(codes, score_PM, num_keep=15, mesh=mesh)
    masks["per model"] = per_model.codes.to_dense() > 0
    untied_BF = share(torch.randn(8, 16, generator=torch.Generator().manual_seed(4)), mesh)[:, mesh.latent_slice(16)]
    scores_BK, latents_BK = top_of_rows(untied_BF, 3, mesh)
    top = torch.zeros_like(untied_BF)
    masks["top"] = top.scatter_add_(1, latents_BK, scores_BK) > 0
    return masks


def resume(mesh: Mesh, exchange: Path) -> None:
    """Interrupted and continued equals uninterrupted bit for bit, with the state through a file."""
    straight, first = CrosscoderTrainer(SPEC, mesh=mesh), CrosscoderTrainer(SPEC, mesh=mesh)
    for step in range(8):
        straight.step(share(rows(step), mesh))
        if step < 6:
            first.step(share(rows(step), mesh))
    state = first.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, exchange)
    dist.barrier()
    resumed = CrosscoderTrainer(SPEC, mesh=mesh)
    resumed.load_state_dict(torch.load(exchange, weights_only=True))
    for step in range(6, 8):
        resumed.step(share(rows(step), mesh))
    for name, value in straight.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()[name])), name
    dist.barrier()


def bad_rows(mesh: Mesh) -> str:
    """What every rank is told when the last rank's rows hold a NaN."""
    trainer = CrosscoderTrainer(SPEC, mesh=mesh)
    x_BMD = share(rows(0), mesh).clone()
    if mesh.data_rank == mesh.data_size - 1:
        x_BMD[1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError) as caught:
        trainer.step(x_BMD)
    return str(caught.value)


def uneven_rows(mesh: Mesh) -> list[str]:
    """What every rank is told when the first data rank lacks a row, and when it has none."""
    told = []
    for num_rows in (B // mesh.data_size - 1, 0):
        trainer, x_BMD = CrosscoderTrainer(SPEC, mesh=mesh), share(rows(0), mesh)
        with pytest.raises(ValueError) as caught:
            trainer.step(x_BMD[:num_rows] if mesh.data_rank == 0 else x_BMD)
        told.append(str(caught.value))
    return told


def build(layout: str) -> Mesh:
    """The mesh of a layout; layouts of two ranks run twice, on ranks 0 and 1 and on ranks 2 and 3."""
    data, latent = LAYOUTS[layout]
    if data * latent == 4:
        return make_mesh(data=data, latent=latent)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, rank = groups[dist.get_rank() // 2], dist.get_rank() % 2
    return Mesh(data, rank if data == 2 else 0, latent, rank if latent == 2 else 0, group, group, group)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    with pytest.raises(ValueError, match="3 \\* 1 for 4 processes"):
        make_mesh(data=3)
    seen: dict[str, Any] = {}
    for layout in LAYOUTS:
        mesh = build(layout)
        names = SPECS if layout == "data 2 latent 2" else ("batch_topk",)
        seen[layout] = {"place": (mesh.data_rank, mesh.latent_rank), "selections": selections(mesh)}
        seen[layout] |= {"runs": {name: train(name, mesh) for name in names}}
        seen[layout]["median"] = moments.geometric_median(share(rows(1), mesh), mesh)
        seen[layout]["moments"] = moments.all_reduce(moments.moments_of(share(rows(1), mesh)), mesh)._asdict()
        resume(mesh, Path(folder) / f"state of {layout}")
        seen[layout]["bad"] = bad_rows(mesh)
        seen[layout]["uneven"] = uneven_rows(mesh) if mesh.data_size > 1 else []
    torch.save(seen, f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=4)
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Any]]:
    cache: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in cache:
            cache[name] = train(name, Mesh())
        return cache[name]

    return run


each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
def test_fault_10_the_selection_is_the_same_element_for_element(seen: list[dict[str, Any]], layout: str) -> None:
    data, latent = LAYOUTS[layout]
    expected = selections(Mesh())
    for name, whole in expected.items():
        parts = {tuple(rank[layout]["place"]): rank[layout]["selections"][name] for rank in seen}
        if name.startswith("smallest"):
            assert all(float(part) == float(whole) for part in parts.values()), name
            continue
        lines = [torch.cat([parts[row, column] for column in range(latent)], dim=1) for row in range(data)]
        assert torch.equal(torch.cat(lines), whole), name


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, "batch_topk") for layout in LAYOUTS]
    + [("data 2 latent 2", name) for name in SPECS if name != "batch_topk"],
)
def test_training_does_not_depend_on_the_mesh(
    seen: list[dict[str, Any]], alone: Callable[[str], dict[str, Any]], layout: str, name: str
) -> None:
    expected = alone(name)
    tolerance = 1e-5 if SPECS[name].dtype == "float32" else 1e-7
    for rank in seen:
        run = rank[layout]["runs"][name]
        for ours, theirs in zip(run["curves"], expected["curves"], strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance, nan_ok=True)
        for key, value in expected["state"].items():
            ours = torch.as_tensor(run["state"][key])
            scale = max(1e-30, float(torch.as_tensor(value).abs().max()))
            torch.testing.assert_close(ours / scale, torch.as_tensor(value) / scale, rtol=tolerance, atol=tolerance)
        assert torch.equal(run["codes"]["latents_P"], expected["codes"]["latents_P"])
        assert torch.equal(run["codes"]["row_offsets"], expected["codes"]["row_offsets"])
    assert any(curve["loss_auxiliary"] > 0 for curve in expected["curves"]) or SPECS[name].sparsity.aux_weight == 0


@each_layout
def test_medians_and_moments_are_of_all_rows(seen: list[dict[str, Any]], layout: str) -> None:
    median = moments.geometric_median(rows(1), Mesh())
    whole = moments.moments_of(rows(1))
    for rank in seen:
        torch.testing.assert_close(rank[layout]["median"], median, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank[layout]["moments"]["mean_MD"], whole.mean_MD, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank[layout]["moments"]["square_M"], whole.square_M, rtol=1e-6, atol=1e-6)


@each_layout
def test_bad_rows_stop_every_rank_and_the_owner_names_them(seen: list[dict[str, Any]], layout: str) -> None:
    data = LAYOUTS[layout][0]
    for rank in seen:
        assert "at step 0" in rank[layout]["bad"]
        assert ("row 1 of this rank's batch" in rank[layout]["bad"]) == (rank[layout]["place"][0] == data - 1)


def test_unequal_rows_are_refused_on_every_rank_with_all_counts(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert [rank[layout]["uneven"] for layout in ("latent 4", "latent 2")] == [[], []]
        for layout, fewer, empty in (
            ("data 4", [7, 8, 8, 8], [0, 8, 8, 8]),
            ("data 2 latent 2", [15, 15, 16, 16], [0, 0, 16, 16]),
            ("data 2", [15, 16], [0, 16]),
        ):
            assert f"as many rows on every rank, got {fewer} in rank order" in rank[layout]["uneven"][0]
            assert f"at least one row per rank, got {empty} in rank order" in rank[layout]["uneven"][1]


def test_latents_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="50 latents for 4 ranks"):
        Mesh(latent_size=4).latent_slice(50)
    with pytest.raises(ValueError, match="2 \\* 1 for 1 processes"):
        make_mesh(data=2)
