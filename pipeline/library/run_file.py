"""A run file's finished run with its two models, loaded as the run itself loads them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.run_file import RunConfig, load
from pipeline.errors import InputError
from pipeline.library.pair import Pair
from pipeline.library.runs import Run
from pipeline.models.memory import automatic_tokens_per_batch
from pipeline.models.placement import device_here
from pipeline.run.flow import Flow, build_flow
from pipeline.stages.extractor import row_options
from pipeline.storage.artifacts import read_record
from pipeline.storage.filesystem import Storage
from pipeline.text.tokenise import Tokenise


class OpenedFile(NamedTuple):
    """What a run file names."""

    run: Run
    load_pair: Callable[[], Pair]
    """Loads the models on this machine: on its GPU where it has one."""


def open_file(source: RunConfig | str | Path, overrides: Sequence[str] = ()) -> OpenedFile:
    """The finished run of a run file, and its models.

    Args:
        source: a run file or its content.
        overrides: KEY=VALUE, as `--set` takes them.

    Raises InputError where the run is not finished.
    """
    from pipeline.run.runner import with_measured_layer

    config = source if isinstance(source, RunConfig) else load(Path(source), overrides)
    storage = Storage(config.storage.root)
    flow = build_flow(with_measured_layer(config, storage))
    record = read_record(storage, flow.report.key)
    if record is None:
        name = config.name if isinstance(source, RunConfig) else source
        raise InputError(
            f"{name}: expected a finished run on {storage.root}, got one whose report is missing; make it with "
            f"`crossray run {name}`"
        )
    return OpenedFile(Run(storage, record), lambda: _pair(flow, storage))


def _pair(flow: Flow, storage: Storage) -> Pair:
    from pipeline.stages.models import load_pair

    inputs, tokens = flow.data.activations.inputs, flow.data.tokens.inputs.section
    own = inputs.loading
    loading = own._replace(placement="one_device", gpus=0 if device_here() == "cpu" else 1)
    models = load_pair(storage, loading)
    asked = inputs.section.tokens_per_batch
    options = row_options(inputs.section, automatic_tokens_per_batch(models) if asked == "auto" else asked)
    tokenise = Tokenise(models.tokenizer, max_tokens=tokens.max_tokens_per_document, dialogues=tokens.dialogues)
    return Pair(models, options, tokenise, (own.models.base.label, own.models.chat.label))
