"""The two kinds of failure that a user can act on.

All other errors propagate with their traceback. `cli.main` turns these into one line and an exit code; code below it
catches them only to add where the fault is and raise again.
"""


class CrossrayError(Exception):
    """A failure with a message made for the user: what was expected, what came, where, what to do."""

    exit_code = 1


class InputError(CrossrayError):
    """The user's input is wrong (config, model, corpus, storage): exit code 2, nothing was left behind."""

    exit_code = 2


class ArtifactError(InputError):
    """An artifact on the storage root is damaged, foreign or of another version: exit code 2."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, on one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
