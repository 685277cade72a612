"""Tells a user whose run file counts layers from 1, as crossray did before, which number names the same place now.

The sign is an artifact in the storage root: activations of the same run and settings that were made when
`activations.layer: 3` meant the output of the third layer. Reads records only.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.stages.catalogue import ActivationsInputs
from pipeline.stages.step import Step
from pipeline.storage.artifacts import RECORD_NAME, read_record
from pipeline.storage.filesystem import Storage

FROM_ZERO_SINCE = 4
"""ActivationsInputs.VERSION since which layers count from 0."""


def renumbering_note(step: Step[ActivationsInputs], run_name: str, storage: Storage) -> str:
    """One line where the run file would now read another layer than its artifacts hold; empty elsewhere."""
    if read_record(storage, step.key) is not None:
        return ""
    layer = step.inputs.section.layer_number
    for folder in storage.folders(step.key.stage):
        record_key = f"{step.key.stage}/{folder}/{RECORD_NAME}"
        if storage.exists(record_key) and _is_former(storage.read_json(record_key), step, run_name):
            return (
                f"activations.layer: layers now count from 0, so layer {layer} is the output of model.layers[{layer}]; "
                f"{storage.url(f'{step.key.stage}/{folder}')} was made when it meant model.layers[{layer - 1}]: set "
                f"activations.layer to {layer - 1} to read that place again"
            )
    return ""


def _is_former(record: Mapping[str, Any], step: Step[ActivationsInputs], run_name: str) -> bool:
    """Whether a record is of these activations as they were when layers counted from 1."""
    former, own = record.get("identity", {}), step.key.identity
    section = former.get("section", {})
    is_same = all(own["section"].get(name) == value for name, value in section.items())
    is_of_run = record.get("run_name") == run_name or former.get("inputs") == own["inputs"]
    return is_same and is_of_run and former.get("version", FROM_ZERO_SINCE) < FROM_ZERO_SINCE
