"""The commands of jobs: a run on a distant cluster is submitted, listed, followed and stopped."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.cluster.jobs import Jobs


def submit(parsed: argparse.Namespace) -> int:
    """Run as a job of a cluster, and follow its log."""
    from pipeline.cluster.jobs import Jobs
    from pipeline.config.run_file import load

    config = load(Path(parsed.file), parsed.set)
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


def status(parsed: argparse.Namespace) -> int:
    """List the jobs of a cluster, or one of them."""
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


def logs(parsed: argparse.Namespace) -> int:
    """Print a job's log."""
    from pipeline.cluster.jobs import Jobs

    jobs = Jobs(parsed.address)
    if parsed.follow:
        return _follow(jobs, parsed.job)
    print(jobs.log(parsed.job), end="")
    return 0


def stop(parsed: argparse.Namespace) -> int:
    """Ask a job to end."""
    from pipeline.cluster.jobs import Jobs

    was_running = Jobs(parsed.address).stop(parsed.job)
    print(f"{parsed.job}: {'asked to end' if was_running else 'had ended already'}; run it again to continue")
    return 0
