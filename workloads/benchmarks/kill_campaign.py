"""Kill random processes of runs at random times, restart them until they end, and compare them with an undisturbed run.

`python -m workloads.benchmarks.kill_campaign FOLDER --kills 200 --seed 0`, on a machine that does nothing else. Runs of
the tiny pair alternate between mode store and mode stream. While one works, a random process of its tree (driver,
raylet, GCS, workers, helpers) gets SIGKILL after a random time, exponential with a mean of --mean-seconds; where that
ends the run, the same command is started again, until it ends well. Then its tables, weights and rows are compared.

FOLDER/campaign.jsonl has a line for each finished run; the same command goes on after the last. The draws of run i come
from the seed and i alone; what they hit depends on the machine. In mode stream a kill changes the order of the training
rows, so weights and what is computed from them are compared by their FVE (within FVE_TOLERANCE), the data exactly.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from pipeline.storage.activation_store import ActivationStore
from pipeline.storage.filesystem import Storage
from pipeline.terminal import text_table
from workloads.benchmarks.processes import descendants, role_of

MODES = ("store", "stream")
FVE_TOLERANCE = 0.02
WALL_CLOCK = ("time_ms", "rows_per_second")
"""Columns that hold times."""
_EXACT_IN_STREAM = ("organism", "corpus", "tokens", "activations", "evidence")
_MARK = "CROSSRAY_KILL_CAMPAIGN"
"""In the environment of everything that a run starts: what is left behind is found by it."""
_GRACE_SECONDS = 60.0
_COUNTS = ("lost rows", "doubled rows", "differing files", "left processes", "left shared memory", "hung")


class Found(NamedTuple):
    """What became of one disturbed run."""

    run: int
    mode: str
    kills: list[dict[str, Any]]
    """Role of the process and stage of the run, for each kill."""
    num_starts: int
    counts: dict[str, int]
    differing: list[str]


def run_file(folder: Path, mode: str) -> Path:
    """The tiny pair, with small shards and many checkpoints, so that there is much to interrupt."""
    sparsity = {"kind": "batch_topk", "k": 8, "threshold_start_step": 10, "threshold_decay": 0.9}
    fit = {"num_latents": 128, "lr": 1e-3, "lr_warmup_steps": 10}
    members = {name: {"kind": "organism", "member": name} for name in ("base", "chat")}
    tree = {
        "name": f"campaign-{mode}",
        "organism": {"size": "tiny"},
        "models": {**members, "dtype": "float32"},
        "corpus": {
            "sources": [{"name": part, "kind": "organism", "part": part} for part in ("documents", "dialogues")],
            "validation_frac": 0.2,
        },
        "activations": {"layer": 1, "rows_per_shard": 1000, "mode": mode},
        "training": {"batch_rows": 256, "num_rows": 51_200},
        "crosscoders": [
            {"name": "l1", **fit, "sparsity": {"kind": "l1", "mu": 0.01}},
            {"name": "batch_topk", **fit, "sparsity": sparsity},
        ],
        "analyses": {
            "causality": {"num_conversations": 12, "num_resamples": 100},
            "planted": {"num_resamples": 100},
            "steering": {"num_prompts": 2, "num_random": 1, "scales": [2.0], "max_new_tokens": 4},
        },
        "resources": {
            "cluster": {"num_cpus": 2},
            "extraction": {"max_retries": 100},
            "tokens": {"max_retries": 100},
            "analyses": {"max_retries": 100},
            "training": {"checkpoint_every_steps": 20},
        },
        "storage": {"root": str(folder / "runs")},
        "tracking": {"kind": "none", "log_every_steps": 10},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path: Path, mark: str) -> subprocess.Popen[bytes]:
    """The driver of a run, in a session of its own."""
    with (path.parent / "output.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(path)],
            stdout=output,
            stderr=output,
            cwd=path.parent,
            env={**os.environ, _MARK: mark, "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,
        )


def marked(mark: str) -> list[int]:
    """Processes that a run has started, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                is_dead = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except OSError:
                continue
            if f"{_MARK}={mark}".encode() in environment.split(b"\0") and not is_dead:
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """The command line of a process, or that it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "a process that has ended since"


def shared_memory() -> set[str]:
    """Names below /dev/shm."""
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def stage_of(root: Path) -> str:
    """The stage whose artifact was begun last and has no record; the last finished one where none is begun."""
    folders = [path for path in root.glob("*/*") if path.is_dir() and path.parent.name not in ("logs", "locks")]
    begun = [path for path in folders if not (path / "record.json").exists()]
    latest = max(begun or folders, key=lambda path: path.stat().st_mtime, default=None)
    if latest is None:
        return "start"
    return latest.parent.name if begun else f"after {latest.parent.name}"


def disturb(path: Path, number: int, mode: str, arguments: argparse.Namespace) -> Found:
    """Start a run, kill and restart until it ends well, then compare it."""
    chance, mark = random.Random(f"{arguments.seed}-{number}"), f"{os.getpid()}-{number}"
    root, before = path.parent / "runs", shared_memory()
    kills: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    num_starts = 0
    while True:
        process, began = start(path, mark), time.monotonic()
        num_starts += 1
        while process.poll() is None:
            wait = chance.expovariate(1 / arguments.mean_seconds)
            try:
                process.wait(min(wait, max(0.1, began + arguments.limit - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() - began >= arguments.limit:
                    counts["hung"] += 1
                    process.kill()
                elif len(kills) < arguments.kills_per_run:
                    kills += kill_one(process.pid, chance, root)
        left = remaining(mark)
        counts["left processes"] += len(left)
        for pid in left:
            print(f"left by run {number}: {command_of(pid)}", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.returncode == 0 or num_starts > 2 * arguments.kills_per_run + 3:
            break
    counts["left shared memory"] = len(shared_memory() - before)
    counts["hung"] += process.returncode != 0
    reference = arguments.folder / f"undisturbed-{mode}" / "runs"
    counts["lost rows"], counts["doubled rows"] = compare_rows(root, reference)
    differing = sorted(differences(root, reference, mode))
    counts["differing files"] = len(differing)
    return Found(number, mode, kills, num_starts, dict(counts), differing)


def kill_one(driver: int, chance: random.Random, root: Path) -> list[dict[str, Any]]:
    """SIGKILL a random process of a tree; what it was."""
    tree = descendants(driver)
    pid = chance.choice(sorted(tree)) if tree else driver
    stage = stage_of(root)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return []
    return [{"role": "driver" if pid == driver else role_of(tree[pid].name), "stage": stage}]


def remaining(mark: str) -> list[int]:
    """Processes of a run that are still there some time after its driver has ended."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def compare_rows(root: Path, reference: Path) -> tuple[int, int]:
    """Rows (document, position) of the activation store that are missing, and those that are there more than once."""
    own, theirs = list(_rows(root)), set(_rows(reference))
    return len(theirs - set(own)), len(own) - len(set(own)) + len(set(own) - theirs)


