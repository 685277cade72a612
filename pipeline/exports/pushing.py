"""`push`: a crosscoder of a finished run on a hub, with its model card."""

import tempfile
from pathlib import Path

from pipeline.checkpoints.hub import check_hub, push_published
from pipeline.exports.forms import require_crosscoder, write_published_with_card
from pipeline.library.runs import Run


def push(run: Run, crosscoder: str, repo_id: str, *, private: bool = False) -> str:
    """Uploads a crosscoder of a finished run in the published layout, with a model card; the commit's address.

    Args:
        run: from `crossray.open` or `crossray.run`.
        crosscoder: its name in the run.
        repo_id: hub repository owner/name; made if missing.
        private: only for whoever may see it; a public repository that is there already is refused.

    Raises InputError, before anything is written, for a name that there is not, without a token, or without a network.
    """
    require_crosscoder(run, crosscoder)
    check_hub(repo_id)
    with tempfile.TemporaryDirectory(prefix="crossray-") as folder:
        write_published_with_card(run, crosscoder, Path(folder), source=repo_id)
        return push_published(repo_id, folder, private=private)
