"""The views as HTML. Every text that comes from a corpus, a model or a visitor is escaped by the templates.

What this room writes into a page without escaping is its own style sheet alone.
"""

from functools import cache
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from pipeline.explorer.address import View, address
from pipeline.explorer.finding import ON_TEXT, ON_TOKEN, SHOWN, FoundPage
from pipeline.explorer.latent_page import LatentPage
from pipeline.explorer.reading import ReadText, StrongLatent
from pipeline.explorer.steering import Answers
from pipeline.report import page as report_page
from pipeline.report.latent_rows import TABLE_COLUMNS
from pipeline.report.palette import VERDICT_ROLES, css_variables

ROWS_PER_PAGE = 100
"""Positions of a text in one page of its table."""
_LATENTS_PER_TOKEN = 4
_HEADINGS = {key: (heading, title) for key, heading, title in TABLE_COLUMNS} | {
    ON_TEXT: ("on the text", "largest f on the text"),
    ON_TOKEN: ("on the token", "share of its activation that is on the token"),
}
_PERCENT = {"artifact_probability", "frequency", "template_frac", "user_frac", "assistant_frac", ON_TOKEN}


@cache
def _environment() -> Environment:
    made = report_page.environment()
    assert made.loader is not None
    made.loader = ChoiceLoader([PackageLoader("pipeline.explorer", "templates"), made.loader])
    made.globals.update(link=_link, roles=VERDICT_ROLES, isnan=lambda value: value != value)
    return made


def _link(view: View, /, **changes: Any) -> str:
    return address(view._replace(**changes))


def _render(template: str, **context: Any) -> str:
    return report_page.printable_html(_environment().get_template(template).render(**context))


def style() -> str:
    """The style sheet of all views: the report's colours, light and dark."""
    own, _, _ = _environment().loader.get_source(_environment(), "explorer.css")  # type: ignore[union-attr]
    return f".crossray{{{css_variables()}}}\n{own}"


def text_html(view: View, read: ReadText, strong: list[StrongLatent], maxima_F: np.ndarray) -> str:
    """A text with its tokens coloured by one latent, the strongest latents, and both models' next tokens.

    view.latent colours; maxima_F are the largest activations of all latents, which colours are relative to.
    """
    latent = view.latent if view.latent >= 0 else strong[0].latent if strong else -1
    f_T = read.activations(latent) if latent >= 0 else np.zeros(len(read.tokens))
    scale = max(float(maxima_F[latent]) if latent >= 0 else 0.0, float(f_T.max(initial=0.0)), 1e-12)
    num_pages = -(-len(read.tokens) // ROWS_PER_PAGE)
    page = min(max(view.page, 0), num_pages - 1)
    here = range(page * ROWS_PER_PAGE, min((page + 1) * ROWS_PER_PAGE, len(read.tokens)))
    kl_T, probs = read.next.kl_P.tolist(), read.next.prob_PMK.tolist()
    at = [read.at(position, _LATENTS_PER_TOKEN) for position in range(len(read.tokens))]
    predictions = [
        [list(zip(read.next_texts[t][model], probs[t][model], strict=True)) for model in (0, 1)]
        for t in range(len(read.tokens))
    ]
    return _render(
        "text.html",
        view=view._replace(latent=latent),
        read=read,
        strong=strong,
        f_T=f_T.tolist(),
        share_T=(f_T / scale).tolist(),
        kl_T=kl_T,
        largest_kl=max(kl_T, default=0.0),
        mean_kl=float(np.mean(kl_T)),
        at=at,
        predictions=predictions,
        here=here,
        page=page,
        num_pages=num_pages,
    )


def latent_html(view: View, page: LatentPage) -> str:
    """The page of a latent."""
    return _render("latent.html", view=view, page=page, item=page.card)


def found_html(view: View, found: FoundPage) -> str:
    """One page of the latents that were found."""
    columns = [(key, *_HEADINGS[key], key in _PERCENT) for key in (*found.added, *SHOWN)]
    rows = found.rows.to_dict("records")
    return _render("find.html", view=view, found=found, rows=rows, columns=columns)


def answers_html(view: View, answers: Answers) -> str:
    """Answers side by side, as far as they are written."""
    return _render("steer.html", view=view, answers=answers)


def fault_html(message: str) -> str:
    """What was wrong with what was asked, in one line."""
    return _render("fault.html", message=message)


def head_html(**about: Any) -> str:
    """The line above all views: the run, its models, its verdict's summary."""
    return _render("head.html", **about)


def exported(content: str, title: str) -> str:
    """A view as a page of its own, which fetches nothing and runs no script.

    content: HTML that this module has made; whatever else it holds, the page's policy runs no script.
    """
    return _render("export.html", content=Markup(content), title=title, style=Markup(style()))
