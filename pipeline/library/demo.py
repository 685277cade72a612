"""`demo_pair`: the generated pair of the demo in a folder, for tutorials and first steps that need no network."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.library.fitting import reporting
from pipeline.terminal import Progress, Reporter

_SIZES = ("demo", "tiny")
_COMPLETE = "organism.json"
"""Written last."""


class DemoPair(NamedTuple):
    """Two tiny models that differ in planted behaviours, and texts that neither was trained on word for word."""

    base: str
    """Folder of the base model."""
    chat: str
    """Folder of the fine-tuned model."""
    texts: list[str]
    """Plain documents."""
    dialogues: list[list[dict[str, Any]]]
    """Lists of messages."""
    prompts: dict[str, dict[str, list[str]]]
    """By planted behaviour, what a user says: `triggers` call for it, `neutral` ones do not."""


def demo_pair(folder: str | Path = "demo-pair", *, size: str = "demo", progress: bool | Reporter = False) -> DemoPair:
    """The generated pair, built into the folder unless it is there.

    Args:
        folder: where models and texts are kept; equal on any machine but for rounding.
        size: demo trains for about two minutes on two cores; tiny takes seconds, and its models know nothing.
        progress: shows the training on standard error; or a reporter of your own.

    Raises InputError for another size, and where the folder holds something else.
    """
    if size not in _SIZES:
        raise InputError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
    own = Path(folder) / size
    if not (own / _COMPLETE).is_file():
        if own.is_file():
            raise InputError(f"{folder}: expected a folder for the demo pair, got the file {str(own)!r}; name another")
        from pipeline.organisms.build import build, spec_of  # loads the architecture, which other calls can do without

        meters: dict[str, Progress] = {}
        with reporting(progress) as reporter:
            build(
                own,
                spec_of(size),
                lambda part, done, total: reporter.progress(
                    meters.setdefault(part, Progress(part, total, "steps")).update(done)
                ),
            )
    texts, dialogues = (_lines(own / f"{name}.jsonl") for name in ("documents", "dialogues"))
    return DemoPair(
        base=str(own / "base"),
        chat=str(own / "chat"),
        texts=[row["text"] for row in texts],
        dialogues=[row["messages"] for row in dialogues],
        prompts=json.loads((own / "prompts.json").read_text(encoding="utf-8")),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
