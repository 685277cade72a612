"""The arguments of the command line: every command with its options and what they are for.

Loads nothing but argparse: `crossray --help` must not take time. A shell learns them by `crossray completion`.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = "Tells what fine-tuning changed inside a language model, and proves it."
SHELLS = ("bash", "zsh", "fish")
FORMS = ("crossray", "saelens", "delphi", "neuronpedia", "space")
"""Forms of `crossray export`: those of pipeline/exports/forms.py."""
_FILES = ("file", "root", "texts", "dialogues", "output", "token_file", "folder")
"""Arguments that a shell completes by the names of files and folders."""


class _Version(argparse.Action):
    """Looks the version up where it is asked for: importing the package metadata takes as long as all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"crossray {version('crossray')}\n")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of `crossray`; `command` is None where none was given."""
    parser = argparse.ArgumentParser(prog="crossray", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_init(commands)
    _add_run_files(commands)
    _add_verify(commands)
    _add_explore(commands)
    _add_kept(commands)
    _add_doors(commands)
    _add_jobs(commands)
    command = _add(commands, "schema", "print the JSON schema of run files or benchmark files, for editors")
    command.add_argument("kind", nargs="?", choices=("run", "benchmark", "show"), default="run", help="run by default")
    command = _add(commands, "completion", "print a shell's completion of this command line")
    command.add_argument("shell", choices=SHELLS, help="the shell to write it for")
    return parser


def completion(shell: str) -> str:
    """The script by which one of SHELLS completes commands, options and file names."""
    import shtab

    parser = make_parser()
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in _FILES:
                marked: Any = action
                marked.complete = shtab.FILE
    return str(shtab.complete(parser, shell=shell))


def _add(commands: "Commands", name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text)


def _add_init(commands: "Commands") -> None:
    for name, text in (
        (
            "init",
            "write a complete, commented run file for two models; from local folders or known hub ids, without a "
            "network",
        ),
        ("diff", "compare two models: write a run file as init does, print its plan, ask, and run it"),
    ):
        command = _add(commands, name, text)
        command.add_argument("base", help="hub id or folder of the base model")
        command.add_argument("chat", help="of the fine-tuned model, or the folder of a LoRA adapter of the base model")
        command.add_argument("--texts", help="your texts: .jsonl or .parquet with a column text, or .txt")
        command.add_argument("--dialogues", help="your dialogues: .jsonl or .parquet with a column messages")
        command.add_argument("--name", help="name of the run; the chat model's by default")
        if name == "init":
            text = "where to write; NAME.yaml by default, never over a file that is there"
        else:
            text = "the run file; NAME.yaml by default; one that is there is used as it stands"
            _add_yes(command, "run without asking")
            _add_gpu(command)
        command.add_argument("--output", help=text)


def _add_run_files(commands: "Commands") -> None:
    for name, text in (
        ("plan", "print every step with its state, and what the run will cost; touches nothing"),
        ("run", "make what is missing, then print the verdict"),
        ("layers", "measure at which layer the models differ, and name the layer to look at"),
        ("report", "render the report again from finished artifacts"),
        ("track", "log a finished run to its tracker, such as an MLflow server that was not there when it ran"),
        ("benchmark", "score recipes by planted truth: a benchmark file, or a finished run with planted labels"),
        ("submit", "run as a job of a Ray cluster and follow its log; the job goes on without this terminal"),
    ):
        command = _add(commands, name, text)
        command.add_argument("file", help="run file (YAML)")
        _add_pairs(command, "--set", "override a key of the run file, e.g. crosscoders.l1.sparsity.mu=0.02")
        if name == "benchmark":
            text = "judge a crosscoder from elsewhere too: folder, file or hub id; fitted on that seed's activations"
            _add_pairs(command, "--checkpoint", text, "NAME[@SEED]=SOURCE")
        if name == "plan":
            _add_gpu(command)
        if name == "submit":
            command.add_argument("--name", help="name of the job; the run's name and the time by default")
            _add_pairs(command, "--env", "environment variable of the job; no secrets, they are readable there")
            command.add_argument("--detach", action="store_true", help="return at once instead of following the log")
            _add_address(command)


def _add_verify(commands: "Commands") -> None:
    text = "check every finished artifact of a run, or of a whole storage root, byte by byte; reads only"
    command = _add(commands, "verify", text)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", help="run file (YAML)")
    what.add_argument("--root", help="storage root: a folder or URL with artifacts")
    _add_pairs(command, "--set", "override a key of the run file")


def _add_explore(commands: "Commands") -> None:
    text = "open a finished run in the browser: type texts, look at latents, find them, steer with them"
    command = _add(commands, "explore", text)
    command.add_argument("file", help="run file (YAML)")
    _add_pairs(command, "--set", "override a key of the run file")
    text = "interface to listen on; 127.0.0.1 by default, any other asks visitors for a token"
    command.add_argument("--host", default="127.0.0.1", help=text)
    command.add_argument("--port", type=int, help="port; the first free one from 7860 by default")
    text = "file that holds the token; CROSSRAY_EXPLORE_TOKEN by default, else one is made where it is needed"
    command.add_argument("--token-file", metavar="PATH", help=text)


def _add_kept(commands: "Commands") -> None:
    for name, text in (
        ("runs", "list the runs on a storage root"),
        ("show", "print the verdict of a finished run, its strongest latents, and what they do"),
        ("compare", "print two finished runs side by side, and the settings in which they differ"),
        ("rm", "remove runs by name or age; artifacts that another finished run reads stay"),
    ):
        command = _add(commands, name, text)
        _add_root(command)
        if name == "show":
            command.add_argument("name", help="name of the run")
            command.add_argument("--json", action="store_true", help="as JSON; `crossray schema show` describes it")
            command.add_argument("--latents", type=int, default=10, help="latents per crosscoder (10)")
        if name == "compare":
            command.add_argument("a", help="name of a run")
            command.add_argument("b", help="name of another")
        if name == "rm":
            command.add_argument("names", nargs="*", metavar="name", help="name of a run")
            command.add_argument("--older-than", type=float, metavar="DAYS", help="every run not touched for so long")
            _add_yes(command, "remove without asking")


def _add_doors(commands: "Commands") -> None:
    for name, text in (
        ("export", "write a crosscoder of a finished run into a new folder, in the form of another tool"),
        ("push", "upload a crosscoder of a finished run to the hub, with a model card made from the run"),
    ):
        command = _add(commands, name, text)
        command.add_argument("name", help="name of the run")
        command.add_argument("crosscoder", help="its crosscoder")
        if name == "export":
            command.add_argument("folder", help="where to write; new or empty")
            command.add_argument("--as", dest="form", choices=FORMS, default="crossray", help="crossray by default")
            text = (
                "for saelens one model's half, which is not the crosscoder; for neuronpedia the model it is shown under"
            )
            command.add_argument("--model", choices=("base", "chat"), help=text)
        else:
            command.add_argument("repo", help="repository owner/name; made if missing; needs HF_TOKEN or a login")
            command.add_argument("--private", action="store_true", help="only for whoever may see the repository")
            text = "a Space that runs the explorer, in place of the weights"
            command.add_argument("--space", action="store_true", help=text)
        _add_root(command)


def _add_jobs(commands: "Commands") -> None:
    for name, text in (
        ("status", "list the jobs of a cluster, or one of them"),
        ("logs", "print a job's log"),
        ("stop", "ask a job to end; what it has finished stays"),
    ):
        command = _add(commands, name, text)
        command.add_argument("job", help="name of the job", nargs="?" if name == "status" else None)
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="go on until the job ends")
        _add_address(command)


def _add_pairs(command: argparse.ArgumentParser, option: str, text: str, shape: str = "KEY=VALUE") -> None:
    command.add_argument(option, action="append", default=[], metavar=shape, help=text)


def _add_gpu(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpu", default="A100", help="GPU to assume for stages that ask for one (A100)")


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", default="runs", help="storage root: a folder or URL; runs by default")


def _add_yes(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--yes", action="store_true", help=text)


def _add_address(command: argparse.ArgumentParser) -> None:
    text = "the cluster's dashboard; RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265 by default"
    command.add_argument("--address", help=text)