def _rows(root: Path) -> Iterator[tuple[int, int]]:
    for record in root.glob("activations/*/record.json"):
        store = ActivationStore(Storage(str(root)), f"activations/{record.parent.name}")
        for shard in store.manifest.shards:
            rows = store.read(shard)
            yield from zip(rows.doc_id_B.tolist(), rows.position_B.tolist(), strict=True)


def differences(root: Path, reference: Path, mode: str) -> Iterator[str]:
    """Tables and weights that are not those of the undisturbed run, and artifacts that only one of them has."""
    own, theirs = (_files(folder) for folder in (root, reference))
    yield from own ^ theirs
    for name in sorted(own & theirs):
        stage = name.split("/", 1)[0]
        if mode == "stream" and stage not in _EXACT_IN_STREAM:
            if name.endswith("record.json") and stage == "crosscoder" and not _fits_as_well(root, reference, name):
                yield name
        elif not _is_equal(root / name, reference / name):
            yield name


def _files(root: Path) -> set[str]:
    """Tables, weights and records of all artifacts."""
    found = (path for kind in ("*.parquet", "*.safetensors", "record.json") for path in root.glob(f"*/*/**/{kind}"))
    return {str(path.relative_to(root)) for path in found if path.relative_to(root).parts[0] != "training"}


def _is_equal(path: Path, other: Path) -> bool:
    """Whether two files hold the same, columns of times and records, which hold times too, left out."""
    if path.suffix == ".parquet":
        tables = [pq.read_table(one) for one in (path, other)]
        one, two = (table.drop_columns([name for name in WALL_CLOCK if name in table.column_names]) for table in tables)
        return bool(one.schema.equals(two.schema)) and one.to_pandas().equals(two.to_pandas())
    if path.suffix == ".safetensors":
        tensors, expected = load_file(path), load_file(other)
        return tensors.keys() == expected.keys() and all(
            torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()) for name, tensor in tensors.items()
        )
    return True


def _fits_as_well(root: Path, reference: Path, name: str) -> bool:
    """Whether a streamed crosscoder explains as much as the undisturbed one."""
    counts = [json.loads((folder / name).read_text())["counts"] for folder in (root, reference)]
    explained = [{key: value for key, value in own.items() if key.startswith("last_fve")} for own in counts]
    return explained[0].keys() == explained[1].keys() and all(
        abs(explained[0][key] - explained[1][key]) <= FVE_TOLERANCE for key in explained[0]
    )


def summary(found: list[Found]) -> str:
    """One row for each mode, then where the kills hit."""
    rows = []
    for mode in MODES:
        own = [one for one in found if one.mode == mode]
        counted = [str(sum(one.counts.get(name, 0) for one in own)) for name in _COUNTS]
        rows.append([mode, str(len(own)), str(sum(len(one.kills) for one in own)), *counted])
    hits = Counter((kill["role"], kill["stage"]) for one in found for kill in one.kills)
    where = [[role, stage, str(number)] for (role, stage), number in hits.most_common()]
    return "\n\n".join(
        [text_table(["mode", "runs", "kills", *_COUNTS], rows), text_table(["process", "stage", "kills"], where)]
    )


def main() -> None:
    """Run the campaign, or the rest of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs and the campaign's lines are kept")
    parser.add_argument("--kills", type=int, default=200, help="of the whole campaign, at least")
    parser.add_argument("--kills-per-run", type=int, default=10, help="at most; then a run is left to end")
    parser.add_argument("--mean-seconds", type=float, default=45.0, help="between two kills")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a start counts as hung")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    for mode in arguments.modes:
        path = run_file(arguments.folder / f"undisturbed-{mode}", mode)
        if start(path, "undisturbed").wait():
            sys.exit(f"the undisturbed run failed; see {path.parent / 'output.log'}")
    journal = arguments.folder / "campaign.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    found = [Found(**json.loads(line)) for line in lines]
    while sum(len(one.kills) for one in found) < arguments.kills:
        number = len(found)
        mode, folder = arguments.modes[number % len(arguments.modes)], arguments.folder / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        found.append(disturb(run_file(folder, mode), number, mode, arguments))
        with journal.open("a") as file:
            file.write(f"{json.dumps(found[-1]._asdict())}\n")
        print(
            f"run {number} ({mode}): {len(found[-1].kills)} kills, {found[-1].counts} {found[-1].differing}", flush=True
        )
    print(summary(found))


if __name__ == "__main__":
    main()
