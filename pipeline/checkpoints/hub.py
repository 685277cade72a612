"""Uploads folders to a hub. What cannot work (the name, the token, the network) is told before anything is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoints.published import TRAINER_NAME
from pipeline.errors import InputError, first_line

PUBLISHED_NAMES = ("model.safetensors", "config.json", TRAINER_NAME, "README.md")
"""Files of the published layout, with the model card."""
Kind = Literal["model", "space"]


def check_hub(repo_id: str) -> None:
    """Raises InputError unless `repo_id` is owner/name and the hub answers and knows the token."""
    import huggingface_hub  # only here: everything else works without it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"expected a hub repository owner/name, got {repo_id!r}: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise InputError(f"expected a hub repository owner/name, got {repo_id!r}; name its owner")
    if huggingface_hub.get_token() is None:
        raise InputError(
            "expected a token that may write to the hub, got none; log in with `hf auth login`, or set HF_TOKEN"
        )
    address = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.HfApi().whoami()
    except HfHubHTTPError as error:
        raise InputError(
            f"expected a token that {address} accepts, got {first_line(error)}; log in with `hf auth login`, or "
            "correct HF_TOKEN"
        ) from error
    except (OSError, HTTPError) as error:
        raise InputError(
            f"expected an answer of the hub {address}, got {type(error).__name__}: {first_line(error)}; check the "
            "network, and HF_HUB_OFFLINE and HF_ENDPOINT where they are set"
        ) from error


def push_published(repo_id: str, folder: str | Path, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a folder that write_published wrote to the hub; returns the commit's address.

    The repository is made if missing. Needs a token with write access (`hf auth login`, or HF_TOKEN).
    """
    return push_folder(repo_id, folder, names=PUBLISHED_NAMES, private=private, revision=revision)


def push_folder(
    repo_id: str,
    folder: str | Path,
    *,
    names: Sequence[str] | None = None,
    kind: Kind = "model",
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads a folder as one commit; returns its address.

    Args:
        repo_id: owner/name; made if missing.
        folder: what is uploaded.
        names: the files of it that are; None for all.
        kind: of the repository; a Space runs on Gradio.
        private: only for whoever may see it. One that is there and public is refused then.
        revision: the branch; main if left out.

    Raises InputError where the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = huggingface_hub.HfApi()
    about: dict[str, Any] = {"repo_type": kind}
    try:
        api.create_repo(
            repo_id, private=private, exist_ok=True, space_sdk="gradio" if kind == "space" else None, **about
        )
        if private and not api.repo_info(repo_id, **about).private:
            raise InputError(
                f"expected a private hub repository {repo_id}, got one that is there already and public; make it "
                "private in its settings, or name another"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, **about)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            allow_patterns=None if names is None else list(names),
            revision=revision,
            commit_message="crosscoder",
            **about,
        )
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"expected to write to the hub repository {repo_id}, came {type(error).__name__}: "
            f"{first_line(error)}: check the name, the network, and that HF_TOKEN may write there"
        ) from error
    return str(info.commit_url)
