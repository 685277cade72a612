"""`latents`: the latent table of a crosscoder on rows in memory, by the analyses of a run's own stage."""

from typing import Any

import pandas as pd

from pipeline.analyses.latent_tables import verdict_analyses, verdict_table
from pipeline.analyses.rows import RowAnalysis, analyse, encoded_batches
from pipeline.analyses.twins import Twins
from pipeline.analyses.units import judged_decoder
from pipeline.analyses.verdict import with_calls_withheld, with_twins
from pipeline.config.analyses import LatentScalingSection
from pipeline.config.run_file import validated
from pipeline.library.checks import require_fit
from pipeline.library.difference import Difference
from pipeline.library.origin import require_same_origin
from pipeline.library.rows import Rows
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import TABLE_METADATA


def latents(
    crosscoder: Crosscoder,
    rows: Rows,
    *,
    training_rows: Rows | None = None,
    difference: Difference | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """The latent table: who owns each latent, Latent Scaling with intervals, where it fires, its twin, the verdict.

    Args:
        crosscoder: of the rows' pair and layer.
        rows: what it is judged on; better not those that it was fitted on (`rows.split()`).
        training_rows: where the scale of each model's rows is taken from, for a crosscoder fitted without
            normalisation; the rows themselves if left out.
        difference: from `pair.difference(texts)`. Where it cannot tell the models apart, no latent is called new.
        settings: those of a run file's analyses.latent_scaling: rule, false_discovery_rate, nu_eps_threshold ...

    Returns:
        One row per latent, columns of schema.LATENT_COLUMNS and two per corpus; `control_token` holds token ids, since
        rows in memory bring no tokenizer. `attrs` holds the fidelity (FVE, L0)
        under "fidelity", the settings under "settings", and the model order.

    Raises InputError for rows of another width, layer or pair.
    """
    section = validated(LatentScalingSection, settings, "latents")
    about = {"num_models": rows.num_models, "activation_dim": rows.activation_dim}
    require_fit(crosscoder, **about, origin=rows.origin, owner="the rows")
    if difference is not None:
        require_same_origin(difference.origin, rows.origin, what="a difference", owner="the rows")
    rms_M = (rows if training_rows is None else training_rows).store().manifest.training_rms_M()
    analyses: dict[str, RowAnalysis] = dict(verdict_analyses(crosscoder, section, corpora=rows.corpora, rms_M=rms_M))
    decoder = judged_decoder(crosscoder, rms_M)
    analyses["twins"] = Twins(W_dec_FMD=decoder.W_dec_FMD)
    device = crosscoder.W_dec_FMD.device
    columns = {name: column.to(device) for name, column in rows.columns().items()}
    sums = analyse(analyses, encoded_batches(crosscoder, columns))
    tables: dict[str, Any] = {name: analysis.table(sums[name]) for name, analysis in analyses.items()}
    table = with_twins(verdict_table(decoder, tables, section), tables["twins"])
    if difference is not None and not difference.is_distinguishable:
        table = with_calls_withheld(table, difference.reason)
    table.attrs.update(TABLE_METADATA, fidelity=dict(tables["fidelity"]), settings=section.model_dump(mode="json"))
    return table
