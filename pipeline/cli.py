"""The command line: parsing, printing, exit codes. How to run: `crossray run workloads/demo.yaml`.

The only file that prints. Exit codes: 0 done, 2 the user's input is wrong (one line, no traceback) or `verify`
found faults (one line each), 130 interrupted, 1 anything else, such as artifacts that `verify` found unfinished.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from pipeline.errors import MAX_LINE_LETTERS, CrossrayError, InputError, shortened

if TYPE_CHECKING:
    from pipeline.cluster.jobs import Jobs
    from pipeline.config.run_file import RunConfig
    from pipeline.terminal import Console, Stream

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of the signal."""
_DESCRIPTION = "Tells what fine-tuning changed inside a language model, and proves it."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    with _streams() as output:
        code = _code_of(arguments)
        sys.stdout.flush()
        if output.fault is not None and not isinstance(output.fault, BrokenPipeError):
            print(f"crossray: standard output: cannot be written to: {output.fault.strerror}", file=sys.stderr)
        return code if output.fault is None else code or 1


def _code_of(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return 0
    _set_library_defaults()
    try:
        if sys.flags.optimize > 1:
            raise InputError(
                "python: expected an interpreter that keeps docstrings, which transformers reads, got -OO (or "
                f"PYTHONOPTIMIZE={sys.flags.optimize}); leave it out, or use -O"
            )
        from pipeline.tracking.log_file import terminal_logging

        with terminal_logging(lambda text: print(text, file=sys.stderr)):
            return int(_COMMANDS[parsed.command](parsed))
    except CrossrayError as error:
        print(f"crossray: {shortened(' '.join(str(error).split()), MAX_LINE_LETTERS)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("crossray: interrupted; run the same command to continue", file=sys.stderr)
        return _INTERRUPTED


@contextmanager
def _streams() -> Iterator["Stream"]:
    """Standard output and error as streams that spell control characters and outlive their readers; the output.

    A descriptor that was closed before the start is opened on nothing: the next file would get its number.
    """
    from pipeline.terminal import Stream

    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without the letters of a label
    nothing = io.StringIO()
    output, errors = (Stream(stream or nothing, is_plain=True) for stream in before)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


class _Version(argparse.Action):
    """Looks the version up where it is asked for: importing the package metadata takes as long as all else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"crossray {version('crossray')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crossray", description=_DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (
        ("plan", "print every step with its state, and what the run will cost; touches nothing"),
        ("run", "make what is missing, then print the verdict"),
        ("layers", "measure at which layer the models differ, and name the layer to look at"),
        ("report", "render the report again from finished artifacts"),
        ("benchmark", "score recipes by planted truth: a benchmark file, or a finished run with planted labels"),
        ("submit", "run as a job of a Ray cluster and follow its log; the job goes on without this terminal"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", help="run file (YAML)")
        _add_pairs(command, "--set", "override a key of the run file, e.g. crosscoders.l1.sparsity.mu=0.02")
        if name == "benchmark":
            text = "judge a crosscoder from elsewhere too: folder, file or hub id; fitted on that seed's activations"
            _add_pairs(command, "--checkpoint", text, "NAME[@SEED]=SOURCE")
        if name == "plan":
            command.add_argument("--gpu", default="A100", help="GPU to assume for stages that ask for one (A100)")
        if name == "submit":
            command.add_argument("--name", help="name of the job; the run's name and the time by default")
            _add_pairs(command, "--env", "environment variable of the job; no secrets, they are readable there")
            command.add_argument("--detach", action="store_true", help="return at once instead of following the log")
            _add_address(command)
    _add_init(commands)
    text = "check every finished artifact of a run, or of a whole storage root, byte by byte; reads only"
    command = commands.add_parser("verify", help=text, description=text)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", help="run file (YAML)")
    what.add_argument("--root", help="storage root: a folder or URL with artifacts")
    _add_pairs(command, "--set", "override a key of the run file")
    for name, text in (
        ("status", "list the jobs of a cluster, or one of them"),
        ("logs", "print a job's log"),
        ("stop", "ask a job to end; what it has finished stays"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("job", help="name of the job", nargs="?" if name == "status" else None)
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="go on until the job ends")
        _add_address(command)
    return parser


def _add_init(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "write a complete, commented run file for two models; from local folders or known hub ids, without a network"
    command = commands.add_parser("init", help=text, description=text)
    command.add_argument("base", help="hub id or folder of the base model")
    command.add_argument("chat", help="of the fine-tuned model, or the folder of a LoRA adapter of the base model")
    command.add_argument("--texts", help="your texts: .jsonl or .parquet with a column text, or .txt")
    command.add_argument("--dialogues", help="your dialogues: .jsonl or .parquet with a column messages")
    command.add_argument("--name", help="name of the run; the chat model's by default")
    command.add_argument("--output", help="where to write; NAME.yaml by default, never over a file that is there")


def _add_pairs(command: argparse.ArgumentParser, option: str, text: str, shape: str = "KEY=VALUE") -> None:
    command.add_argument(option, action="append", default=[], metavar=shape, help=text)


def _add_address(command: argparse.ArgumentParser) -> None:
    text = "the cluster's dashboard; RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265 by default"
    command.add_argument("--address", help=text)


def _config(parsed: argparse.Namespace) -> "RunConfig":
    from pipeline.config.run_file import load

    return load(Path(parsed.file), parsed.set)


def _set_library_defaults() -> None:
    """Turn off progress bars and start-up messages that libraries write past logging; the user may set them again."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _plan(parsed: argparse.Namespace) -> int:
    from pipeline.planning.estimate import estimate_text
    from pipeline.run.runner import inspect, notes
    from pipeline.storage.filesystem import Storage

    config = _config(parsed)
    storage = Storage(config.storage.root)
    states = inspect(config, storage)
    width = max(len(state.step.name) for state in states)
    print(f"{config.name}: {len(states)} steps on {storage.root}")
    for state in states:
        print(f"  {state.state:<8}{state.step.name:<{width}}  {state.step.key.folder}")
        for line in state.drift:
            print(f"  {'':<8}{'':<{width}}    {line}")
    for line in notes(config, storage):
        print(line)
    print(estimate_text(config, states, storage, gpu=parsed.gpu))
    return 0


def _init(parsed: argparse.Namespace) -> int:
    from pipeline.planning.draft import Corpora, draft, machine_here, write_draft

    corpora = Corpora(parsed.texts, parsed.dialogues)
    text = draft(parsed.base, parsed.chat, corpora, machine_here("runs"), name=parsed.name)
    path = write_draft(text, parsed.output)
    print(f"file     {path}")
    print(f"next     crossray plan {path}")
    return 0


def _run(parsed: argparse.Namespace) -> int:
    from pipeline.run import runner
    from pipeline.storage.filesystem import Storage
    from pipeline.terminal import format_seconds
    from pipeline.tracking.log_file import run_logging

    config = _config(parsed)
    with _console() as console, run_logging(Storage(config.storage.root), config.name, console.note) as log:
        outcome = runner.run(config, console)
    print(outcome.verdict)
    print(f"report   {outcome.report_path}")
    print(f"mlflow   {outcome.tracking_link or 'unchanged: this run had nothing to log'}")
    if log.is_written:
        print(f"log      {log.url}")
    print(f"time     {format_seconds(outcome.seconds)}")
    return 0


@contextmanager
def _console() -> Iterator["Console"]:
    """Progress on a copy of standard error: cluster.connected sends the original to a log file while Ray runs."""
    from pipeline.terminal import Console

    terminal = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace")
    with terminal, closing(Console(terminal)) as console:
        yield console


def _layers(parsed: argparse.Namespace) -> int:
    from pipeline.run import runner

    with _console() as console:
        curve = runner.layers(_config(parsed), console)
    print(curve.table)
    print(curve.reason)
    print(f"layers   {curve.folder}")
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from pipeline.run import runner
    from pipeline.terminal import SilentReporter

    outcome = runner.render(_config(parsed), SilentReporter())
    print(outcome.verdict)
    print(f"report   {outcome.report_path}")
    return 0


def _benchmark(parsed: argparse.Namespace) -> int:
    from pipeline.config.run_file import load_as, read_tree
    from pipeline.planted import benchmark, pair
    from pipeline.planted.settings import BenchmarkConfig
    from pipeline.storage.filesystem import Storage
    from pipeline.terminal import format_seconds
    from pipeline.tracking.log_file import run_logging

    path = Path(parsed.file)
    if "world" not in read_tree(path):
        if parsed.checkpoint:
            raise InputError(f"--checkpoint: expected a benchmark file, got the run file {path}")
        print(pair.run(_config(parsed)))
        return 0
    config = benchmark.with_checkpoints(load_as(BenchmarkConfig, path, parsed.set), parsed.checkpoint)
    storage = Storage(config.storage.root)
    with _console() as console, run_logging(storage, config.name, console.note):
        results = benchmark.run(config, console)
    seed, activations = next(iter(results.activations.items()))
    print(results.text)
    print(f"table        {results.folder}")
    print(f"activations  {activations} (seed {seed})")
    print(f"time         {format_seconds(results.seconds)}; {results.num_made} worlds and trials were made")
    return 0


def _submit(parsed: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import Jobs

    config = _config(parsed)
    environment = dict(_pair(text) for text in parsed.env)
    jobs = Jobs(parsed.address)
    name = jobs.submit(config, name=parsed.name, environment=environment, say=lambda text: print(f"packed   {text}"))
    print(f"job      {name} on {jobs.address}")
    print(f"         crossray status {name} | logs {name} --follow | stop {name}", flush=True)
    return 0 if parsed.detach else _follow(jobs, name)


def _follow(jobs: "Jobs", name: str) -> int:
    """Copy a job's log to the terminal until it ends, then say why it failed if it did; the job's exit code."""
    try:
        state = jobs.follow(name, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\ncrossray: the job goes on; `crossray logs {name} --follow` shows it again", file=sys.stderr)
        return 0
    print(f"job      {name} {state.status}", flush=True)
    if state.status == "SUCCEEDED":
        return 0
    if state.last_line:
        print(f"crossray: job {name}: {state.last_line}", file=sys.stderr)
    return state.exit_code or 1


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--env: expected KEY=VALUE, got {text!r}")
    return key, value


def _status(parsed: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import Jobs

    jobs = Jobs(parsed.address)
    states = jobs.states(parsed.job)
    if not states:
        print(f"no jobs on {jobs.address}")
    width = max((len(state.name) for state in states), default=0)
    for state in states:
        started = f"{state.started:%Y-%m-%d %H:%M:%S}Z" if state.started else "not started"
        print(f"{state.name:<{width}}  {state.status:<9}  {started}  {state.last_line}".rstrip())
    return 0


def _logs(parsed: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import Jobs

    jobs = Jobs(parsed.address)
    if parsed.follow:
        return _follow(jobs, parsed.job)
    print(jobs.log(parsed.job), end="")
    return 0


def _stop(parsed: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import Jobs

    was_running = Jobs(parsed.address).stop(parsed.job)
    print(f"{parsed.job}: {'asked to end' if was_running else 'had ended already'}; run it again to continue")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from pipeline.run.flow import build_flow
    from pipeline.run.runner import with_measured_layer
    from pipeline.run.verify import all_folders, verify
    from pipeline.storage.filesystem import Storage

    if parsed.root is not None:
        storage = Storage(parsed.root)
        folders = all_folders(storage)
    else:
        config = _config(parsed)
        storage = Storage(config.storage.root)
        folders = [step.folder for step in build_flow(with_measured_layer(config, storage)).steps]
    with _console() as console:
        result = verify(storage, folders, console)
    unfinished = f", {result.num_unfinished} unfinished" if result.num_unfinished else ""
    print(f"{result.num_artifacts} artifacts, {result.num_bytes:,} bytes: {len(result.faults)} faults{unfinished}")
    return 2 if result.faults else 1 if result.num_unfinished else 0


_COMMANDS = {
    "init": _init,
    "plan": _plan,
    "run": _run,
    "layers": _layers,
    "report": _report,
    "benchmark": _benchmark,
    "verify": _verify,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
}
