"""The report's figures as files and as the static drawings that the page falls back on without JavaScript.

`charts/selection.py` decides which figures a run has; here they become PNG (for the tracker: its pane shows no SVG) and
SVG through vl-convert, which needs neither a network nor a browser. Altair and vl-convert take seconds to import, so
both are imported only where a report is rendered.
"""

import functools
import json
import re
import textwrap
from typing import TYPE_CHECKING, Any

from pipeline.report.data import ReportData
from pipeline.report.palette import THEME, with_light_colours

if TYPE_CHECKING:
    from pipeline.report.charts.selection import Figure

PNG_SCALE = 2
"""Pixels per drawing unit in files."""


def figure_list(data: ReportData) -> "list[Figure]":
    """Every figure that the data allow, in the page's order."""
    from pipeline.report.charts.selection import all_figures

    return all_figures(data)


def figures(data: ReportData) -> dict[str, bytes]:
    """File name -> PNG in light colours on white with its title and note, for artifact stores."""
    return {f"{figure.name}.png": png(figure) for figure in figure_list(data)}


def png(figure: "Figure") -> bytes:
    """The figure as a file of its own."""
    import vl_convert

    title = {"text": figure.title, "subtitle": textwrap.wrap(figure.note, 76), "anchor": "start", "frame": "group"}
    spec = {**figure.spec, "title": {**title, "dx": -36, "offset": 14}}
    config = {**THEME, "background": "var(--page)", "padding": 14}
    written = with_light_colours(json.dumps({**spec, "config": config}))
    image: bytes = vl_convert.vegalite_to_png(json.loads(written), scale=PNG_SCALE)
    return image


def static_svg(figure: "Figure") -> str:
    """The figure as SVG in the page's colours, for readers without JavaScript."""
    drawing = _svg(json.dumps({**figure.spec, "config": {**THEME, "aria": False}}))
    # Ids count from 0 in every drawing; in one page they must differ.
    return re.sub(r'(id="|url\(#)((?:clip|gradient)[\w-]*)', rf"\1{figure.name}-\2", drawing)


@functools.lru_cache(maxsize=128)
def _svg(spec: str) -> str:
    import vl_convert

    drawing: str = vl_convert.vegalite_to_svg(spec)
    return drawing


@functools.cache
def vega_runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script of about 0.9 MB, from vl-convert's own copy."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script


def page_specs(found: "list[Figure]") -> dict[str, Any]:
    """What the page's script draws from: the common configuration, and each figure's specification by name."""
    return {"config": THEME, "specs": {figure.name: figure.spec for figure in found}}
