"""A pool of Ray Data workers that each get independent items, and single tasks beside it.

A worker is a plain class: built once per process, then called with one item at a time. Lost processes are replaced and
their items repeated. What a user must correct (a CrossrayError) arrives at the driver as itself, once.
"""

import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pipeline.cluster.connect import check_fits, pool_size, request, set_worker_threads, worker_cpus
from pipeline.config.resources import WorkersSection
from pipeline.errors import CrossrayError, first_line

# Ray is imported where it is used: importing it writes to the terminal, unless connect.connected has diverted it.
if TYPE_CHECKING:
    import ray.data

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Pool(NamedTuple, Generic[Item, Result]):
    """How independent items are spread over Ray Data workers."""

    name: str
    """Section name under `resources`, for errors."""
    section: WorkersSection
    worker: Callable[..., Callable[[Item], Result]]
    """Class whose objects are built once per process and called with one item. Items and results are pickled."""
    arguments: tuple[Any, ...]
    """Constructor arguments."""
    uses_actors: bool = False
    """Whether each worker owns its process, as a GPU or a large model needs it. Without, Ray's idle processes are used
    again: they have torch imported already, which saves seconds per stage."""
    min_workers: int | None = None
    """Of actors: how many are started at once; the others follow while work is waiting. None starts all."""
    logical_cpus: float | None = None
    """What each worker asks of the cluster, where that differs from the CPUs (threads) that it uses."""


def run_pool(pool: Pool[Item, Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results of `pool.worker(item)` in the order in which they are ready.

    Lost processes are replaced and their items repeated by Ray Data, each at most `max_retries` times, so a worker must
    give the same result when called twice. A CrossrayError of a worker arrives here as itself.
    """
    import ray

    try:
        for row in pool_dataset(pool, items).iter_rows():
            result: Result = result_of(row)
            yield result
    except ray.exceptions.RayError as error:
        lost = find_lost_process(error)
        if lost is None:
            raise
        raise CrossrayError(
            f"resources.{pool.name}: expected every item to end within max_retries={pool.section.max_retries} repeats, "
            f"but its process was lost each time ({lost}); the usual reason is memory: start fewer workers or give "
            "them smaller items, then run again: what was finished is kept"
        ) from error


def pool_dataset(pool: Pool[Item, Result], items: Sequence[Item]) -> "ray.data.Dataset":
    """A lazy Ray Data set of one row per item; `result_of` opens a row."""
    import ray.data

    num_workers = pool_size(pool.section, len(items))
    first_workers = min(pool.min_workers or num_workers, num_workers)
    cpus = pool.section.cpus
    logical_cpus = pool.logical_cpus or cpus
    check_fits(pool.name, request(pool.section, logical_cpus), first_workers)
    # Items and results travel as bytes: Ray would otherwise give every nested field an Arrow type, and turn arrays
    # into lists.
    packed = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(packed, override_num_blocks=len(items))
    common: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy"}
    common |= {"num_cpus": worker_cpus(logical_cpus), "resources": pool.section.custom or None}
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
    """Calls a worker with each item of a Ray Data batch.

    A CrossrayError (also one of the constructor) is returned rather than raised: Ray Data would wrap it, lose it in
    pickling and retry what cannot succeed.
    """

    def __init__(self, worker: Callable[..., Any], arguments: tuple[Any, ...], cpus: float) -> None:
        set_worker_threads(cpus)
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
"""In a reused process: the worker of the present pool, by the pool's token; the former one is dropped."""


def _in_reused_process(
    batch: Mapping[str, Any], *, token: str, worker: Callable[..., Any], arguments: tuple[Any, ...], cpus: float
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
    """Ray's message about the process whose loss ended a pool; None where the error is another one."""
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
