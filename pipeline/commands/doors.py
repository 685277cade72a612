"""The commands that write a finished run for others: `crossray export`."""

import argparse


def export(parsed: argparse.Namespace) -> int:
    """Write a crosscoder into a folder, in the form of another tool."""
    from pipeline.exports import forms
    from pipeline.library.runs import open_run

    run = open_run(parsed.root, parsed.name)
    folder = forms.export(run, parsed.crosscoder, parsed.folder, form=parsed.form, model=parsed.model)
    print(f"folder   {folder}")
    return 0
