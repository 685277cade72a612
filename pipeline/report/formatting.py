"""Numbers as a reader wants them: one way to write a count, a share, a ratio, an interval.

Used by the page, the figures and the terminal alike, so that the same number never appears in two spellings. A value
that is None or NaN becomes a dash; a number is never made up for it.
"""

import math
import re
import unicodedata

DASH = "\u2013"


def is_missing(value: float | None) -> bool:
    """True for None and NaN."""
    return value is None or math.isnan(value)


def count(value: float | None) -> str:
    """Whole number with thousands separators: 62,373."""
    return DASH if value is None or math.isnan(value) else f"{round(value):,}"


def percent(value: float | None, digits: int | None = None) -> str:
    """A share in [0, 1] as a percentage; one decimal below 10% unless `digits` says otherwise, none above."""
    if value is None or math.isnan(value):
        return DASH
    scaled = 100 * value
    if digits is None:
        digits = 1 if 0 < abs(scaled) < 9.95 else 0
        if 0 < abs(scaled) < 0.095:
            return f"{scaled:.2g}%"
    return f"{scaled:.{digits}f}%"


def decimal(value: float | None, digits: int = 3) -> str:
    """Fixed number of decimals, so that columns align: 0.847."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without trailing zeros: 0.0481, 12.3, 4,810."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """The bracketed 95% interval, or nothing where there is none."""
    if is_missing(low) or is_missing(high):
        return ""
    return f"[{decimal(low, digits)}, {decimal(high, digits)}]"


def percent_interval(low: float | None, high: float | None) -> str:
    """The bracketed interval of a share in percent, or nothing where there is none."""
    return "" if is_missing(low) or is_missing(high) else f"[{percent(low)}, {percent(high)}]"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """1 latent, 2 latents, 1,204 latents."""
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def words(name: str) -> str:
    """An identifier as words: best_half_replace -> best half replace."""
    return name.replace("_", " ")


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Unicode's marks that turn the direction of the text after them."""


def visible(text: str) -> str:
    """The text with line breaks as arrows, and control characters and direction marks as replacement marks."""
    text = re.sub("\r\n|[\n\u2028\u2029]", "\u21b5", text).replace("\t", "\u21e5")
    return "".join(
        "\ufffd"
        if unicodedata.category(letter) in {"Cc", "Cs"} or unicodedata.bidirectional(letter) in _DIRECTIONS
        else letter
        for letter in text
    )


def setting(value: object) -> str:
    """A configuration value on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(item) for item in value)
    return str(value)
