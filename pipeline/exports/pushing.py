"""`push`: a crosscoder of a finished run on a hub, with its model card."""

import tempfile
from pathlib import Path

from pipeline.checkpoints.hub import check_hub, push_folder, push_published
from pipeline.exports.forms import require_crosscoder, write_published_with_card
from pipeline.exports.space import write_space
from pipeline.library.runs import Run


def push(run: Run, crosscoder: str, repo_id: str, *, private: bool = False, space: bool = False) -> str:
    """Uploads a crosscoder of a finished run, with a model card, or the explorer over it; the commit's address.

    Args:
        run: from `crossray.open` or `crossray.run`.
        crosscoder: its name in the run.
        repo_id: hub repository owner/name; made if missing.
        private: only for whoever may see it; a public repository that is there already is refused.
        space: a Space that runs the explorer, in place of the published layout.

    Raises InputError, before anything is written, for a name that there is not, without a token, or without a network.
    """
    require_crosscoder(run, crosscoder)
    check_hub(repo_id)
    with tempfile.TemporaryDirectory(prefix="crossray-") as folder:
        if space:
            write_space(run, crosscoder, Path(folder))
            return push_folder(repo_id, folder, kind="space", private=private)
        write_published_with_card(run, crosscoder, Path(folder), source=repo_id)
        return push_published(repo_id, folder, private=private)
