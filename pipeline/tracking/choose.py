"""The tracker that a run file asks for. Importing this file does not import MLflow."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.config.resources import TrackingSection
from pipeline.errors import InputError
from pipeline.storage.filesystem import Storage
from pipeline.storage.locks import exclusive
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.spool import FOLDER, SpooledTracker
from pipeline.tracking.tracker import NoopTracker, Tracker


def make_tracker(section: TrackingSection, storage: Storage, say: Callable[[str], object] = lambda _: None) -> Tracker:
    """The tracker of a run. Without a URI: MLFLOW_TRACKING_URI, else a SQLite file under a local storage root.

    What a server cannot take at once waits on the storage root; `say` is told when that begins and ends.
    """
    if section.kind == "none":
        return NoopTracker()
    uri = section.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return SpooledTracker(MlflowTracker(uri, section.experiment, None), storage, say)
    root = Path(storage.root) if storage.is_local else Path("runs").resolve()
    folder = root / "mlflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"tracking: cannot create {folder}: {error.strerror}; set tracking.uri") from error
    # Two first runs would make the tables at the same time. The first use of a SQLite file announces each of them.
    with exclusive(folder / "mlflow.db.lock"), contextlib.redirect_stderr(None):
        local = MlflowTracker(f"sqlite:///{folder / 'mlflow.db'}", section.experiment, (folder / "artifacts").as_uri())
    return SpooledTracker(local, storage, say)


def deliver_waiting(section: TrackingSection, storage: Storage, say: Callable[[str], object]) -> None:
    """Deliver what former runs on this root could not; nothing is loaded or written where nothing waits."""
    if section.kind != "none" and storage.files(FOLDER):
        make_tracker(section, storage, say).close()
