"""What every stage shares: the step it is asked for, the surroundings it works in, and a pool of Ray Data workers.

A step is planned without touching anything; a stage receives the missing steps of its group and publishes each of them.
"""

import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.cluster import connect as cluster
from pipeline.config.resources import ResourcesSection, WorkersSection
from pipeline.config.section import Section
from pipeline.errors import ArtifactError, CrossrayError, first_line
from pipeline.storage.artifacts import ArtifactKey, Record, read_record, write_record
from pipeline.storage.filesystem import Storage
from pipeline.terminal import Progress, Reporter
from pipeline.tracking.tracker import Point

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True)
class Step:
    """One artifact that a run needs."""

    name: str
    """What the user reads: `crosscoder batch_topk`."""
    key: ArtifactKey
    """Its identity and folder."""
    section: Section
    """The settings it is made from."""
    inputs: Mapping[str, "Step"] = field(default_factory=dict)
    """The steps whose artifacts it reads."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Plain values beyond the section, such as the shared training section of a crosscoder."""


class Live(Protocol):
    """Values of a step that is still being made, for whoever watches the run."""

    def points(self, step: Step, points: Sequence[Point]) -> None:
        """Values of curves, in order, each once."""
        ...


@dataclass(frozen=True)
class Context:
    """The surroundings of a stage: how, never what."""

    storage: Storage
    resources: ResourcesSection
    reporter: Reporter
    live: Live
    run_name: str
    log_every_steps: int

    def record_of(self, step: Step) -> Record:
        """The record of an input, which must be complete by now."""
        record = read_record(self.storage, step.key)
        if record is None:
            raise ArtifactError(
                f"{self.storage.url(step.key.folder)}: expected the finished artifact of {step.name}, got none; "
                "run again"
            )
        return record

    def finish(
        self, step: Step, counts: Mapping[str, Any], seconds: float, files: Sequence[str] | None = None
    ) -> Record:
        """Publish a step's record: from here on it is complete."""
        return write_record(
            self.storage,
            step.key,
            name=step.name,
            counts=counts,
            seconds=seconds,
            run_name=self.run_name,
            files=files,
        )


class StageFunction(Protocol):
    """Makes the artifacts of the missing steps of one group."""

    def __call__(self, steps: Sequence[Step], context: Context) -> None:
        """Publish every step; raise if one cannot be made."""
        ...


class Pool(NamedTuple):
    """How a stage spreads independent items over Ray Data workers."""

    name: str
    """Section name under `resources`, for errors."""
    section: WorkersSection
    worker: type
    """Class whose objects are built once per process and called with one item, returning a plain dict."""
    arguments: tuple[Any, ...]
    """Constructor arguments."""
    uses_actors: bool = False
    """Actors own their process, as a GPU or a large model wants it. Without, Ray's idle processes are used again: they
    have torch imported already, which saves seconds per stage."""
    min_workers: int | None = None
    """Of actors: how many are started at once; the others follow while work is waiting. None starts all."""
    logical_cpus: float | None = None
    """What each worker asks of the cluster, where that differs from the CPUs (threads) that it uses."""


