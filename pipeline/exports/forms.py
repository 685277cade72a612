"""`export`: a crosscoder of a finished run as a folder in one of several forms.

A folder is written beside its place and then moved there, so that it is there whole or not at all.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoints.export import replace_text
from pipeline.checkpoints.saelens import write_saelens
from pipeline.errors import InputError, first_line
from pipeline.exports.card import model_card
from pipeline.exports.delphi import write_delphi
from pipeline.exports.neuronpedia import write_neuronpedia
from pipeline.exports.space import write_space
from pipeline.library.runs import Run
from pipeline.schema import MODEL_NAMES


class Asked(NamedTuple):
    """What is to be written."""

    run: Run
    crosscoder: str
    """Its name in the run."""
    model: str | None
    """base or chat, for forms that know one model."""


class Form(NamedTuple):
    """One form of a crosscoder."""

    write: Callable[[Asked, Path], None]
    """Writes into a folder that is there and empty."""
    knows_models: bool
    """Whether one model can be chosen."""


def export(run: Run, crosscoder: str, folder: str | Path, *, form: str = "crossray", model: str | None = None) -> Path:
    """Writes a crosscoder of a finished run into a new folder for another tool; returns the folder.

    Args:
        run: from `crossray.open` or `crossray.run`.
        crosscoder: its name in the run.
        folder: where to; it must not be there yet, or be empty.
        form: crossray (the published layout with a model card), saelens, delphi (its latent cache), neuronpedia
            (requests of its upload), or space (the explorer as a Space of the hub).
        model: base or chat, where the form knows one model alone: for saelens its half, which is not the crosscoder;
            for neuronpedia whose latents they are said to be, the chat model's by default.

    Raises InputError, before anything is written, for names and combinations that there are not.
    """
    asked = Asked(run, crosscoder, model)
    writer = _checked(asked, form)
    with new_folder(folder) as partial:
        writer(asked, partial)
    return Path(folder)


def _checked(asked: Asked, form: str) -> Callable[[Asked, Path], None]:
    if form not in FORMS:
        raise InputError(f"--as: expected one of {', '.join(FORMS)}, got {form!r}")
    require_crosscoder(asked.run, asked.crosscoder)
    if asked.model is not None and (asked.model not in MODEL_NAMES or not FORMS[form].knows_models):
        with_models = ", ".join(name for name, own in FORMS.items() if own.knows_models)
        raise InputError(
            f"--model: expected {' or '.join(MODEL_NAMES)}, for the forms {with_models}, got {asked.model!r} for "
            f"{form}; leave it out for all models"
        )
    return FORMS[form].write


def require_crosscoder(run: Run, name: str) -> None:
    """InputError unless the run has a crosscoder of this name."""
    if name not in run.crosscoders:
        raise InputError(f"{run.name}: expected one of {', '.join(run.crosscoders)}, got {name!r}")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` that becomes it when the block ends, and is removed where it fails.

    InputError where something is there already, or it cannot be written.
    """
    if "://" in str(folder):
        raise InputError(
            f"{folder}: expected a folder of this machine, got an address; write it here and copy it there"
        )
    target = Path(folder).absolute()
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{folder}: expected a folder that is new or empty, got one in use; name another")
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: expected a folder that can be written, got {first_line(error)}") from error
    finally:
        with suppress(ValueError):  # a name that no folder can have
            shutil.rmtree(partial, ignore_errors=True)


def _write_crossray(asked: Asked, folder: Path) -> None:
    write_published_with_card(asked.run, asked.crosscoder, folder, source=None)


def write_published_with_card(run: Run, name: str, folder: Path, *, source: str | None) -> None:
    """The published layout and its README.md, into a folder; source: hub id under which it will be read."""
    crosscoder = run.crosscoder(name)
    replace_text(folder / "README.md", model_card(run, name, crosscoder, source=source or "this/folder"))
    crosscoder.save_pretrained(folder)


def _write_saelens(asked: Asked, folder: Path) -> None:
    origin = asked.run.origin
    about = {"crossray_run": asked.run.name, "crossray_crosscoder": asked.crosscoder, "crossray_layer": origin.layer}
    if asked.model is not None:
        name = (origin.base if asked.model == MODEL_NAMES[0] else origin.chat).name
        about |= {"model_name": name or None, "hook_name": f"blocks.{origin.layer}.hook_resid_post"}
    write_saelens(folder, asked.run.crosscoder(asked.crosscoder), model=asked.model, about=about)


def _write_delphi(asked: Asked, folder: Path) -> None:
    write_delphi(asked.run, asked.crosscoder, folder)


def _write_neuronpedia(asked: Asked, folder: Path) -> None:
    write_neuronpedia(asked.run, asked.crosscoder, folder, model=asked.model)


def _write_space(asked: Asked, folder: Path) -> None:
    write_space(asked.run, asked.crosscoder, folder)


FORMS: Mapping[str, Form] = {
    "crossray": Form(_write_crossray, knows_models=False),
    "saelens": Form(_write_saelens, knows_models=True),
    "delphi": Form(_write_delphi, knows_models=False),
    "neuronpedia": Form(_write_neuronpedia, knows_models=True),
    "space": Form(_write_space, knows_models=False),
}
