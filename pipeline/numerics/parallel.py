"""Who computes what: a mesh of `data` ranks (different rows) times `latent` ranks (different latents).

World rank = data_rank * latent_size + latent_rank, so the latent ranks of one data rank sit next to each other: they
exchange B x N partial reconstructions per step, the data ranks exchange gradients. Every collective that training uses
goes through this class; with one rank each costs nothing. It does not start processes or choose devices.

A latent axis of R ranks exchanges B x N numbers per step instead of all gradients, and reads the same rows R times.

Shapes: B rows, F latents of the whole dictionary.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Axis = Literal["world", "data", "latent"]


class Mesh(NamedTuple):
    """This process's place among the training ranks; the default is a single process."""

    data_size: int = 1
    """Ranks that read different rows."""
    data_rank: int = 0
    latent_size: int = 1
    """Ranks that hold different latents and read the same rows."""
    latent_rank: int = 0
    world_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    """Ranks with the same latents."""
    latent_group: dist.ProcessGroup | None = None
    """Ranks with the same rows."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.data_size * self.latent_size

    def size(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        return {"world": self.world_size, "data": self.data_size, "latent": self.latent_size}[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Process group of an axis; None means all processes."""
        return {"world": self.world_group, "data": self.data_group, "latent": self.latent_group}[axis]

    def sum_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """Sums a tensor over an axis in place and returns it."""
        return self._reduce(tensor, axis, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """Elementwise maximum over an axis, in place, returned."""
        return self._reduce(tensor, axis, dist.ReduceOp.MAX)

    def start_sum(self, tensor: Tensor, axis: Axis) -> "Pending":
        """Begins a sum in place; `Pending.wait` before reading the tensor."""
        if self.size(axis) == 1:
            return Pending(None)
        return Pending(dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group(axis), async_op=True))

    def gather(self, tensor: Tensor, axis: Axis) -> Tensor:
        """[size, ...]: the tensors of all ranks of an axis in rank order; shapes must agree."""
        if self.size(axis) == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size(axis))]
        dist.all_gather(parts, tensor.contiguous(), group=self.group(axis))
        return torch.stack(parts)

    def latent_slice(self, num_latents: int) -> slice:
        """The latents of this rank out of num_latents; raises ValueError if they do not divide evenly."""
        if num_latents % self.latent_size:
            raise ValueError(
                f"expected num_latents divisible by the number of latent ranks, got {num_latents} latents for "
                f"{self.latent_size} ranks: change resources.training.latent or num_latents"
            )
        size = num_latents // self.latent_size
        return slice(self.latent_rank * size, (self.latent_rank + 1) * size)

    def _reduce(self, tensor: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size(axis) > 1:
            dist.all_reduce(tensor, op, group=self.group(axis))
        return tensor


class Pending(NamedTuple):
    """A collective under way."""

    work: dist.Work | None

    def wait(self) -> None:
        """Returns when the tensor holds the result (on CUDA: when the stream is ordered behind it)."""
        if self.work is not None:
            self.work.wait()


def check_equal_rows(num_rows: int, mesh: Mesh, device: torch.device) -> None:
    """Raises ValueError on every rank unless all ranks hold the same number of rows, at least one.

    Means and the selection's budget count rows as ranks times rows, and collectives of unequal shapes would end the
    process. Collective over the world; waits for the device if there are several ranks.
    """
    counts = mesh.gather(torch.tensor(num_rows, device=device), "world").tolist() if mesh.world_size > 1 else [num_rows]
    if min(counts) == 0:
        raise ValueError(f"expected at least one row per rank, got {counts} in rank order: drop empty batches")
    if min(counts) != max(counts):
        raise ValueError(
            f"expected as many rows on every rank, got {counts} in rank order: make the global batch divisible by the "
            f"{mesh.data_size} data ranks, or drop the last incomplete one"
        )


def make_mesh(*, data: int = 1, latent: int = 1) -> Mesh:
    """The mesh over the initialised default process group; collective, every process calls it with the same numbers.

    With data = latent = 1 no process group is needed. Raises ValueError if data * latent is not the world size.
    """
    if data < 1 or latent < 1:
        raise ValueError(f"expected data >= 1 and latent >= 1 ranks, got data={data} and latent={latent}")
    if data == latent == 1 and not dist.is_initialized():
        return Mesh()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if data * latent != world_size:
        raise ValueError(
            f"expected data * latent = number of processes, got {data} * {latent} for {world_size} processes: "
            f"change resources.training"
        )
    data_rank, latent_rank = divmod(dist.get_rank(), latent)
    # new_group is collective: every process creates every group, in the same order.
    latent_groups = [dist.new_group([row * latent + column for column in range(latent)]) for row in range(data)]
    data_groups = [dist.new_group([row * latent + column for row in range(data)]) for column in range(latent)]
    return Mesh(data, data_rank, latent, latent_rank, None, data_groups[latent_rank], latent_groups[data_rank])
