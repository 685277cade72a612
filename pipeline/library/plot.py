"""Charts of the report for a notebook: the same figures, in colours for a white page.

Each function takes a table and returns an Altair chart, which notebooks draw by themselves; `.save("x.png")` writes it.
"""

import json

import altair as alt
import pandas as pd

from pipeline.config.analyses import LatentScalingSection
from pipeline.errors import InputError
from pipeline.report.charts import causality as causality_charts
from pipeline.report.charts.ownership import delta_norm_chart
from pipeline.report.charts.scaling import nu_chart
from pipeline.report.charts.style import Chart, spec_of
from pipeline.report.charts.training import curve_chart, thinned
from pipeline.report.palette import THEME, with_light_colours
from pipeline.report.summary import chat_only_rows
from pipeline.schema import Verdict

_NAME = "crosscoder"
"""Column of the crosscoder's name; a table of one crosscoder has none."""


def nu(table: pd.DataFrame) -> alt.LayerChart:
    """nu_r and nu_eps of the chat-only latents of a latent table, by verdict; the shaded corner is chat-specific."""
    rows = chat_only_rows(_with(table, "verdict", "nu_eps", "nu_r"))
    drawn = rows[rows["nu_eps"].notna() & rows["nu_r"].notna()].assign(card="")
    _require(drawn, "chat-only latents with both ratios")
    settings = LatentScalingSection(**table.attrs.get("settings", {}))
    return _shown(nu_chart(drawn, settings.nu_eps_threshold, settings.nu_r_threshold), "nu_r and nu_eps by verdict")


def delta_norm(table: pd.DataFrame) -> alt.LayerChart:
    """Histogram of Delta_norm over the live latents (0 = base-only, 1 = chat-only); one outline per crosscoder.

    Tables of several crosscoders, put together by pd.concat, need a column `crosscoder` with their names.
    """
    table = _with(table, "verdict", "delta_norm")
    alive = table[(table["verdict"] != Verdict.DEAD) & table["delta_norm"].notna()]
    _require(alive, "live latents")
    return _shown(delta_norm_chart(alive[[_NAME, "delta_norm"]], _names(alive)), "latents by Delta_norm")


def kl(causality: pd.DataFrame, *, halves: bool = False) -> alt.LayerChart:
    """KL to the chat model after each intervention, with intervals, from a run's `causality` table.

    halves: the halves of the chat-only latents in place of the whole edits.
    """
    drawn = causality_charts.intervention_rows(_with(causality, "intervention", "kl"), halves=halves)
    _require(drawn, "interventions")
    names = [name for name in _names(drawn) if name != causality_charts.NO_CROSSCODER]
    return _shown(causality_charts.kl_chart(drawn, names), "KL to the chat model by intervention")


def curve(training: pd.DataFrame, quantity: str = "loss") -> alt.LayerChart:
    """A quantity of a training curve (`crosscoder.curve`, or a run's) by step: loss, l0, fve, dead_frac ..."""
    table = _with(training, "step", quantity)
    parts = [
        thinned(rows[[_NAME, "step", quantity]].rename(columns={quantity: "value"}))
        for _, rows in table.groupby(_NAME, sort=False)
    ]
    drawn = pd.concat(parts, ignore_index=True).assign(model="")
    _require(drawn, f"finite values of {quantity}")
    return _shown(curve_chart(drawn, quantity, _names(drawn)), f"{quantity} by training step")


def _with(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"expected a table with {', '.join(columns)}, {', '.join(missing)} is missing; plot another table"
        )
    return table if _NAME in table.columns else table.assign(**{_NAME: _NAME})


def _names(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table[_NAME]))


def _require(table: pd.DataFrame, what: str) -> None:
    if table.empty:
        raise InputError(f"expected {what} to draw, got none in this table")


def _shown(chart: Chart, description: str) -> alt.LayerChart:
    """The chart with the report's look, its colours written out."""
    spec = {**spec_of(chart, description), "config": {**THEME, "background": "var(--page)", "padding": 14}}
    shown: alt.LayerChart = alt.LayerChart.from_dict(json.loads(with_light_colours(json.dumps(spec))), validate=False)
    return shown
