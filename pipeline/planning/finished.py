"""What `crossray plan` says of a finished run: its size, from records alone, so that nothing heavy is imported."""

from collections.abc import Sequence

from pipeline.run.runner import StepState


def finished_text(states: Sequence[StepState]) -> str:
    """The sizes of a run whose steps are all done, in the form of an estimate."""
    counts = {state.step.key.stage: state.record.counts for state in states if state.record is not None}
    tokens, activations = counts["tokens"], counts["activations"]
    lines = ["estimate"]
    lines.append(f"  tokens       {tokens['num_tokens']:,} (exact)")
    lines.append(f"  rows         {activations['num_rows']:,} stored (both models)")
    lines.append(f"  store        {activations['num_bytes'] / 1e6:,.0f} MB")
    lines.append("  total        0 s (nothing is left to do)")
    return "\n".join(lines)
