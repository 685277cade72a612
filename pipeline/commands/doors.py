"""The commands that write a finished run for others: `crossray export` and `crossray push`."""

import argparse


def export(parsed: argparse.Namespace) -> int:
    """Write a crosscoder into a folder, in the form of another tool."""
    from pipeline.exports import forms
    from pipeline.library.runs import open_run

    run = open_run(parsed.root, parsed.name)
    folder = forms.export(run, parsed.crosscoder, parsed.folder, form=parsed.form, model=parsed.model)
    print(f"folder   {folder}")
    return 0


def push(parsed: argparse.Namespace) -> int:
    """Upload a crosscoder to a hub, with a model card."""
    from pipeline.exports import pushing
    from pipeline.library.runs import open_run

    run = open_run(parsed.root, parsed.name)
    address = pushing.push(run, parsed.crosscoder, parsed.repo, private=parsed.private, space=parsed.space)
    print(f"hub      {address}")
    return 0
