"""Latents, controls, planted and examples: four stages that share their passes over the validation rows.

The missing steps of all crosscoders are made together. A first pass collects what all of them need; the latent tables
are published first, since the others read the verdicts. A second pass scores planted labels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.analyses.rows import RowAnalysis, Sums
from pipeline.errors import InputError
from pipeline.schema import Split
from pipeline.stages.catalogue import ControlsInputs, ExamplesInputs, LatentsInputs, PlantedInputs
from pipeline.stages.controls import ControlsWork
from pipeline.stages.examples import ExamplesWork
from pipeline.stages.finished_crosscoder import open_crosscoder
from pipeline.stages.latents import LatentsWork
from pipeline.stages.planted import PlantedWork
from pipeline.stages.row_pass import Answers, Measured, Questions, answer
from pipeline.stages.step import StageContext, Step
from pipeline.storage.activation_store import ActivationStore

MeasuredInputs = LatentsInputs | ControlsInputs | PlantedInputs | ExamplesInputs


class _Work(Protocol):
    """One step that is made from the rows."""

    step: Any

    def first_pass(self) -> Mapping[str, RowAnalysis]:
        """What it takes from the first pass, by names that no other stage uses."""
        ...

    def publish(self, sums: Mapping[str, Sums]) -> None:
        """Write its tables and its record."""
        ...


_WORKS: Mapping[type[MeasuredInputs], Callable[[Any, Measured], _Work]] = {
    LatentsInputs: LatentsWork,
    ControlsInputs: ControlsWork,
    PlantedInputs: PlantedWork,
    ExamplesInputs: ExamplesWork,
}


def run(steps: Sequence[Step[MeasuredInputs]], context: StageContext) -> None:
    """Publish the missing steps of all crosscoders."""
    store = ActivationStore(context.storage, steps[0].inputs.activations.folder)
    by_crosscoder: dict[str, list[Step[MeasuredInputs]]] = {}
    for step in steps:
        by_crosscoder.setdefault(step.inputs.crosscoder.folder, []).append(step)
    works = [work for folder, own in by_crosscoder.items() for work in _works_of(folder, own, store, context)]
    sums = answer("measure latents", _questions([(work, work.first_pass()) for work in works]), store, context)
    _publish_latents([work for work in works if isinstance(work, LatentsWork)], sums, store, context)
    for work in works:
        if isinstance(work, ControlsWork):
            work.publish(_of(work, sums))
    planted = [work for work in works if isinstance(work, PlantedWork)]
    second = _questions([(work, work.second_pass(_of(work, sums))) for work in planted])
    scores = answer("measure planted", second, store, context)
    for work in planted:
        work.publish(_of(work, scores))
    for work in works:
        if isinstance(work, ExamplesWork):
            work.publish(_of(work, sums))


def _publish_latents(
    works: Sequence[LatentsWork], sums: Answers, store: ActivationStore, context: StageContext
) -> None:
    """The latent tables, after the further passes that some of them ask for."""
    strong = _questions([(work, work.strong_pass(_of(work, sums))) for work in works])
    training = _questions([(work, work.training_pass()) for work in works])
    num_rows = max((work.step.inputs.section.training_rows for work in works), default=0)
    further = (
        answer("measure strong rows", strong, store, context),
        answer("measure training rows", training, store, context, split=Split.TRAIN, num_rows=num_rows),
    )
    for work in works:
        work.publish({**_of(work, sums), **_of(work, further[0]), **_of(work, further[1])})


def _works_of(
    folder: str, steps: Sequence[Step[MeasuredInputs]], store: ActivationStore, context: StageContext
) -> list[_Work]:
    """The works of one crosscoder; InputError where it does not fit the rows, or a step cannot be made of them."""
    with open_crosscoder(context.storage, folder) as crosscoder:
        if crosscoder.activation_dim != store.manifest.activation_dim:
            raise InputError(
                f"crosscoder {folder}: expected the activations' width {store.manifest.activation_dim}, got "
                f"{crosscoder.activation_dim}; it belongs to another layer or pair"
            )
        return [_WORKS[type(step.inputs)](step, Measured(crosscoder, store, context)) for step in steps]


def _questions(asked: Sequence[tuple[_Work, Mapping[str, RowAnalysis]]]) -> Questions:
    """The analyses of all works, by the folder of their crosscoder."""
    questions: dict[str, dict[str, RowAnalysis]] = {}
    for work, analyses in asked:
        questions.setdefault(work.step.inputs.crosscoder.folder, {}).update(analyses)
    return questions


def _of(work: _Work, sums: Answers) -> Mapping[str, Sums]:
    return sums.get(work.step.inputs.crosscoder.folder, {})
