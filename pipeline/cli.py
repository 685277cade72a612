"""The command line: parsing, printing, exit codes. How to run: `crossray run workloads/demo.yaml`.

Only this file and those of `commands/` print. Exit codes: 0 done, 2 the user's input is wrong (one line, no traceback)
or `verify` found faults (one line each), 130 interrupted, 1 anything else, such as artifacts that `verify` found
unfinished.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.arguments import completion, make_parser
from pipeline.commands import doors, jobs
from pipeline.errors import MAX_LINE_LETTERS, CrossrayError, InputError, shortened

if TYPE_CHECKING:
    from pipeline.config.run_file import RunConfig
    from pipeline.terminal import Console

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of the signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    from pipeline.terminal import standard_streams

    with standard_streams() as output:
        code = _code_of(arguments)
        sys.stdout.flush()
        if output.fault is not None and not isinstance(output.fault, BrokenPipeError):
            print(f"crossray: standard output: cannot be written to: {output.fault.strerror}", file=sys.stderr)
        return code if output.fault is None else code or 1


def _code_of(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
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


def _config(parsed: argparse.Namespace) -> "RunConfig":
    from pipeline.config.run_file import load

    return load(Path(parsed.file), parsed.set)


def _set_library_defaults() -> None:
    """Turn off progress bars and start-up messages that libraries write past logging; the user may set them again."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _schema(parsed: argparse.Namespace) -> int:
    from pipeline.config.json_schema import schema_text

    if parsed.kind == "show":
        from pipeline.library.summary import Summary

        print(schema_text(Summary, is_yaml=False), end="")
        return 0
    from pipeline.config.run_file import RunConfig
    from pipeline.planted.settings import BenchmarkConfig

    print(schema_text(RunConfig if parsed.kind == "run" else BenchmarkConfig), end="")
    return 0


def _completion(parsed: argparse.Namespace) -> int:
    print(completion(parsed.shell))
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    from pipeline.run.plan import plan_text

    print(plan_text(_config(parsed), gpu=parsed.gpu))
    return 0


def _init(parsed: argparse.Namespace) -> int:
    path = _write_draft(parsed)
    print(f"next     crossray plan {path}")
    return 0


def _write_draft(parsed: argparse.Namespace) -> Path:
    from pipeline.planning.draft import Corpora, draft, draft_path, machine_here, write_draft

    path = draft_path(parsed.chat, name=parsed.name, output=parsed.output)
    if parsed.command == "diff" and path.exists():
        print(f"file     {path}, which is there already and is used as it stands")
        return path
    corpora = Corpora(parsed.texts, parsed.dialogues)
    write_draft(draft(parsed.base, parsed.chat, corpora, machine_here("runs"), name=parsed.name), path)
    print(f"file     {path}")
    return path


def _diff(parsed: argparse.Namespace) -> int:
    from pipeline.config.run_file import load
    from pipeline.run.plan import plan_text

    path = _write_draft(parsed)
    config = load(path)
    print(plan_text(config, gpu=parsed.gpu))
    if not _is_agreed("run this now?", parsed):
        print(f"next     crossray run {path}")
        return 0
    return _make(config)


def _is_agreed(question: str, parsed: argparse.Namespace) -> bool:
    """Whether the user wants it: by --yes, else by an answer; where nobody can answer, no."""
    if parsed.yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        print(f"nothing was done: {question} Say so with --yes")
        return False
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _run(parsed: argparse.Namespace) -> int:
    return _make(_config(parsed))


def _make(config: "RunConfig") -> int:
    from pipeline.run import runner
    from pipeline.storage.filesystem import Storage
    from pipeline.terminal import format_seconds
    from pipeline.tracking.log_file import run_logging

    with _console() as console, run_logging(Storage(config.storage.root), config.name, console.note) as log:
        outcome = runner.run(config, console)
    print(outcome.verdict)
    print(f"report   {outcome.report_path}")
    print(f"mlflow   {outcome.tracking_link or 'unchanged: this run had nothing to log'}")
    if log.is_written:
        print(f"log      {log.url}")
    print(f"time     {format_seconds(outcome.seconds)}")
    return 0


def _track(parsed: argparse.Namespace) -> int:
    from pipeline.run import runner

    with _console() as console:
        link = runner.track(_config(parsed), console)
    print(f"mlflow   {link}")
    return 0


def _runs(parsed: argparse.Namespace) -> int:
    from pipeline.run.kept import kept_runs, runs_text
    from pipeline.storage.filesystem import Storage

    print(runs_text(kept_runs(Storage(parsed.root))))
    return 0


def _show(parsed: argparse.Namespace) -> int:
    from pipeline.library.runs import open_run
    from pipeline.library.summary import latents_text

    run = open_run(parsed.root, parsed.name)
    summary = run.summary(num_latents=parsed.latents)
    if parsed.json:
        print(summary.model_dump_json(indent=1, ensure_ascii=True))
        return 0
    print(f"{run.verdict()}\n\n{latents_text(summary)}", end="")
    print(f"report   {summary.report}")
    return 0


def _explore(parsed: argparse.Namespace) -> int:
    from pipeline.explorer.server import explore, read_token

    token = None if parsed.token_file is None else read_token(parsed.token_file)
    explorer = explore(parsed.file, overrides=parsed.set, host=parsed.host, port=parsed.port, token=token)
    made = f"\ntoken    {explorer.made_token}" if explorer.made_token else ""
    print(f"explorer {explorer.url}{made}\n         Ctrl-C ends it", flush=True)
    explorer.wait()
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    from pipeline.library.comparison import compare
    from pipeline.library.runs import open_run

    print(compare(open_run(parsed.root, parsed.a), open_run(parsed.root, parsed.b)).text)
    return 0


def _rm(parsed: argparse.Namespace) -> int:
    from pipeline.run.kept import removal, remove
    from pipeline.storage.filesystem import Storage

    storage = Storage(parsed.root)
    planned = removal(storage, parsed.names, older_than_days=parsed.older_than)
    print(planned.text)
    if planned.sizes and _is_agreed("remove them?", parsed):
        remove(storage, planned)
        print("removed")
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


def _verify(parsed: argparse.Namespace) -> int:
    from pipeline.run.flow import build_flow
    from pipeline.run.runner import with_measured_layer
    from pipeline.run.verify import verify
    from pipeline.storage.artifacts import all_folders
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
    "diff": _diff,
    "plan": _plan,
    "run": _run,
    "layers": _layers,
    "report": _report,
    "track": _track,
    "benchmark": _benchmark,
    "verify": _verify,
    "runs": _runs,
    "show": _show,
    "explore": _explore,
    "compare": _compare,
    "export": doors.export,
    "push": doors.push,
    "rm": _rm,
    "submit": jobs.submit,
    "status": jobs.status,
    "logs": jobs.logs,
    "stop": jobs.stop,
    "schema": _schema,
    "completion": _completion,
}