def run_pool(pool: Pool, items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results of `pool.worker(item)` in the order in which they are ready.

    Lost processes are replaced and their items repeated by Ray Data, each at most `max_retries` times, so a worker must
    give the same result when called twice. A CrossrayError of a worker arrives here as itself.
    """
    import ray

    try:
        for row in pool_dataset(pool, items).iter_rows():
            yield result_of(row)
    except ray.exceptions.RayError as error:
        lost = find_lost_process(error)
        if lost is None:
            raise
        raise CrossrayError(
            f"resources.{pool.name}: expected every item to end within max_retries={pool.section.max_retries} repeats, "
            f"but its process was lost each time ({lost}); the usual reason is memory: start fewer workers or give "
            "them smaller items, then run again: what was finished is kept"
        ) from error


def pool_dataset(pool: Pool, items: Sequence[Mapping[str, Any]]) -> "ray.data.Dataset":
    """A lazy Ray Data set of one row per item; `result_of` opens a row."""
    import ray.data

    num_workers = cluster.pool_size(pool.section, len(items))
    first_workers = min(pool.min_workers or num_workers, num_workers)
    cpus = pool.section.cpus
    logical_cpus = pool.logical_cpus or cpus
    cluster.check_fits(pool.name, cluster.request(pool.section, logical_cpus), first_workers)
    # Items and results travel as bytes: Ray would otherwise give every nested field an Arrow type, and arrays would
    # come back as lists.
    packed = [{"item": pickle.dumps(dict(item))} for item in items]
    dataset = ray.data.from_items(packed, override_num_blocks=len(items))
    common: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy"}
    common |= {"num_cpus": cluster.worker_cpus(logical_cpus), "resources": pool.section.custom or None}
    if pool.uses_actors or pool.section.gpus > 0:
        return dataset.map_batches(
            _OneByOne,
            fn_constructor_args=(pool.worker, pool.arguments, cpus),
            compute=ray.data.ActorPoolStrategy(
                min_size=first_workers, max_size=num_workers, max_tasks_in_flight_per_actor=2
            ),
            num_gpus=pool.section.gpus or None,
            ray_remote_args_fn=partial(dict, max_task_retries=pool.section.max_retries),
            **common,
        )
    token = uuid.uuid4().hex
    return dataset.map_batches(
        _in_reused_process,
        fn_kwargs={"token": token, "worker": pool.worker, "arguments": pool.arguments, "cpus": cpus},
        compute=ray.data.TaskPoolStrategy(size=num_workers),
        ray_remote_args_fn=partial(dict, max_retries=pool.section.max_retries),
        **common,
    )


def result_of(row: Mapping[str, Any]) -> Any:
    """What the worker returned for one row of a pool's data set; raises the CrossrayError that it raised."""
    result = pickle.loads(row["result"])
    if isinstance(result, CrossrayError):
        raise result
    return result


class _OneByOne:
    """Adapts a worker to Ray Data's batches of one.

    A CrossrayError (also one of the constructor) is returned rather than raised: Ray Data would wrap it, lose it in
    pickling and retry what cannot succeed.
    """

    def __init__(self, worker: type, arguments: tuple[Any, ...], cpus: float) -> None:
        cluster.set_worker_threads(cpus)
        self._make = (worker, arguments)
        self._worker: Callable[[Any], Any] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        return {"result": [pickle.dumps(self._result(pickle.loads(item))) for item in batch["item"]]}

    def _result(self, item: Any) -> Any:
        try:
            if self._worker is None:
                worker, arguments = self._make
                self._worker = worker(*arguments)
            return self._worker(item)
        except CrossrayError as error:
            return error.with_traceback(None)


_built: dict[str, _OneByOne] = {}
"""In a reused process: the worker of the pool at hand, by the pool's token; the one before is dropped."""


def _in_reused_process(
    batch: Mapping[str, Any], *, token: str, worker: type, arguments: tuple[Any, ...], cpus: float
) -> dict[str, list[Any]]:
    if token not in _built:
        _built.clear()
        _built[token] = _OneByOne(worker, arguments, cpus)
    return _built[token](batch)


def find_fault(error: BaseException) -> CrossrayError | None:
    """The CrossrayError inside what Ray made of it, or None: Ray wraps a worker's exception several times over."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)
        if isinstance(current, CrossrayError) and inner is None:
            return current
        queue += [inner if isinstance(inner, BaseException) else None, current.__cause__, current.__context__]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None


def find_lost_process(error: BaseException) -> str | None:
    """What Ray says of the process whose loss ended a pool, or None where the error is another one."""
    import ray

    lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, lost):
            return first_line(current)
        current = getattr(current, "cause", None) or current.__cause__
    return None


def run_task(function: Callable[..., Any], *arguments: Any, num_cpus: float) -> Any:
    """The result of one function in a worker process; a CrossrayError arrives as itself."""
    import ray

    try:
        return ray.get(ray.remote(function).options(num_cpus=num_cpus).remote(*arguments))
    except Exception as error:
        fault = find_fault(error)
        if fault is None:
            raise
        raise fault from None


def shown(context: Context, progress: Progress, done: int, note: str = "") -> None:
    """Report how far a stage is."""
    context.reporter.progress(progress.update(done, note))
