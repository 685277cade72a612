"""One latent as a small page of its own: the card that the report has of it, for a notebook."""

from markupsafe import Markup

from pipeline.report.data import CrosscoderReport
from pipeline.report.latents import card_of
from pipeline.report.page import asset, environment, printable_html
from pipeline.report.palette import css_variables


def latent_page(crosscoder: CrosscoderReport, latent: int) -> str:
    """HTML that fetches nothing and runs no script: numbers with intervals, verdict, contexts, steered answers.

    What its tables do not hold is left out. The latent must have a row in the latent table.
    """
    style = Markup(f":root{{{css_variables()}}}\n{asset('report.css')}")
    page = environment().get_template("card.html").render(item=card_of(crosscoder, latent), style=style)
    return printable_html(page)
