"""Rules between the settings of one crosscoder: what no recipe can be, whoever asks for it.

Standard library alone, so that a run file is held to them while it is read, before torch is loaded; CrosscoderSpec
holds its own callers to the same ones. What a single number may be is said where it is declared.
"""


def check_recipe(*, inputs: str, dedicated_frac: float, code_weight: str) -> None:
    """Raises ValueError for a difference dictionary with latents of one model or a code weight per model."""
    if inputs == "difference" and (dedicated_frac > 0 or code_weight == "decoupled"):
        raise ValueError(
            f"expected dedicated_frac = 0 and a code_weight other than decoupled for inputs 'difference', got "
            f"{dedicated_frac} and {code_weight!r}: a difference is one activation, of no model alone"
        )


def check_active_latents(name: str, value: int | None, *, num_latents: int, kind: str) -> None:
    """Raises ValueError unless 1 <= value <= num_latents; name is k or k_start, kind the sparsity's."""
    if value is None or not 1 <= value <= num_latents:
        raise ValueError(
            f"expected 1 <= {name} <= num_latents = {num_latents} for {kind}, got {name}={value}: lower {name} or "
            f"raise num_latents"
        )
