"""The Ray cluster of a run: started or joined, kept quiet, and asked for what it has.

Ray's own messages go to a log file, never to the user's terminal.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from pipeline.cluster.surroundings import allow_files, check_address, object_folder, ray_folder
from pipeline.config.resources import ClusterSection, TrainingResources, WorkersSection
from pipeline.errors import CrossrayError, InputError, first_line

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_log = logging.getLogger(__name__)
_OBJECT_STORE_LIMIT = 2_000_000_000
_OF_ANOTHER_CLUSTER = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NAMESPACE")
"""What a job of a cluster finds in its environment: Ray would apply it to the cluster that a run starts for itself."""
_POLL_SECONDS = 0.5
_autoscales = False
"""Whether the cluster that this process has joined starts nodes on demand."""


@contextmanager
def connected(section: ClusterSection, log_path: Path) -> Iterator[None]:
    """A started or joined Ray cluster for the length of the block.

    Ray's loggers, its C++ core and its helper processes all write to this process's standard error, so that is what
    goes to `log_path` meanwhile; the command line keeps a copy of the terminal for itself.
    """
    global _autoscales
    _autoscales = section.autoscales
    with _stderr_to(log_path):
        import ray

        already = ray.is_initialized()
        if not already:
            _start(section)
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        try:
            yield
        finally:
            if not already:
                ray.shutdown()


def _start(section: ClusterSection) -> None:
    common: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if section.address == "local":
        _start_local(section, common)
        return
    check_address(section.address)
    import ray

    try:
        use_token()
        _name_log(ray.init(address=section.address, **common).address_info)
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:
        raise InputError(
            f"resources.cluster.address: expected a running Ray cluster at {section.address!r}: "
            f"{first_line(error)}; start one with `ray start --head` or use address: local"
        ) from error


def _init_local(options: Mapping[str, Any]) -> Any:
    """Ray's answer to a local start, tried twice: a node has 30 s to come up, which a busy machine may miss once."""
    import ray

    try:
        return ray.init(address="local", **options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        return ray.init(address="local", **options)


def _start_local(section: ClusterSection, common: Mapping[str, Any]) -> None:
    allow_files()
    folder = ray_folder()
    for name in _OF_ANOTHER_CLUSTER:
        os.environ.pop(name, None)
    options = {
        "num_cpus": section.num_cpus,
        "include_dashboard": False,
        "object_store_memory": section.object_store_bytes or min(_OBJECT_STORE_LIMIT, _memory_bytes() // 10),
        "_temp_dir": folder,
        "_plasma_directory": object_folder(os.path.dirname(folder)),  # noqa: PTH120
        **common,
    }
    try:
        info = _init_local(options)
    except (Exception, SystemExit) as error:  # a plain Exception where a node does not come up in time
        raise CrossrayError(
            f"resources.cluster: Ray cannot start on this machine: {first_line(error)}; look into {folder} and at "
            "/dev/shm (space, permissions), the limits of processes and open files (ulimit -u, -n), and RAY_* variables"
        ) from error
    _name_log(info.address_info)


def _name_log(address_info: Mapping[str, Any]) -> None:
    _log.info("what workers log is in Ray's session log: %s/logs", address_info.get("session_dir"))


def use_token() -> None:
    """Make Ray's clients send the cluster's token where this machine has one; by default they do not."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Point file descriptor 2 at a file for the length of the block."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:  # the log is not worth the run
        _log.warning("Ray's messages are not kept, since %s cannot be written: %s", path, error.strerror)
        path = Path(os.devnull)
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def total_cpus() -> int:
    """Logical CPUs of the whole cluster."""
    return int(_total("CPU")) or 1


def _total(kind: str) -> float:
    import ray

    return float(ray.cluster_resources().get(kind, 0.0))


def node_cpus() -> float:
    """Logical CPUs of the cluster's largest node, the most that one worker can have; 0 where no node is there yet."""
    return _largest_node("CPU")


def worker_cpus(asked: float) -> float:
    """CPUs that one worker asks for: at most what the largest node has, unless larger ones may start."""
    return asked if _autoscales else min(asked, node_cpus())


def _largest_node(kind: str) -> float:
    import ray

    return max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def pool_size(section: WorkersSection, num_tasks: int) -> int:
    """How many workers a stage starts: what was asked for, else what fits the cluster; never more than tasks."""
    kinds = {"CPU": section.cpus, **section.custom}
    fitting = section.workers or max(1, int(min(_total(kind) / each for kind, each in kinds.items())))
    return max(1, min(fitting, num_tasks))


def request(section: WorkersSection | TrainingResources, cpus: float) -> dict[str, float]:
    """What one worker takes of its node, by Ray's names; nothing that it needs none of."""
    return {"CPU": cpus, **({"GPU": section.gpus} if section.gpus else {}), **section.custom}


def check_total(name: str, asked: Mapping[str, float], workers: int) -> None:
    """Raise an InputError if the cluster can never hold all of this together; Ray would wait for ever.

    Nothing is raised for a cluster that starts nodes on demand (resources.cluster.autoscales).
    """
    for kind, amount in asked.items():
        if not _autoscales and amount > _total(kind) + 1e-9:
            raise InputError(
                f"resources.{name}: expected at most the cluster's {_amount(_total(kind), kind)}, got {amount:g} "
                f"({workers} workers); ask for less or start more nodes{_with_resource(kind)}"
            )


def check_fits(name: str, each: Mapping[str, float], workers: int) -> None:
    """Raise an InputError if the cluster can never hold so many workers that take `each`, or no node a single one."""
    check_total(name, {kind: amount * workers for kind, amount in each.items()}, workers)
    for kind, amount in each.items():
        if not _autoscales and amount > _largest_node(kind) + 1e-9:
            raise InputError(
                f"resources.{name}: expected at most the {_amount(_largest_node(kind), kind)} of the cluster's largest "
                f"node for each worker, got {amount:g}; ask for less or start larger nodes{_with_resource(kind)}"
            )


def _amount(value: float, kind: str) -> str:
    return f"{value:g} {kind}s" if kind in ("CPU", "GPU") else f"{value:g} of the custom resource {kind!r}"


def _with_resource(kind: str) -> str:
    return "" if kind in ("CPU", "GPU") else f" that offer it (ray start --resources '{{\"{kind}\": 1}}')"


def beside_driver(kind: type, *arguments: Any) -> Any:
    """The handle of an actor of this class that takes no CPUs and runs on the driver's own node.

    On another node it could be lost while the driver lives on.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)


class _Events:
    """Keeps the events that workers post until the driver takes them; an actor."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def post(self, event: Any) -> None:
        self._events.append(event)

    def take(self) -> list[Any]:
        events, self._events = self._events, []
        return events


class Board(NamedTuple):
    """Where workers anywhere post events for the driver."""

    actor: Any
    """Handle of the actor that keeps them."""

    def post(self, event: Any) -> None:
        """Send an event; returns at once."""
        self.actor.post.remote(event)


@contextmanager
def listening(on_event: Callable[[Any], None]) -> Iterator[Board]:
    """A board for workers; `on_event` runs in this process for each event, in order, until the end of the block.

    An exception of `on_event` is raised at the end of the block, so that a tracker that fails is noticed.
    """
    import ray

    actor = beside_driver(_Events)
    stop = Event()
    failures: list[BaseException] = []

    def drain() -> None:
        try:
            for event in ray.get(actor.take.remote()):
                on_event(event)
        except BaseException as error:
            failures.append(error)
            stop.set()

    def poll() -> None:
        while not stop.wait(_POLL_SECONDS):
            drain()

    thread = Thread(target=poll, name="crossray-listener", daemon=True)
    thread.start()
    try:
        yield Board(actor)
    finally:
        stop.set()
        thread.join()
        if sys.exc_info()[0] is None and not failures:
            drain()
        ray.kill(actor)
    if failures:
        raise failures[0]


def set_worker_threads(cpus: float) -> None:
    """Give this worker's torch as many threads as it was given CPUs, at least one; send its log to Ray's session log.

    Ray keeps a worker's standard error there, which is where basicConfig writes.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.captureWarnings(True)


def local_cpus() -> int:
    """Cores that this process may use; all of the machine's where the system does not say (macOS)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C within the block is a KeyboardInterrupt, and after it what it was before.

    Ray Train installs a handler that ends the fit and then this process, without a word and with exit code 0, and
    leaves it installed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
