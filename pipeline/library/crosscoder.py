"""The crosscoder of the library: that of the pipeline, with a device, an origin and what a fit leaves behind.

Shapes: B rows, M models, D width, F latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError
from pipeline.library.origin import Origin
from pipeline.numerics import crosscoder as numerics

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.checkpoints.layouts import PublishedCrosscoder
    from pipeline.library.dashboard import Dashboard
    from pipeline.library.rows import Rows


class Crosscoder(numerics.Crosscoder):
    """Encoder and decoder over the models of a pair; `encode`, `decode` and calls take and return raw activations.

    encode(x_BMD) gives sparse codes (`values_P`, `latents_P`, `row_offsets`, `to_dense()`), decode(codes) rows x_BMD.
    Both are differentiable: autograd follows where the rows, the codes, or (after `requires_grad_()`) the weights ask
    for gradients. Widths that do not fit raise ValueError.
    """

    origin: Origin | None = None
    """The pair and layer that it was fitted on, where that is known."""
    replicas: tuple["Crosscoder", ...] = ()
    """The same fit from further seeds (`fit(..., seeds=3)`): what a finding must survive."""
    curve: "pd.DataFrame | None" = None
    """The training curve of a fit: step, loss, l0, fve_base, fve_chat and more, one row per logged step."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        activation_scale: Sequence[float] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Crosscoder":
        """A crosscoder from a folder, a file or a hub id, in any published layout.

        Args:
            source: folder, weights file or hub id `owner/name[/subfolder]`.
            revision: branch, tag or commit, for hub ids alone.
            subfolder: where the files are within a folder or a hub repository.
            activation_scale: one factor per model, for the layout that does not store what its activations were
                scaled by (`cfg.json` with `cc_weights.pt`); without it such a file loads with a warning.
            device: where the weights go.
            dtype: of the weights; the threshold stays in double.

        Raises InputError for what cannot be read.
        """
        loaded = super().from_pretrained(
            source, revision=revision, subfolder=subfolder, activation_scale=activation_scale
        )
        assert isinstance(loaded, cls)
        try:
            return loaded.to(device, dtype)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"expected a device of this machine, got {device!r}: {error}") from error

    @classmethod
    def from_checkpoint(cls, checkpoint: "PublishedCrosscoder") -> "Crosscoder":
        """The module of a checkpoint that was read; shares its weights' memory."""
        made = super().from_checkpoint(checkpoint)
        assert isinstance(made, cls)
        made.origin = Origin.from_json(checkpoint.settings.get("trainer"))
        return made

    @classmethod
    def of(cls, crosscoder: numerics.Crosscoder, origin: Origin | None) -> "Crosscoder":
        """The library's form of a crosscoder that the pipeline made; the same weights to the last bit."""
        made = cls.from_checkpoint(crosscoder.to_checkpoint()).to(crosscoder.W_dec_FMD.device)
        made.origin = origin
        return made

    def examples(
        self,
        rows: "Rows",
        latent: int | Sequence[int],
        *,
        num_contexts: int = 5,
        window_tokens: int = 16,
        tokenizer: Any = None,
    ) -> "pd.DataFrame":
        """The strongest contexts of a latent, or of several: each from another document, with f at every token.

        Args:
            rows: of this crosscoder's pair and layer.
            latent: index or indices, below num_latents.
            num_contexts: at most so many per latent; a latent that never fires has none.
            window_tokens: tokens before and after the strongest one.
            tokenizer: for rows that were loaded; rows of a pair in memory know theirs.

        Returns:
            One row per context, columns of schema.EXAMPLE_COLUMNS.
        """
        from pipeline.library.dashboard import find_examples

        latents = [latent] if isinstance(latent, int) else list(latent)
        sizes = {"num_contexts": num_contexts, "window_tokens": window_tokens}
        return find_examples(self, rows, latents, **sizes, tokenizer=tokenizer)

    def dashboard(
        self, latent: int, rows: "Rows", *, latents: "pd.DataFrame | None" = None, tokenizer: Any = None
    ) -> "Dashboard":
        """A page of one latent, which a notebook shows: verdict, numbers with intervals, examples.

        Args:
            latent: index below num_latents.
            rows: what the examples are taken from.
            latents: the latent table of `crossray.latents`; made from these rows if left out.
            tokenizer: as in `examples`.
        """
        from pipeline.analyses.neighbours import neighbour_table
        from pipeline.library.dashboard import Dashboard
        from pipeline.library.tables import latents as latent_table
        from pipeline.report.data import CrosscoderReport

        examples = self.examples(rows, latent, tokenizer=tokenizer)
        table = latent_table(self, rows) if latents is None else latents
        if len(table) != self.num_latents:
            raise InputError(f"latents: expected a table of {self.num_latents} latents, got one of {len(table)}")
        near = neighbour_table(self, [latent])
        report = CrosscoderReport(name="crosscoder", kind="", latents=table, examples=examples, neighbours=near)
        return Dashboard(report, latent)

    def to_checkpoint(self) -> "PublishedCrosscoder":
        """What goes into a file, the origin included."""
        checkpoint = super().to_checkpoint()
        if self.origin is None:
            return checkpoint
        settings: dict[str, Any] = {**checkpoint.settings, "trainer": self.origin.to_json()}
        return checkpoint._replace(settings=settings)
